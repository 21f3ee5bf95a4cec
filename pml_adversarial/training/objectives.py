"""What an attack raises: a score of distances to fixed partners, or the wrapped loss itself."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import DoNothingReducer
from torch import Tensor, nn

from .batch import Batch
from .loss_tuples import own_partners, own_tuples
from .numeric import at_least_float
from .plan import Plan, as_slice, consecutive, take
from .tuples import IndicesTuple, shift_partners


class ViolationScore:
    """For each copy, the distance to its furthest positive partner, minus the distance to its nearest negative one.

    Partners are clean rows that share a pair with the copy; they stay where they are. Both partners are chosen anew in
    each attack step; a copy with one tuple has no choice, and then this is the objective of arXiv 2102.07265. There is
    no margin, so the score has a gradient where a hinge loss is satisfied. Distances are taken in single precision at
    least: in mixed precision, near embeddings would all have the same distance.

    Args:
        distance: PML's distance; of a similarity the negative is taken.
        context: ``(N, D)`` clean embeddings, fixed.
        same: ``(M, N)`` bool, positive partners of each copy, see `Plan.partners`.
        different: ``(M, N)`` bool, negative partners.
    """

    def __init__(self, distance: BaseDistance, context: Tensor, same: Tensor, different: Tensor) -> None:
        self.distance, self.context = distance, at_least_float(context)
        self._normalized = self._normalized_context()
        # The furthest positive is the least similar one.
        self._of_highest, self._of_lowest = (different, same) if distance.is_inverted else (same, different)
        self._below = self._no_partner(self._of_highest, -torch.inf)
        self._above = self._no_partner(self._of_lowest, torch.inf)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Scores of the copies, ``(M, D) -> (M,)``; a kind of partner that a copy lacks counts 0."""
        with exactly(embeddings):
            distances = self._distances(embeddings.to(self.context.dtype))
        highest = torch.where(self._of_highest, distances, self._below).amax(1)
        return highest - torch.where(self._of_lowest, distances, self._above).amin(1)

    def _distances(self, embeddings: Tensor) -> Tensor:
        """``(M, N)`` distances from copies to the context, which PML's classes would normalise in each call."""
        if self._normalized is None:
            found: Tensor = self.distance(embeddings, self.context)
            return found
        found = self.distance.compute_mat(self.distance.maybe_normalize(embeddings), self._normalized)
        return found if self.distance.power == 1 else found**self.distance.power

    def _normalized_context(self) -> Tensor | None:
        """The context at unit length; None where the class of the distance computes in its own way."""
        if type(self.distance).forward is not BaseDistance.forward:
            return None
        with exactly(self.context):
            normalized: Tensor = self.distance.maybe_normalize(self.context)
        return normalized

    def _no_partner(self, partners: Tensor, ignored: float) -> Tensor:
        """``(M, 1)`` what stands for rows that are no partners: a value that is never chosen, or 0 if all are none."""
        return self.context.new_zeros(len(partners), 1).masked_fill_(partners.any(1, keepdim=True), ignored)


class OwnLoss:
    """The wrapped loss itself, of the copies in their places; all other rows are fixed.

    Args:
        loss: the wrapped loss, or the same loss without its reducer, see `unreduced`.
        batch: gives the fixed rows, ``batch.context``.
        plan: where the copies stand.
    """

    def __init__(self, loss: nn.Module, batch: Batch, plan: Plan) -> None:
        self.loss, self.batch, self.plan = loss, replace(batch, embeddings=at_least_float(batch.context)), plan
        self._position = _position_of_copies(plan, batch.num_rows)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """The score of copies ``(M, D)``: ``(M,)`` what each adds to the loss; ``()`` if the loss does not tell."""
        with exactly(embeddings):
            found: Any = self.plan.evaluate(self.loss, self.batch, embeddings.to(self.batch.embeddings.dtype))
        if isinstance(found, Tensor):
            return found
        told = [part["losses"] for part in found.values() if part["reduction_type"] == "element"]
        if told:
            return take(sum(told[1:], start=told[0]), self._position)
        return sum(part["losses"] for part in found.values())


def _position_of_copies(plan: Plan, num_rows: int) -> Tensor:
    """``(M,)`` where each copy stands among the rows that the loss sees."""
    if as_slice(plan.pool_indices) == slice(num_rows, num_rows + len(plan)):
        return consecutive(0, len(plan), plan.rows.device)
    stands = (plan.pool_indices >= num_rows).nonzero().flatten()
    return torch.empty_like(plan.rows).scatter_(0, plan.pool_indices[stands] - num_rows, stands)


def partners_of(plan: Plan, wrapped: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Two bool masks ``(M, N)``: the positive partners of each copy, and the negative ones."""
    left_to_the_loss = plan.indices_tuple is None and plan.replaces(batch.num_rows)
    masks = own_partners(wrapped, batch) if left_to_the_loss else None
    if masks is None:
        return plan.partners(cast(IndicesTuple, tuples_of(plan, wrapped, batch)), batch.num_rows)
    positive, negative = masks
    return plan.rows_of(positive), plan.rows_of(negative)


def tuples_of(plan: Plan, wrapped: nn.Module, batch: Batch) -> IndicesTuple | None:
    """The plan's tuples; if it has none, those that the loss forms of the labels, counted as the plan counts."""
    if plan.indices_tuple is not None:
        return plan.indices_tuple
    tuples = own_tuples(wrapped, batch)
    return tuples if tuples is None or plan.ref_pool_indices is None else shift_partners(tuples, -batch.num_queries)


def distance_of(wrapped: nn.Module) -> BaseDistance:
    """The distance that the loss or miner uses; if it has none, the Euclidean one of unit-length embeddings."""
    return next((m for m in wrapped.modules() if isinstance(m, BaseDistance)), None) or LpDistance()


def unreduced(wrapped: nn.Module) -> nn.Module:
    """The same loss without its reducer: it returns PML's dict of losses before they are reduced to one."""
    if not isinstance(wrapped, BaseMetricLossFunction):
        return wrapped
    view = copy.copy(wrapped)
    view._modules = {**wrapped._modules, "reducer": DoNothingReducer()}
    return view


def exactly(embeddings: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast is off on the device of the embeddings."""
    kind = embeddings.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()
