"""ICS: an anchor's perturbed copy stays closer to it than its positive (Zhou and Patel, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from torch import Tensor, nn

from ..attacks.checks import check_number
from ..errors import PlanError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.objectives import tuples_of
from ..training.plan import Plan
from .triplets import distance


class ICS:
    """Intra-class structure (arXiv 2203.01439): adds a term to whatever is optimised.

    The term is ``weight * mean [d(a, a') - d(a, p)]+`` over the triplets or positive pairs. d is the Euclidean distance
    at unit length, a' the perturbed anchor; a and p are clean, as the caller embedded them. The term pulls a' toward a
    and pushes p away from a. Gradient flows through all three.

    It needs a plan that perturbs anchors: `HM` as published, in either order, or ``perturb="anchor"`` or "all". Tuples
    with a clean anchor contribute 0. `AdversarialMiner` has no loss, and refuses it.

    Args:
        weight: lambda. Published: 0.5, and 0.05 as a variant.

    Raises:
        InputError: the weight is no finite number from 0 on.
    """

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = check_number("weight", weight)

    @hookimpl(wrapper=True)
    def pml_adversarial_training_loss(
        self, wrapped: nn.Module, batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Generator[None, Tensor, Tensor]:
        """The loss of the other plugins, plus the term."""
        loss = yield
        tuples = tuples_of(plan, wrapped, batch)
        if tuples is None:
            raise PlanError("There are neither labels nor tuples, so ICS knows no positives. Pass labels, or tuples.")
        if len(tuples[0]) and not (plan.pool_indices[tuples[0]] >= len(batch)).any():
            raise PlanError(
                "ICS compares anchors with their perturbed copies, and no anchor is perturbed. Use it with "
                "plugins=[HM, ICS], with perturb='anchor' or with perturb='all'."
            )
        plan = replace(plan, indices_tuple=tuples)
        perturbed = plan.members(batch.embeddings, adversarial.embeddings)[0]
        anchors, positives, *_ = plan.members(batch.embeddings, batch.embeddings[plan.rows])
        gap = distance(anchors, perturbed) - distance(anchors, positives)
        return loss + self.weight * gap.relu().sum() / max(len(gap), 1)
