"""AMD and RAMD: min-max training, the adversary raises the wrapped loss itself."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor, nn

from ..attacks.objective import Score
from ..errors import InputError, PlanError
from ..plugins.fixed_context import FixedContext
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.isolation import preserved
from ..training.numeric import at_least_float
from ..training.objectives import OwnLoss, tuples_of
from ..training.plan import Plan
from ..training.tuples import ROLES, Role
from .triplets import distance

_RAISED = ("loss", "hardness")


class AMD:
    """Adversarial training of Madry et al. (ICLR 2018, arXiv 1706.06083), adapted to metric learning.

    ``min max L(a + r_a, p + r_p, n + r_n)``: all members move, jointly, so that the wrapped loss rises, and the loss
    is taken on what they became (Zhou and Patel, arXiv 2203.01439, supplement, "Min-max Adversarial Training with
    Triplet Loss"). The authors find that it collapses easily.

    The paper has one triplet per anchor, with images of its own: ``tuples_per_anchor=1``. By default all tuples are
    kept and each row moves as one wherever it stands, which any loss can do: of triplets, pairs, neither, or proxies.

    A satisfied hinge has no gradient. Copies of satisfied tuples stay where the attack starts them; where all are
    satisfied and the attack starts at the clean inputs, nothing moves, and the step is a clean one
    (``perturbation_linf`` is 0). A random start, which Madry et al. use, may find a way. What is raised is the value
    of the loss with its reducer: PML's `AvgNonZeroReducer` averages over violated tuples, so it can fall as more are
    violated; `MeanReducer` is the paper's. The authors' code has no hinge in the adversary: ``raises="hardness"``.

    Processes may share a batch; then each raises the loss by its own copies alone, the others' at their clean
    embeddings.

    Args:
        raises: "loss": the wrapped loss. "hardness": mean ``d(a, p)`` minus mean ``d(a, n)`` of the tuples, or of the
            batch's pairs where the loss has none, ``d`` Euclidean at unit length: the triplet loss without hinge.
        tuples_per_anchor: so many tuples of each anchor, each with copies of its own. It counts in place of the
            wrapper's, as ``perturb`` does not count.
    """

    roles: tuple[Role, ...] = ROLES

    def __init__(self, raises: str = "loss", tuples_per_anchor: int | None = None) -> None:
        if raises not in _RAISED:
            raise InputError(f"raises={raises!r}; expected {' or '.join(map(repr, _RAISED))}.")
        self.raises = raises
        self._members = FixedContext(perturb=self.roles, tuples_per_anchor=tuples_per_anchor, keep_clean=False)

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """The members of the tuples.

        Raises:
            PlanError: a miner is wrapped, or inputs of members are not known.
        """
        name = type(self).__name__
        parameters = signature(wrapped.forward).parameters
        if "ref_emb" in parameters and "indices_tuple" not in parameters:
            raise PlanError(
                f"{name} raises the wrapped loss, and {type(wrapped).__name__} is a miner; expected "
                f"AdversarialLoss(loss, model, plugins=[{name}])."
            )
        if batch.num_attackable < len(batch):
            raise PlanError(
                f"{name} perturbs positives and negatives, which stand in ref_emb, and no watched model produced that; "
                "expected a reference that the watched model computed with gradient."
            )
        return self._members.pml_adversarial_plan(wrapped, batch)

    @hookimpl
    def pml_adversarial_score(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
        """What all copies raise together: the wrapped loss, or the hardness of its tuples."""
        return _hardness(wrapped, batch, plan) if self.raises == "hardness" else _Loss(wrapped, batch, plan)


class RAMD(AMD):
    """`AMD` revised: positives and negatives move, anchors stay clean.

    ``min max L(a, p + r_p, n + r_n)``, as the code of arXiv 2106.03614 and 2203.01439 has it (there without hinge in
    the adversary, ``raises="hardness"``). A row that is an anchor as well stays clean as an anchor and has a copy as a
    positive or negative. Losses that cannot tell the two apart, such as NCA, classification and proxy losses, are
    refused.

    Args:
        raises: as in `AMD`.
        tuples_per_anchor: as in `AMD`.
    """

    roles: tuple[Role, ...] = ("positive", "negative")

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """Copies of positives and negatives.

        Raises:
            PlanError: as in `AMD`, or the loss cannot leave anchors clean.
        """
        plan = super().pml_adversarial_plan(wrapped, batch)
        anchors = plan.pool_indices if plan.indices_tuple is None else plan.pool_indices[_anchors(plan.indices_tuple)]
        if (anchors >= len(batch)).any():
            raise PlanError(
                f"{type(wrapped).__name__} does not tell a row as an anchor from the same row as a positive or "
                "negative, so RAMD cannot keep anchors clean. Use AMD, or a loss of triplets or pairs such as "
                "TripletMarginLoss."
            )
        return plan


class _Loss:
    """The wrapped loss of all copies; it is flat where all tuples are satisfied."""

    may_be_flat = True

    def __init__(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> None:
        self.wrapped, self.own_loss = wrapped, OwnLoss(wrapped, batch, plan)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``(M, D)`` -> a scalar."""
        with preserved(self.wrapped):  # a loss with a memory would remember each step of the attack
            return self.own_loss(embeddings)


def _anchors(indices_tuple: tuple[Tensor, ...]) -> Tensor:
    return indices_tuple[0] if len(indices_tuple) == 3 else torch.cat(indices_tuple[::2])


def _hardness(wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
    """Mean distance of positive pairs minus that of negative ones; a kind that there is none of counts 0."""
    tuples = tuples_of(plan, wrapped, batch)
    if tuples is None:
        raise PlanError("There are neither labels nor tuples, so no hardness; use AMD(raises='loss').")
    placed, context = replace(plan, indices_tuple=tuples), at_least_float(batch.context)

    def hardness(embeddings: Tensor) -> Tensor:
        anchor, positive, *other_anchor, negative = placed.members(context, embeddings)
        far, near = distance(anchor, positive), distance((other_anchor or [anchor])[0], negative)
        return far.sum() / max(len(far), 1) - near.sum() / max(len(near), 1)

    return hardness
