"""The package as its own first plugin: the method of arXiv 2102.07265, its answers to all five questions.

The chosen members of the mined tuples are copied and perturbed with the rest of the batch held fixed. The
attack raises an unhinged distance score, since a satisfied hinge has no gradient. The wrapped loss is then
taken on the tuples readdressed to the copies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attacks import adapter, presets
from ..attacks.objective import Attack, AttackFactory, Objective, Score
from ..errors import InputError, PlanError
from ..training.batch import Adversarial, Batch
from ..training.isolation import random_stream
from ..training.loss_support import (
    CallSignature,
    call_signature,
    choice_of,
    finest,
    is_row_separable,
    own_partners,
    own_tuples,
    sees_copies,
    takes_copies,
    with_copies,
    with_own_triplets,
)
from ..training.objectives import OwnLoss, ViolationScore, distance_of, partners_of, unreduced
from ..training.plan import Plan, clean_loss, plan_rows, replace_rows
from ..training.records import STANDARD
from ..training.tuples import ROLES, IndicesTuple, keep_tuples, parse_roles
from .hookspecs import hookimpl

logger = logging.getLogger("pml_adversarial")


class FixedContext:
    """Perturbs roles within a fixed batch context.

    Args:
        attack: a factory, see `attacks`.
        perturb: "anchor", "positive", "negative", several of them, or "all".
        tuples_per_anchor: keep so many tuples per anchor, each with its own copies; None: keep all, with one
            copy per row and role.
        clean_weight: weight of the unperturbed loss.
        keep_clean: whether training sees the clean rows beside the perturbed ones.
        for_miner: whether a miner is wrapped; rows are then replaced wherever they stand, since it names them by place.
    """

    def __init__(
        self,
        attack: AttackFactory = presets.PRESET,
        perturb: str | Iterable[str] = "all",
        tuples_per_anchor: int | None = None,
        clean_weight: float = 0.0,
        keep_clean: bool = True,
        for_miner: bool = False,
    ) -> None:
        adapter.check(attack)
        self.given: dict[str, tuple[str, ...]] = {}
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
        self.clean_weight, self.keep_clean = clean_weight, keep_clean
        self.for_miner = for_miner
        self.in_place = for_miner or (self.roles == ROLES and tuples_per_anchor is None)
        self._addressing: dict[CallSignature, str] = {}
        self._by_row: dict[CallSignature, bool] = {}
        self._sees_copies: dict[CallSignature, bool] = {}

    @hookimpl(trylast=True)
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """The chosen roles of the tuples, as finely as the wrapped loss can tell them apart."""
        self._is_by_row(wrapped, batch)  # what the loss refuses, it refuses before anything is spent
        masks = own_partners(wrapped, batch) if self.in_place and self.roles == ROLES else None
        if masks is not None:
            meeting = (masks[0] | masks[1]).any(1).nonzero().flatten()
            self._check_inputs_known(meeting, batch)
            plan = replace_rows(meeting, len(batch), None).split(batch.num_queries)
        elif (tuples := own_tuples(wrapped, batch)) is None:
            plan = replace_rows(_known(batch), len(batch), None).split(batch.num_queries)
        else:
            if self.tuples_per_anchor is not None:
                tuples = keep_tuples(tuples, self.tuples_per_anchor)
            plan = self._candidates(wrapped, batch, tuples)
        return replace(plan, keeps_clean=self.keep_clean)

    @hookimpl(trylast=True)
    def pml_adversarial_score(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
        """Furthest fixed member of its tuples that shares its label, minus the nearest that does not.

        A loss in which rows do not meet (classification, proxies) has no such members, and without labels they are not
        known: then its own value is raised.
        """
        if self._is_by_row(wrapped, batch):
            return OwnLoss(unreduced(wrapped), batch, plan)
        if batch.labels is None and batch.indices_tuple is None:
            return OwnLoss(wrapped, batch, plan)
        return ViolationScore(distance_of(wrapped), batch.context, *partners_of(plan, wrapped, batch))

    @hookimpl(trylast=True)
    def pml_adversarial_attack(self, objective: Objective, batch: Batch) -> Attack:
        """The attack that was asked for, at the strength of the step."""
        return adapter.build(self.attack, objective, batch.strength)

    @hookimpl(trylast=True)
    def pml_adversarial_training_loss(
        self, wrapped: nn.Module, batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Tensor:
        """The wrapped loss on the tuples readdressed to the copies, and the weighted clean one.

        Where clean rows are kept, it is that of one batch of both. Where rows cannot join it, it is the mean of the two
        losses: copies stand for roles, or without labels a row and its copy would count as different, or the loss fails
        where they are equal or picks only clean ones.
        """
        trained = self._trained_on(plan, wrapped, batch)
        loss: Tensor = trained.evaluate(wrapped, batch, adversarial.embeddings)
        apart = plan.keeps_clean and trained is plan
        if not (apart or self.clean_weight):
            return loss
        clean = clean_loss(wrapped, batch)
        return ((loss + clean) / 2 if apart else loss) + self.clean_weight * clean

    @hookimpl(trylast=True)
    def pml_adversarial_record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> Mapping[str, Any]:
        """How far inputs, embeddings and scores of this process's own copies moved."""
        rows = batch.own(plan.rows, plan.rows)
        if not len(rows):
            return {**dict.fromkeys(STANDARD, 0), "strength": batch.strength}
        change = (adversarial.inputs - batch.inputs_of(rows)).reshape(len(rows), -1).float()
        shift = batch.own(adversarial.embeddings - batch.embeddings[plan.rows], plan.rows).float()
        return {
            "strength": batch.strength,
            "num_perturbed": len(rows),
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
        gets rows replaced. Which one fits is found out once, from the loss itself.
        """
        in_place = plan_rows(tuples, self.roles, len(batch))
        self._check_inputs_known(in_place.rows, batch)
        kept = choice_of(wrapped, batch, tuples, self.tuples_per_anchor is not None)
        in_place = Plan(in_place.rows, in_place.pool_indices, kept).split(batch.num_queries)
        if self.in_place or not len(in_place):
            return in_place
        situation = call_signature(batch)
        if situation not in self._addressing:
            found = finest(wrapped, batch, self.roles, self.tuples_per_anchor)
            if found is not None:
                self._addressing[situation] = found
                logger.debug("%s: copies are %s", type(wrapped).__name__, found)
        plans = with_copies(batch, tuples, self.roles, self.tuples_per_anchor)
        plan = plans.get(self._addressing.get(situation, "in place"))
        if plan is None and self.tuples_per_anchor and len(plans["appended"]) > len(in_place):
            raise PlanError(
                f"{type(wrapped).__name__} does not keep its value when the members of its tuples are copied, so "
                f"tuples_per_anchor={self.tuples_per_anchor} with perturb={self.roles} would train another loss. Use "
                "tuples_per_anchor=None or 1, or perturb='positive'."
            )
        return in_place if plan is None else plan

    def _is_by_row(self, wrapped: nn.Module, batch: Batch) -> bool:
        if self.for_miner:
            return False
        situation = call_signature(batch)
        if situation not in self._by_row:
            with torch.no_grad(), random_stream(0, 0):  # a resumed run asks again, and draws what it would have drawn
                clean_loss(wrapped, batch)
            self._by_row[situation] = is_row_separable(wrapped, batch)
        return self._by_row[situation]

    def _trained_on(self, plan: Plan, wrapped: nn.Module, batch: Batch) -> Plan:
        """The plan that training evaluates: with clean rows beside the perturbed ones, if they are kept and can be."""
        if not (plan.keeps_clean and plan.replaces(len(batch))) or batch.labels is None or _tells_images_apart(batch):
            return plan
        if not takes_copies(wrapped, 2 * batch.num_queries):
            return plan
        situation = call_signature(batch)
        if situation not in self._sees_copies:
            self._sees_copies[situation] = sees_copies(wrapped, batch)
        if not self._sees_copies[situation]:
            return plan
        return with_own_triplets(plan.beside_clean(len(batch)), wrapped, batch)

    def _check_inputs_known(self, rows: Tensor, batch: Batch) -> None:
        if batch.num_attackable < len(batch) and len(rows) and int(rows.max()) >= batch.num_attackable:
            raise PlanError(
                f"perturb={self.roles} names members that stand in ref_emb, which no watched model produced with "
                "gradient; only anchors have known inputs. Use perturb='anchor', or compute ref_emb with the watched "
                "model."
            )


def _tells_images_apart(batch: Batch) -> bool:
    """Whether queries have positives in the reference alone, as two views of images have; a copy would be a third."""
    queries = cast(Tensor, batch.labels)[: batch.num_queries]
    return batch.num_queries < len(batch) and (batch.shared_labels or len(queries.unique()) == len(queries))


def _known(batch: Batch) -> Tensor:
    return torch.arange(batch.num_attackable, device=batch.embeddings.device)
