"""The package as its own first plugin: the method of arXiv 2102.07265, its answers to all five questions.

The chosen members of the mined tuples are copied and perturbed with the rest of the batch held fixed. The
attack raises an unhinged distance score, since a satisfied hinge has no gradient. The wrapped loss is then
taken on the tuples readdressed to the copies.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import DoNothingReducer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from . import attacks
from .attacks import Attack, AttackFactory
from .batch import Adversarial, Batch, IndicesTuple
from .errors import InputError, PlanError
from .hookspecs import hookimpl
from .objective import Objective, Score
from .plan import (
    ROLES,
    Plan,
    keep_tuples,
    parse_roles,
    plan_roles,
    plan_rows,
    plan_tuples,
    replace_rows,
    shift_partners,
)
from .records import STANDARD

logger = logging.getLogger("pml_adversarial")


class FixedContext:
    """Perturbs roles within a fixed batch context.

    Args:
        attack: a factory, see `attacks`.
        perturb: "anchor", "positive", "negative", several of them, or "all".
        tuples_per_anchor: keep so many tuples per anchor, each with its own copies; None: keep all, with one
            copy per row and role.
        clean_weight: weight of the unperturbed loss.
        for_miner: whether a miner is wrapped; rows are then replaced wherever they stand, since it names them by place.
    """

    def __init__(
        self,
        attack: AttackFactory = attacks.SEED_PAPER,
        perturb: str | Iterable[str] = "positive",
        tuples_per_anchor: int | None = None,
        clean_weight: float = 0.0,
        for_miner: bool = False,
    ) -> None:
        attacks.check(attack)
        self.attack = attack
        self.roles = parse_roles(perturb)
        if tuples_per_anchor is not None and not (isinstance(tuples_per_anchor, int) and tuples_per_anchor >= 1):
            raise PlanError(
                f"tuples_per_anchor={tuples_per_anchor!r}; expected a whole number from 1 on, or None to keep all "
                "tuples."
            )
        if not (isinstance(clean_weight, int | float) and 0 <= clean_weight < math.inf):
            raise InputError(f"clean_weight={clean_weight!r}; expected a number from 0 on.")
        self.tuples_per_anchor = tuples_per_anchor
        self.clean_weight = clean_weight
        self.for_miner = for_miner
        self.in_place = for_miner or (self.roles == ROLES and tuples_per_anchor is None)
        self._addressing: dict[Situation, str] = {}
        self._rows_apart: dict[Situation, bool] = {}

    @hookimpl(trylast=True)
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """The chosen roles of the tuples, as finely as the wrapped loss can tell them apart."""
        self._sees_rows_apart(wrapped, batch)  # what the loss refuses, it refuses before anything is spent
        tuples = own_tuples(wrapped, batch)
        if tuples is None:
            return replace_rows(_attackable(batch), len(batch), None).split(batch.num_queries)
        if self.tuples_per_anchor is not None:
            tuples = keep_tuples(tuples, self.tuples_per_anchor)
        self._check_inputs_known(tuples, batch)
        return self._candidates(wrapped, batch, tuples)

    @hookimpl(trylast=True)
    def pml_adversarial_score(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
        """Furthest fixed member of its tuples that shares its label, minus the nearest that does not.

        A loss in which rows do not meet (classification, proxies) has no such members, and without labels they are not
        known: then its own value is raised.
        """
        if self._sees_rows_apart(wrapped, batch):
            return OwnLoss(_unreduced(wrapped), batch, plan)
        if batch.labels is None and batch.indices_tuple is None:
            return OwnLoss(wrapped, batch, plan)
        return ViolationScore(distance_of(wrapped), batch.context, *partners_of(plan, wrapped, batch))

    @hookimpl(trylast=True)
    def pml_adversarial_attack(self, objective: Objective, batch: Batch) -> Attack:
        """The attack that was asked for, at the strength of the step."""
        return attacks.build(self.attack, objective, batch.strength)

    @hookimpl(trylast=True)
    def pml_adversarial_training_loss(
        self, wrapped: Callable[..., Tensor], batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Tensor:
        """The wrapped loss on the tuples readdressed to the copies, and the weighted clean one."""
        loss: Tensor = plan.evaluate(wrapped, batch, adversarial.embeddings)
        return loss + self.clean_weight * clean_loss(wrapped, batch) if self.clean_weight else loss

    @hookimpl(trylast=True)
    def pml_adversarial_record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> Mapping[str, Any]:
        """How far inputs, embeddings and scores of this process's own copies moved."""
        own = batch.own(plan.rows)
        if not len(own):
            return {**dict.fromkeys(STANDARD, 0), "strength": batch.strength}
        change = (adversarial.inputs - batch.inputs_of(plan.rows[own])).flatten(1).float()
        shift = (adversarial.embeddings[own] - batch.embeddings[plan.rows[own]]).detach().float()
        return {
            "strength": batch.strength,
            "num_perturbed": len(own),
            "perturbation_linf": change.abs().max(),
            "perturbation_l2": change.norm(dim=1).mean(),
            "embedding_shift": shift.norm(dim=1).mean(),
            "share_score_rose": (adversarial.score_after > adversarial.score_before).float().mean(),
            "share_zero_gradient": adversarial.zero_gradient.float().mean(),
            "attack_seconds": adversarial.seconds,
        }

    def _candidates(self, wrapped: nn.Module, batch: Batch, tuples: IndicesTuple) -> Plan:
        """The finest plan that the wrapped loss evaluates to its own value when nothing is perturbed.

        Copies are appended and tuples readdressed (seed paper); a loss that averages over rows gets copies as
        reference embeddings, so that the number of rows stays; a loss that cannot tell tuples apart
        gets rows replaced. Which one fits is found out once, on random embeddings, from the loss itself.
        """
        chosen_here = self.tuples_per_anchor is not None or isinstance(_triplets_per_anchor(wrapped), int)
        kept = tuples if chosen_here else batch.indices_tuple  # a loss that chooses at random would choose anew
        in_place = plan_rows(tuples, self.roles, len(batch))
        in_place = Plan(in_place.rows, in_place.layout, kept).split(batch.num_queries)
        if self.in_place or not len(in_place):
            return in_place
        appended = (plan_tuples if self.tuples_per_anchor else plan_roles)(tuples, self.roles, len(batch))
        untouched = _untouched(batch, kept)
        plans: dict[str, Plan | None] = {"reference": appended.by_reference(len(batch), batch.num_queries)}
        if batch.num_queries == len(batch):
            plans = {"appended": appended, **plans}
        situation = _situation(batch)
        if situation not in self._addressing:
            fitting = (
                n for n, plan in plans.items() if plan is not None and _same_value(wrapped, batch, untouched, plan)
            )
            self._addressing[situation] = next(fitting, "in place")
            logger.debug("%s: copies are %s", type(wrapped).__name__, self._addressing[situation])
        plan = plans.get(self._addressing[situation])
        if plan is None and self.tuples_per_anchor and len(appended) > len(in_place):
            raise PlanError(
                f"{type(wrapped).__name__} does not keep its value when the members of its tuples are copied, so "
                f"tuples_per_anchor={self.tuples_per_anchor} with perturb={self.roles} would train another loss. Use "
                "tuples_per_anchor=None or 1, or perturb='positive'."
            )
        return in_place if plan is None else plan

    def _sees_rows_apart(self, wrapped: nn.Module, batch: Batch) -> bool:
        if self.for_miner:
            return False
        situation = _situation(batch)
        if situation not in self._rows_apart:
            with torch.no_grad():
                clean_loss(wrapped, batch)
            self._rows_apart[situation] = _is_sum_over_rows(wrapped, batch)
        return self._rows_apart[situation]

    def _check_inputs_known(self, tuples: IndicesTuple, batch: Batch) -> None:
        known = batch.num_attackable
        if (
            known < len(batch)
            and len(played := plan_rows(tuples, self.roles, len(batch)))
            and int(played.rows.max()) >= known
        ):
            raise PlanError(
                f"perturb={self.roles} names members that stand in ref_emb, which no watched model produced with "
                "gradient; only anchors have known inputs. Use perturb='anchor', or compute ref_emb with the watched "
                "model."
            )


