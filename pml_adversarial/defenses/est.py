"""EST: the attack moves every embedding as far as it can, and the loss is taken on the moved embeddings."""

from __future__ import annotations

from functools import partial

from ..attacks.objective import Score
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.plan import Plan
from .embedding_shift import displaced, embedding_shift, perturb_all_rows


class EST:
    """Embedding-shifted triplets (Zhou et al., ECCV 2020, arXiv 2002.11293).

    Each row x becomes ``x' = argmax d(f(x'), f(x))`` within the budget. d is the Euclidean distance between embeddings
    at unit length, measured from the clean row as it is `embedding_shift.displaced`, like the first step of the
    authors' code. The wrapped loss is taken on the perturbed rows alone. The paper trains a triplet loss; here any loss
    can be trained.

    Tuples that the caller passes were mined on clean embeddings, while the authors mine on perturbed ones:
    ``AdversarialMiner(miner, model, plugins=["est"])`` does so. Reference rows with unknown inputs stay clean.
    Processes may share a batch.
    """

    @hookimpl
    def pml_adversarial_plan(self, batch: Batch) -> Plan:
        """Every row is replaced by its copy."""
        return perturb_all_rows(batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """The distance between a copy and its own clean embedding."""
        return partial(embedding_shift, right=displaced(batch.context[plan.rows]))
