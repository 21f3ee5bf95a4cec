"""AMD and RAMD, min-max training: the attack raises the wrapped loss itself."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor, nn

from ..attacks.checks import check_choice
from ..attacks.objective import Score
from ..errors import PlanError
from ..plugins.fixed_context import FixedContext
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.isolation import preserved
from ..training.numeric import at_least_float
from ..training.objectives import OwnLoss, tuples_of
from ..training.plan import Plan
from ..training.tuples import ROLES, Role, played
from .triplets import distance


class AMD:
    """Adversarial training of Madry et al. (ICLR 2018, arXiv 1706.06083), adapted to metric learning.

    ``min max L(a + r_a, p + r_p, n + r_n)``: the attack perturbs all members together to raise the wrapped loss, and
    the loss is taken on the perturbed members (Zhou and Patel, arXiv 2203.01439, supplement, "Min-max Adversarial
    Training with Triplet Loss"). The authors find that training collapses easily. Any loss can be trained in this way.

    A satisfied hinge has no gradient, so copies of satisfied tuples stay where the attack starts. Where all tuples are
    satisfied and the attack starts at the clean inputs, nothing moves, and the step trains on the clean batch
    (``perturbation_linf`` is 0). The attack raises the value of the loss with its reducer. PML's `AvgNonZeroReducer`
    averages over violated tuples, so it can fall when more tuples are violated; `MeanReducer` is that of the paper.

    Where processes share a batch, each raises the loss by its own copies alone; those of the others stay clean.

    Args:
        raises: "loss": the wrapped loss. "hardness": mean ``d(a, p)`` minus mean ``d(a, n)`` over the tuples, or over
            all pairs of the batch where the loss has no tuples; d is the Euclidean distance at unit length. This is the
            triplet loss without its hinge, as in the authors' code.
        tuples_per_anchor: the number of tuples that an anchor keeps, each with copies of its own; 1 in the paper. None:
            all tuples, with one copy of each row.

    Raises:
        InputError: ``raises`` is neither word.
        PlanError: ``tuples_per_anchor`` is no number of tuples.
    """

    roles: tuple[Role, ...] = ROLES

    def __init__(self, raises: str = "loss", tuples_per_anchor: int | None = None) -> None:
        self.raises = check_choice("raises", raises, ("loss", "hardness"))
        self._members = FixedContext(perturb=self.roles, tuples_per_anchor=tuples_per_anchor, keep_clean=False)

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """The members of the tuples are perturbed."""
        name = type(self).__name__
        parameters = signature(wrapped.forward).parameters
        if "ref_emb" in parameters and "indices_tuple" not in parameters:
            raise PlanError(
                f"{name} raises the wrapped loss, and the miner {type(wrapped).__name__} has none; use AdversarialLoss."
            )
        if batch.num_attackable < len(batch):
            raise PlanError(
                f"{name} perturbs positives and negatives, which are in ref_emb, and the inputs of ref_emb are not "
                "known. Compute ref_emb with the watched model and with gradient."
            )
        return self._members.pml_adversarial_plan(wrapped, batch)

    @hookimpl
    def pml_adversarial_score(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
        """The wrapped loss, or the hardness of its tuples; all copies raise it together."""
        return _hardness(wrapped, batch, plan) if self.raises == "hardness" else _Loss(wrapped, batch, plan)


class RAMD(AMD):
    """Revised `AMD`: positives and negatives are perturbed, anchors stay clean.

    ``min max L(a, p + r_p, n + r_n)``, as in the code of arXiv 2106.03614 and 2203.01439; the attack there has no hinge
    (``raises="hardness"``). A row that is also an anchor stays clean as an anchor, and has a copy as a positive or
    negative. Losses that cannot tell the two apart are refused: NCA, classification and proxy losses. The options are
    those of `AMD`.
    """

    roles: tuple[Role, ...] = ("positive", "negative")

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """Positives and negatives are perturbed."""
        plan = super().pml_adversarial_plan(wrapped, batch)
        anchors = plan.pool_indices
        if plan.indices_tuple is not None:
            anchors = anchors[torch.cat(played(plan.indices_tuple, ["anchor"]))]
        if (anchors >= len(batch)).any():
            raise PlanError(
                f"{type(wrapped).__name__} does not tell a row as an anchor from the same row as a positive or "
                "negative, so RAMD cannot keep anchors clean. Use AMD, or a loss of triplets or pairs such as "
                "TripletMarginLoss."
            )
        return plan


class _Loss(OwnLoss):
    """The wrapped loss of all copies. It has no gradient where all tuples are satisfied."""

    may_be_flat = True

    def __call__(self, embeddings: Tensor) -> Tensor:
        with preserved(self.loss):  # a loss with a memory would remember each step of the attack
            return super().__call__(embeddings)


def _hardness(wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
    """A score: mean distance of positive pairs minus that of negative pairs; where there are no such pairs, 0."""
    tuples = tuples_of(plan, wrapped, batch)
    if tuples is None:
        raise PlanError("There are neither labels nor tuples, so hardness is not defined. Use AMD(raises='loss').")
    placed, context = replace(plan, indices_tuple=tuples), at_least_float(batch.context)

    def hardness(embeddings: Tensor) -> Tensor:
        anchor, positive, *other_anchor, negative = placed.members(context, embeddings)
        far, near = distance(anchor, positive), distance((other_anchor or [anchor])[0], negative)
        return far.sum() / max(len(far), 1) - near.sum() / max(len(near), 1)

    return hardness