class ViolationScore:
    """How badly each copy stands among its fixed partners: furthest of its own label minus nearest of the others.

    Unhinged, so that it has a gradient where the loss is satisfied. The two partners are chosen anew in every
    step; with one tuple per copy there is no choice, and it is the objective of arXiv 2102.07265.

    Args:
        distance: PML's distance; a similarity counts with the opposite sign.
        context: ``(N, D)`` clean embeddings, fixed.
        same: ``(M, N)`` bool, partners of the copy's own label, see `Plan.partners`.
        different: ``(M, N)`` bool, partners of other labels.
    """

    def __init__(self, distance: BaseDistance, context: Tensor, same: Tensor, different: Tensor) -> None:
        self.distance, self.context = distance, context
        self.not_same, self.not_different = ~same, ~different

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Scores of the embeddings, ``(M, D) -> (M,)``; a kind of partner that a copy lacks counts 0."""
        distances: Tensor = self.distance(embeddings, self.context)
        if self.distance.is_inverted:
            distances = -distances
        furthest = distances.masked_fill(self.not_same, -torch.inf).amax(1)
        nearest = distances.masked_fill(self.not_different, torch.inf).amin(1)
        return _or_zero(furthest, self.not_same.all(1)) - _or_zero(nearest, self.not_different.all(1))


class OwnLoss:
    """The wrapped loss itself, of the copies in their places, with everything else fixed.

    Args:
        loss: the wrapped loss, or one that gives PML's dict of losses before they are reduced; then each copy's score
            is what its row contributes, where the loss tells it.
        batch: gives the fixed rows, ``batch.context``.
        plan: where the copies stand.
    """

    def __init__(self, loss: nn.Module, batch: Batch, plan: Plan) -> None:
        self.loss, self.batch, self.plan = loss, replace(batch, embeddings=batch.context), plan
        stands = (plan.layout >= len(batch)).nonzero().flatten()
        self.position = torch.empty_like(plan.rows).scatter_(0, plan.layout[stands] - len(batch), stands)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """The score of embeddings ``(M, D)``: per copy, ``(M,)``, or of all together, ``()``."""
        found: Any = self.plan.evaluate(self.loss, self.batch, embeddings)
        if isinstance(found, Tensor):
            return found
        told = [part["losses"] for part in found.values() if part["reduction_type"] == "element"]
        if told:
            return sum(told)[self.position]
        return sum(part["losses"] for part in found.values())


def own_tuples(wrapped: nn.Module, batch: Batch) -> IndicesTuple | None:
    """The caller's tuples, or the loss's own pairs or triplets, over the rows of the batch; None without labels."""
    if batch.indices_tuple is not None or batch.labels is None:
        return batch.indices_tuple
    labels, ref_labels = batch.labels[: batch.num_queries], batch.labels[batch.num_queries :]
    reference = labels if batch.shared_labels else ref_labels if len(ref_labels) else None
    limit = _triplets_per_anchor(wrapped)
    if limit is None:
        tuples = lmu.get_all_pairs_indices(labels, reference)
    else:
        tuples = lmu.convert_to_triplets(None, labels, reference, t_per_anchor=limit)
    return tuples if reference is None else shift_partners(tuples, batch.num_queries)


def partners_of(plan: Plan, wrapped: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """``(M, N)`` masks of each copy's fixed partners of its own and of other labels."""
    tuples = plan.indices_tuple
    if tuples is None:
        tuples = cast(IndicesTuple, own_tuples(wrapped, batch))
        if plan.ref_layout is not None:
            tuples = shift_partners(tuples, -batch.num_queries)
    return plan.partners(tuples, len(batch))


