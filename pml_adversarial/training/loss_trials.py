"""Asks a loss that `loss_support` does not know what it can take, by experiment.

A copy of the loss is evaluated on batches of random embeddings, in double precision on the CPU, where an index out of
range is an exception and not the end of the process.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from .batch import Batch
from .isolation import random_stream
from .loss_support import Copies
from .loss_tuples import own_tuples, tuples_to_give
from .plan import Plan, plan_roles, plan_tuples, replace_rows, untouched
from .tuples import IndicesTuple, keep_tuples, shift_partners

_UNEQUAL, _TWO, _BLOCKS = [0, 1, 0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]
"""Classes of small trial batches: of unequal sizes, as with equal ones a loss may have one value for every plan; for
losses that know two classes; for those that want blocks."""


class LossTrials:
    """The experiments with one loss, which is called as with the real ``batch``.

    Attributes:
        batch: the trial batch on which the loss has a value: a small one, or else one with the labels and the tuples of
            the real one; None if there is none.
        error: what the loss raised last, or "NaN"; None if it had a value each time.
    """

    def __init__(self, wrapped: nn.Module, batch: Batch) -> None:
        self.error: Exception | str | None = None
        self._loss = copy.deepcopy(wrapped).cpu().double()
        with random_stream(0, 0):
            trials = *(_trial_batch(batch, classes) for classes in (_UNEQUAL, _TWO, _BLOCKS)), _like(batch)
        self.batch = next((t for t in trials if not self._value(t, untouched(t, t.indices_tuple)).isnan()), None)

    def takes_tuples(self) -> bool:
        """Whether the loss has a value with tuples."""
        if self.batch is None:
            return False
        tuples = own_tuples(self._loss, self.batch)
        return tuples is not None and not self._value(self.batch, untouched(self.batch, tuples)).isnan()

    def copies(self, roles: tuple[str, ...], tuples_per_anchor: int | None) -> Copies | None:
        """How copies may stand for these roles; None if the loss has no value on the trial batches."""
        if self.batch is None:
            return None
        if own_tuples(self._loss, self.batch) is None:
            return "replace"
        finest: Copies = "append" if self.batch.num_queries == self.batch.num_rows else "reference"
        for copies in dict.fromkeys((finest, "reference")):
            if self.keeps_value(copies, roles, tuples_per_anchor) and self.counts(copies, roles, tuples_per_anchor):
                return copies
        return "replace"

    def keeps_value(self, copies: Copies, roles: tuple[str, ...], tuples_per_anchor: int | None) -> bool:
        """Whether the loss keeps its value while copies stand so and nothing is perturbed.

        Also with one more copy that no tuple names: a loss may look at rows beyond its tuples.
        """
        trial, given, plan = self._planned(copies, roles, tuples_per_anchor)
        if plan is None:
            return False
        expected = self._value(trial, untouched(trial, given))
        attended = torch.cat([trial.embeddings[plan.rows], self._elsewhere(1)])
        found = self._value(trial, plan), self._value(trial, plan.with_bystander(trial.num_rows), attended)
        return all(torch.allclose(expected, value, rtol=1e-9, atol=0) for value in found)

    def counts(self, copies: Copies, roles: tuple[str, ...], tuples_per_anchor: int | None) -> bool:
        """Whether the loss has another value once the copies move."""
        trial, _, plan = self._planned(copies, roles, tuples_per_anchor)
        if plan is None:
            return False
        return _differ(self._value(trial, plan), self._value(trial, plan, self._elsewhere(len(plan))))

    def _planned(
        self, copies: Copies, roles: tuple[str, ...], tuples_per_anchor: int | None
    ) -> tuple[Batch, IndicesTuple | None, Plan | None]:
        """The trial batch, the tuples that the loss is given without copies, and the plan with copies, or None."""
        trial = cast(Batch, self.batch)
        with random_stream(0, 0):
            tuples = cast(IndicesTuple, own_tuples(self._loss, trial))
            if tuples_per_anchor is not None:
                tuples = keep_tuples(tuples, tuples_per_anchor)
        given = tuples_to_give(self._loss, trial, tuples, tuples_per_anchor is not None)
        return trial, given, with_copies(trial, tuples, roles, tuples_per_anchor).get(copies)

    def _elsewhere(self, rows: int) -> Tensor:
        with random_stream(0, 1):
            return torch.randn(rows, cast(Batch, self.batch).embeddings.shape[1], dtype=torch.float64)

    def is_row_separable(self) -> bool:
        """Whether the loss is a sum of what each row contributes alone.

        Then what two parts of a batch change, each alone, adds up to what both change together. Each bit of the row
        number parts the trial batch once, so that any two rows are once in different parts.
        """
        if self.batch is None:
            return False
        trial, number = self.batch, torch.arange(self.batch.num_rows)
        with random_stream(0, 0):
            moved = torch.randn_like(trial.embeddings)
        near = torch.ones_like(moved) + trial.embeddings  # rows near each other, so that no margin leaves a pair out

        def value(part: Tensor) -> Tensor:
            rows = replace(trial, embeddings=torch.where(part[:, None], moved, near))
            return self._value(rows, untouched(rows, trial.indices_tuple))

        before = value(number < 0)
        together = value(number >= 0) - before
        parts = (number >> bit & 1 == 1 for bit in range((trial.num_rows - 1).bit_length()))
        sums = (value(part) - before + value(~part) - before for part in parts)
        return bool(together != 0) and all(torch.isclose(found, together, rtol=1e-9, atol=0) for found in sums)

    def takes_copies_beside_clean(self) -> bool:
        """Whether one batch may hold rows and their copies.

        The copies count, also of rows that are not alone in their class; the order of the rows does not matter, where
        the loss forms its own tuples; and there is a finite gradient where a copy equals its row.
        """
        trial = self.batch
        if trial is None or trial.labels is None:
            return False
        with random_stream(0, 0):
            once, again = torch.randn_like(trial.embeddings), torch.randn_like(trial.embeddings)
            order = torch.randperm(2 * trial.num_rows)
        same = trial.labels[:, None] == trial.labels
        in_company = (same.sum(1) > trial.num_rows // trial.num_queries)[:, None]
        plan = replace_rows(torch.arange(trial.num_rows), trial.num_rows, trial.indices_tuple).split(trial.num_queries)
        plan = plan.beside_clean(trial.num_rows)
        value = self._value(trial, plan, once)
        if not _differ(value, self._value(trial, plan, torch.where(in_company, again, once))):
            return False
        if plan.indices_tuple is None and plan.ref_pool_indices is None:
            shuffled = self._value(trial, replace(plan, pool_indices=plan.pool_indices[order]), once)
            if not torch.allclose(shuffled, value, rtol=1e-9, atol=0):
                return False
        axes = torch.eye(trial.embeddings.shape[1], dtype=torch.float64)  # whose product with themselves is exactly 1
        rows = axes[torch.arange(trial.num_rows) % len(axes)]
        copies = rows.clone().requires_grad_()
        value = self._value(replace(trial, embeddings=rows), plan, copies)
        if not value.isfinite() or not value.requires_grad:
            return False
        return bool(torch.autograd.grad(value, copies)[0].isfinite().all())

    def _value(self, trial: Batch, plan: Plan, copies: Tensor | None = None) -> Tensor:
        """What the loss gives, with copies of rows unperturbed unless given; NaN where it raises."""
        shared = {id(parameter): parameter for parameter in self._loss.parameters()}
        loss = copy.deepcopy(self._loss, shared)  # it may remember what it has seen
        copies = trial.embeddings[plan.rows] if copies is None else copies
        try:
            with random_stream(0, 0), torch.set_grad_enabled(copies.requires_grad):
                value = torch.as_tensor(plan.evaluate(loss, trial, copies), dtype=torch.float64)
        except Exception as error:  # a loss may raise anything at arguments that it does not take
            self.error = error
            return torch.tensor(torch.nan, dtype=torch.float64)
        if value.isnan():
            self.error = "NaN"
        return value


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether both are numbers, and not the same one."""
    return bool((one - other).abs() > 0)


