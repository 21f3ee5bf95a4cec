"""EST: every row moves as far from itself as it can, and the loss is taken on what they became."""

from __future__ import annotations

from torch import Tensor

from ..attacks.objective import Score
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.plan import Plan
from .rows import beside, perturb_all, shift


class EST:
    """Embedding-shifted triplets (Zhou et al., ECCV 2020, arXiv 2002.11293).

    Each row becomes ``x' = argmax d(f(x'), f(x))`` within the budget, ``d`` Euclidean between embeddings at unit
    length, and the wrapped loss is taken on the perturbed rows alone. The paper trains a triplet loss so; here it is
    any loss, since no row's perturbation depends on another's.

    At the clean row the distance has no direction to grow in. As the authors' code does in its first step, it is taken
    from a point 0.0001 beside the clean embedding, at random, so that an attack needs no random start. Tuples from a
    miner were mined on clean embeddings, the authors mine on the perturbed: ``AdversarialMiner(miner, model,
    plugins=["est"])`` does that. Rows of a reference with unknown inputs stay clean. Processes may share a batch.
    """

    @hookimpl
    def pml_adversarial_plan(self, batch: Batch) -> Plan:
        """Every row is replaced."""
        return perturb_all(batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """The distance between a copy and its own clean embedding."""
        origin = beside(batch.context[plan.rows])

        def moved(embeddings: Tensor) -> Tensor:
            return shift(embeddings, origin)

        return moved
