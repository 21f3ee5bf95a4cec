"""What an attack raises by default: how badly a copy stands among its fixed partners, or the loss itself."""

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
from .loss_support import own_partners, own_tuples
from .numeric import at_least_float
from .plan import Plan
from .tuples import IndicesTuple, shift_partners


class ViolationScore:
    """How badly each copy stands among its fixed partners: furthest of its own label minus nearest of the others.

    Unhinged, so that it has a gradient where the loss is satisfied. The two partners are chosen anew in every
    step; with one tuple per copy there is no choice, and it is the objective of arXiv 2102.07265. Distances are taken
    in single precision at least: in mixed precision close embeddings would all have the same one.

    Args:
        distance: PML's distance; a similarity counts with the opposite sign.
        context: ``(N, D)`` clean embeddings, fixed.
        same: ``(M, N)`` bool, partners of the copy's own label, see `Plan.partners`.
        different: ``(M, N)`` bool, partners of other labels.
    """

    def __init__(self, distance: BaseDistance, context: Tensor, same: Tensor, different: Tensor) -> None:
        self.distance, self.context = distance, at_least_float(context)
        self.not_same, self.not_different = ~same, ~different
        self.lacks_same, self.lacks_different = self.not_same.all(1), self.not_different.all(1)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Scores of the embeddings, ``(M, D) -> (M,)``; a kind of partner that a copy lacks counts 0."""
        with exactly(embeddings):
            distances: Tensor = self.distance(embeddings.to(self.context.dtype), self.context)
        if self.distance.is_inverted:
            distances = -distances
        furthest = distances.masked_fill(self.not_same, -torch.inf).amax(1)
        nearest = distances.masked_fill(self.not_different, torch.inf).amin(1)
        return _or_zero(furthest, self.lacks_same) - _or_zero(nearest, self.lacks_different)


class OwnLoss:
    """The wrapped loss itself, of the copies in their places, with everything else fixed.

    Args:
        loss: the wrapped loss, or one that gives PML's dict of losses before they are reduced; then each copy's score
            is what its row contributes, where the loss tells it.
        batch: gives the fixed rows, ``batch.context``.
        plan: where the copies stand.
    """

    def __init__(self, loss: nn.Module, batch: Batch, plan: Plan) -> None:
        self.loss, self.batch, self.plan = loss, replace(batch, embeddings=at_least_float(batch.context)), plan
        stands = (plan.pool_indices >= len(batch)).nonzero().flatten()
        self.position = torch.empty_like(plan.rows).scatter_(0, plan.pool_indices[stands] - len(batch), stands)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """The score of embeddings ``(M, D)``: per copy, ``(M,)``, or of all together, ``()``."""
        with exactly(embeddings):
            found: Any = self.plan.evaluate(self.loss, self.batch, embeddings.to(self.batch.embeddings.dtype))
        if isinstance(found, Tensor):
            return found
        told = [part["losses"] for part in found.values() if part["reduction_type"] == "element"]
        if told:
            return sum(told)[self.position]
        return sum(part["losses"] for part in found.values())


def partners_of(plan: Plan, wrapped: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """``(M, N)`` masks of each copy's fixed partners of its own and of other labels."""
    left_to_the_loss = plan.indices_tuple is None and plan.replaces(len(batch))
    masks = own_partners(wrapped, batch) if left_to_the_loss else None
    if masks is None:
        return plan.partners(cast(IndicesTuple, tuples_of(plan, wrapped, batch)), len(batch))
    positive, negative = masks
    return positive[plan.rows], negative[plan.rows]


def tuples_of(plan: Plan, wrapped: nn.Module, batch: Batch) -> IndicesTuple | None:
    """The plan's tuples, or the loss's own where it leaves them to the loss, counted as the plan counts; None: none."""
    if plan.indices_tuple is not None:
        return plan.indices_tuple
    tuples = own_tuples(wrapped, batch)
    return tuples if tuples is None or plan.ref_pool_indices is None else shift_partners(tuples, -batch.num_queries)


def distance_of(wrapped: nn.Module) -> BaseDistance:
    """The distance that the loss or miner uses; Euclidean on the unit sphere where it has none."""
    return next((m for m in wrapped.modules() if isinstance(m, BaseDistance)), None) or LpDistance()


def unreduced(wrapped: nn.Module) -> nn.Module:
    """The same loss, parameters and all, that gives PML's dict of losses before they are reduced to one."""
    if not isinstance(wrapped, BaseMetricLossFunction):
        return wrapped
    view = copy.copy(wrapped)
    view._modules = {**wrapped._modules, "reducer": DoNothingReducer()}
    return view


def exactly(embeddings: Tensor) -> AbstractContextManager[Any]:
    """Within it, autocast does not touch what is computed where the embeddings are."""
    kind = embeddings.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _or_zero(values: Tensor, missing: Tensor) -> Tensor:
    return values.masked_fill(missing, 0)
