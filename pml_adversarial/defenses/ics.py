"""ICS: an anchor's perturbed copy stays closer to it than its positive (Zhou and Patel, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from torch import Tensor, nn

from ..errors import PlanError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.objectives import tuples_of
from ..training.plan import Plan
from .rows import check_weight
from .triplets import distance


class ICS:
    """Intra-class structure (arXiv 2203.01439): adds a term to whatever is optimised.

    The term is ``weight * mean [d(a, a') - d(a, p)]+`` over the triplets or positive pairs, d the Euclidean distance at
    unit length, a' the perturbed anchor, and a and p clean as the caller embedded them. It pulls a' to a, and pushes p
    from a; gradient goes through all three.

    It needs perturbed anchors: `HM`, ``perturb="anchor"`` or ``"all"``, or any other plan in which anchors are copies.
    Tuples whose anchor stays clean contribute 0. Beside `HM`, the published combination, it may be named before or
    after. Miners take no loss, and refuse it.

    Args:
        weight: lambda. Published: 0.5, and 0.05 as a variant.

    Raises:
        InputError: the weight cannot be one.
    """

    def __init__(self, weight: float = 0.5) -> None:
        check_weight(weight)
        self.weight = float(weight)

    @hookimpl(wrapper=True)
    def pml_adversarial_training_loss(
        self, wrapped: nn.Module, batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Generator[None, Tensor, Tensor]:
        """What the others answer, and the term."""
        loss = yield
        plan = _with_tuples(wrapped, batch, plan)
        perturbed = plan.members(batch.embeddings, adversarial.embeddings)[0]
        anchors, positives, *_ = plan.members(batch.embeddings, batch.embeddings[plan.rows])
        gap = distance(anchors, perturbed) - distance(anchors, positives)
        return loss + self.weight * gap.relu().sum() / max(len(gap), 1)


def _with_tuples(wrapped: nn.Module, batch: Batch, plan: Plan) -> Plan:
    """The plan with tuples, those of the loss itself where it leaves them to the loss, and with perturbed anchors."""
    tuples = tuples_of(plan, wrapped, batch)
    if tuples is None:
        raise PlanError("There are neither labels nor tuples, so ICS knows no positives; expected either.")
    if len(tuples[0]) and not (plan.pool_indices[tuples[0]] >= len(batch)).any():
        raise PlanError(
            "ICS compares anchors with their perturbed copies, and no anchor is perturbed here. Use it with "
            "plugins=[HM, ICS], with perturb='anchor' or with perturb='all'."
        )
    return replace(plan, indices_tuple=tuples)