def distance_of(wrapped: nn.Module) -> BaseDistance:
    """The distance that the loss or miner uses; Euclidean on the unit sphere where it has none."""
    return next((m for m in wrapped.modules() if isinstance(m, BaseDistance)), None) or LpDistance()


def clean_loss(wrapped: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The wrapped loss on the unperturbed batch, with gradient, as the caller would have had it."""
    loss: Tensor = _untouched(batch, batch.indices_tuple).evaluate(wrapped, batch, batch.embeddings[:0])
    return loss


Situation = tuple[bool, ...]
"""How a loss is called: with tuples, with a reference, with one tensor for the labels of both."""


def _situation(batch: Batch) -> Situation:
    return batch.indices_tuple is None, batch.num_queries < len(batch), batch.shared_labels


def _unreduced(wrapped: nn.Module) -> nn.Module:
    """The same loss, parameters and all, that gives PML's dict of losses before they are reduced to one."""
    if not isinstance(wrapped, BaseMetricLossFunction):
        return wrapped
    view = copy.copy(wrapped)
    view._modules = {**wrapped._modules, "reducer": DoNothingReducer()}
    return view


def _untouched(batch: Batch, tuples: IndicesTuple | None) -> Plan:
    nobody = torch.empty(0, dtype=torch.long, device=batch.embeddings.device)
    return replace_rows(nobody, len(batch), tuples).split(batch.num_queries)


def _attackable(batch: Batch) -> Tensor:
    return torch.arange(batch.num_attackable, device=batch.embeddings.device)


def _or_zero(values: Tensor, missing: Tensor) -> Tensor:
    return torch.where(missing, torch.zeros_like(values), values)


def _triplets_per_anchor(wrapped: nn.Module) -> int | str | None:
    return getattr(wrapped, "triplets_per_anchor", None)


def _same_value(wrapped: nn.Module, batch: Batch, untouched: Plan, plan: Plan) -> bool:
    """Whether the loss gives one value for both plans while nothing is perturbed.

    Also with a bystander in the plan, since a loss that looks at rows that its tuples do not name would look at rows
    and their copies at once.
    """
    clean, bystander = _drawn(batch, 1)
    copies = clean[plan.rows.cpu()]
    try:
        expected = _value(wrapped, batch, untouched, clean, clean[:0])
        alone = _value(wrapped, batch, plan, clean, copies)
        attended = _value(wrapped, batch, plan.with_bystander(len(batch)), clean, torch.cat([copies, bystander]))
    except Exception as error:  # whatever a loss raises at arguments that it does not take
        logger.debug("%s refuses a plan: %r", type(wrapped).__name__, error)
        return False
    return all(torch.isclose(expected, found, rtol=1e-9, atol=0) for found in (alone, attended))


def _is_sum_over_rows(wrapped: nn.Module, batch: Batch) -> bool:
    """Whether the loss is a sum of what each row contributes on its own.

    Then what two parts of the batch change, each alone, adds up to what they change together. The batch is parted by
    each bit of the row number, so that any two rows are in different parts once.
    """
    noise, moved = _drawn(batch, len(batch))
    clean = torch.ones_like(noise) + noise  # near each other, so that no margin keeps them from being compared
    untouched, number = _untouched(batch, batch.indices_tuple), torch.arange(len(batch))

    def change(part: Tensor) -> Tensor:
        return _value(wrapped, batch, untouched, torch.where(part[:, None], moved, clean), clean[:0]) - before

    try:
        before = _value(wrapped, batch, untouched, clean, clean[:0])
        together = change(number >= 0)
        parts = (number >> bit & 1 == 1 for bit in range((len(batch) - 1).bit_length()))
        sums = (change(part) + change(~part) for part in parts)
        return bool(together != 0) and all(torch.isclose(found, together, rtol=1e-9, atol=0) for found in sums)
    except Exception as error:  # a loss of the user's that cannot be copied, or moved
        logger.debug("%s cannot be asked whether it sees rows apart: %r", type(wrapped).__name__, error)
        return False


def _drawn(batch: Batch, more: int) -> tuple[Tensor, Tensor]:
    """Random embeddings: of the batch's rows, and of some more."""
    shape = (len(batch) + more, batch.embeddings.shape[1])
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / shape[1] ** 0.5
    return drawn[: len(batch)], drawn[len(batch) :]


def _value(wrapped: nn.Module, batch: Batch, plan: Plan, clean: Tensor, copies: Tensor) -> Tensor:
    """What a copy of the loss says, in double precision on the CPU: there a wrong index is only an exception."""
    loss = copy.deepcopy(wrapped).cpu().double()
    batch = replace(batch, embeddings=clean, labels=None if batch.labels is None else batch.labels.cpu())
    return torch.as_tensor(plan.to("cpu").evaluate(loss, batch, copies), dtype=torch.float64)