def with_copies(
    batch: Batch, tuples: IndicesTuple, roles: tuple[str, ...], tuples_per_anchor: int | None
) -> dict[Copies, Plan]:
    """The plans in which copies stand beside their rows, without what `Plan.by_reference` does not have."""
    appended = (plan_tuples if tuples_per_anchor else plan_roles)(tuples, roles, batch.num_rows)
    by_reference = appended.by_reference(batch.num_rows, batch.num_queries)
    return {"append": appended} if by_reference is None else {"append": appended, "reference": by_reference}


def _like(batch: Batch) -> Batch:
    """Random embeddings with the labels and the tuples of the batch."""
    rows, dimensions = batch.embeddings.shape
    drawn = torch.randn(rows, dimensions, dtype=torch.float64) / dimensions**0.5
    tuples = None if batch.indices_tuple is None else tuple(member.cpu() for member in batch.indices_tuple)
    labels = None if batch.labels is None else batch.labels.cpu()
    return replace(batch, embeddings=drawn, context=drawn, labels=labels, indices_tuple=tuples)


def _trial_batch(batch: Batch, classes: list[int]) -> Batch:
    """A small batch that is called as the real one: with labels, tuples and reference if that has them."""
    labels = _three_labels(batch)[torch.tensor(classes)]
    reference = labels.clone() if batch.num_queries < batch.num_rows else None
    tuples = None
    if batch.indices_tuple is not None:
        all_of = lmu.get_all_triplets_indices if len(batch.indices_tuple) == 3 else lmu.get_all_pairs_indices
        tuples = _thinned(all_of(labels, reference))
        tuples = tuples if reference is None else shift_partners(tuples, len(labels))
    parts = 1 if reference is None else 2
    dimensions = batch.embeddings.shape[1]
    drawn = torch.randn(parts * len(labels), dimensions, dtype=torch.float64) / dimensions**0.5
    if dimensions == 1:
        drawn[::3] = 0  # else, at unit length, all of them are 1 or -1 and all pairs of a kind have one loss
    return replace(
        batch,
        embeddings=drawn,
        context=drawn,
        labels=None if batch.labels is None else labels.repeat(parts),
        indices_tuple=tuples,
        num_queries=len(labels),
    )


def _three_labels(batch: Batch) -> Tensor:
    """Labels of the batch, which the loss knows; where it has fewer, the lowest numbers."""
    known = torch.empty(0, dtype=torch.long) if batch.labels is None else batch.labels.unique().cpu()
    lowest = torch.arange(3).to(known)
    return torch.cat([known, lowest[~torch.isin(lowest, known)]])[:3]


def _thinned(indices_tuple: IndicesTuple) -> IndicesTuple:
    """Half of the positive pairs, some of them in one direction only, and half of the tuples."""
    if len(indices_tuple) == 3:
        anchors, positives, _ = indices_tuple
        pair = anchors * (int(positives.max()) + 1) + positives
        kept = _half(torch.isin(pair, _half(pair.unique())).nonzero().flatten())
        return tuple(member[kept] for member in indices_tuple)
    kinds = indices_tuple[:2], indices_tuple[2:]
    halves = [_half(torch.arange(len(anchors))) for anchors, _ in kinds]
    return tuple(member[half] for kind, half in zip(kinds, halves, strict=True) for member in kind)


def _half(values: Tensor) -> Tensor:
    return values[torch.randperm(len(values))[: len(values) // 2].sort().values]
