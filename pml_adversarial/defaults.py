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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
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

logger = logging.getLogger("pml_adversarial")


class FixedContext:
    """Perturbs roles within a fixed batch context.

    Args:
        attack: a factory, see `attacks`.
        perturb: "anchor", "positive", "negative", several of them, or "all".
        tuples_per_anchor: keep so many tuples per anchor, each with its own copies; None: keep all, with one
            copy per row and role.
        clean_weight: weight of the unperturbed loss.
        in_place: replace rows wherever they stand, whatever the loss could tell apart.
    """

    def __init__(
        self,
        attack: AttackFactory = attacks.SEED_PAPER,
        perturb: str | Iterable[str] = "positive",
        tuples_per_anchor: int | None = None,
        clean_weight: float = 0.0,
        in_place: bool = False,
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
        self.in_place = in_place or (self.roles == ROLES and tuples_per_anchor is None)
        self._addressing: dict[tuple[bool, ...], str] = {}

    @hookimpl(trylast=True)
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """The chosen roles of the tuples, as finely as the wrapped loss can tell them apart."""
        tuples = own_tuples(wrapped, batch)
        if tuples is None:
            return replace_rows(_attackable(batch), len(batch), None).split(batch.num_queries)
        if self.tuples_per_anchor is not None:
            tuples = keep_tuples(tuples, self.tuples_per_anchor)
        self._check_inputs_known(tuples, batch)
        return self._candidates(wrapped, batch, tuples)

    @hookimpl(trylast=True)
    def pml_adversarial_score(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
        """Furthest fixed member of its tuples that shares its label, minus the nearest that does not."""
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
        """How far inputs, embeddings and scores moved."""
        change = (adversarial.inputs - batch.inputs[plan.rows]).flatten(1).float()
        shift = (adversarial.embeddings - batch.embeddings[plan.rows]).detach().float()
        return {
            "strength": batch.strength,
            "num_perturbed": len(plan),
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
        kept = tuples if self._explicit(wrapped, batch) else batch.indices_tuple
        in_place = plan_rows(tuples, self.roles, len(batch))
        in_place = Plan(in_place.rows, in_place.layout, kept).split(batch.num_queries)
        if self.in_place or not len(in_place):
            return in_place
        appended = (plan_tuples if self.tuples_per_anchor else plan_roles)(tuples, self.roles, len(batch))
        untouched = _untouched(batch, kept)
        plans: dict[str, Plan | None] = {"reference": appended.by_reference(len(batch), batch.num_queries)}
        if batch.num_queries == len(batch):
            plans = {"appended": appended, **plans}
        situation = (batch.indices_tuple is None, batch.num_queries < len(batch), batch.shared_labels)
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

    def _explicit(self, wrapped: nn.Module, batch: Batch) -> bool:
        chosen_here = self.tuples_per_anchor is not None or _triplets_per_anchor(wrapped) is not None
        return batch.indices_tuple is not None or chosen_here

    def _check_inputs_known(self, tuples: IndicesTuple, batch: Batch) -> None:
        known = len(batch.inputs)
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
        with _exactly(embeddings):  # in mixed precision, close embeddings would all have the same distance
            distances: Tensor = self.distance(_at_least_float(embeddings), _at_least_float(self.context))
        if self.distance.is_inverted:
            distances = -distances
        furthest = distances.masked_fill(self.not_same, -torch.inf).amax(1)
        nearest = distances.masked_fill(self.not_different, torch.inf).amin(1)
        return _or_zero(furthest, self.not_same.all(1)) - _or_zero(nearest, self.not_different.all(1))


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
    """``(M, N)`` masks of each copy's fixed partners of its own and of other labels.

    Without tuples a copy's only partner is its own row, from which it is led away.
    """
    tuples = plan.indices_tuple
    if tuples is None:
        tuples = own_tuples(wrapped, batch)
        if tuples is None:
            own_row = nn.functional.one_hot(plan.rows, len(batch)).bool()
            return own_row, torch.zeros_like(own_row)
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


def _untouched(batch: Batch, tuples: IndicesTuple | None) -> Plan:
    nobody = torch.empty(0, dtype=torch.long, device=batch.embeddings.device)
    return replace_rows(nobody, len(batch), tuples).split(batch.num_queries)


def _attackable(batch: Batch) -> Tensor:
    return torch.arange(len(batch.inputs), device=batch.embeddings.device)


def _exactly(embeddings: Tensor) -> AbstractContextManager[Any]:
    kind = embeddings.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _at_least_float(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _or_zero(values: Tensor, missing: Tensor) -> Tensor:
    return torch.where(missing, torch.zeros_like(values), values)


def _triplets_per_anchor(wrapped: nn.Module) -> int | str | None:
    found = (getattr(module, "triplets_per_anchor", None) for module in wrapped.modules())
    return next((value for value in found if value is not None), None)


def _same_value(wrapped: nn.Module, batch: Batch, untouched: Plan, plan: Plan) -> bool:
    """Whether the loss gives one value for both plans while nothing is perturbed.

    The plan gets a bystander, since a loss that looks at rows that its tuples do not name would look at rows and
    their copies at once. Asked of copies of the loss, in double precision on the CPU, where an index out of
    range is an exception and not the end of the process.
    """
    plan = plan.with_bystander(len(batch)).to("cpu")
    generator = torch.Generator().manual_seed(0)
    shape = (len(batch) + 1, batch.embeddings.shape[1])
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5
    clean, bystander = drawn[:-1], drawn[-1:]
    drawn_batch = replace(batch, embeddings=clean, labels=None if batch.labels is None else batch.labels.cpu())

    def value(of: Plan, copies: Tensor) -> Tensor:
        loss = copy.deepcopy(wrapped).cpu().double()
        return torch.as_tensor(of.evaluate(loss, drawn_batch, copies), dtype=torch.float64)

    try:
        expected = value(untouched.to("cpu"), clean[:0])
        found = value(plan, torch.cat([clean[plan.rows[:-1]], bystander]))
    except Exception as error:  # whatever a loss raises at arguments that it does not take
        logger.debug("%s refuses a plan: %r", type(wrapped).__name__, error)
        return False
    return bool(torch.isclose(expected, found, rtol=1e-9, atol=0))
