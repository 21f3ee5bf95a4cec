"""EST: the attack moves every embedding as far as it can, and the loss is taken on the moved embeddings."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..attacks.objective import Score
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.numeric import unit_length
from ..training.plan import Plan, attackable_rows, replace_rows


class EST:
    """Embedding-shifted triplets (Zhou et al., ECCV 2020, arXiv 2002.11293).

    Each row x becomes ``x' = argmax d(f(x'), f(x))`` within the budget. d is the Euclidean distance between embeddings
    at unit length, measured from the `displaced` clean row, like the first step of the authors' code. The wrapped loss
    is taken on the perturbed rows alone. The paper trains a triplet loss; here any loss can be trained.

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


def perturb_all_rows(batch: Batch) -> Plan:
    """A plan in which each row with known inputs is replaced by its copy, in all tuples; the tuples stay as given."""
    return replace_rows(attackable_rows(batch), len(batch), batch.indices_tuple).split(batch.num_queries)


def embedding_shift(left: Tensor, right: Tensor) -> Tensor:
    """``(M,)`` Euclidean distances in [0, 2] of embeddings ``(M, D)`` at unit length; where 0, so is the gradient."""
    return torch.linalg.vector_norm(unit_length(left) - unit_length(right), dim=1)


def displaced(embeddings: Tensor) -> Tensor:
    """``(M, D)`` embeddings at unit length, each moved by 0.0001 in a random direction of torch's global generator.

    The distance of a copy from its row has no gradient at the row itself. Measured from a point close to the row it has
    one, so an attack needs no random start.
    """
    return unit_length(embeddings) + 1e-4 * unit_length(torch.randn_like(embeddings))
