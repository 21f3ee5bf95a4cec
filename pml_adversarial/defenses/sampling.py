"""Triplets drawn from a batch, for methods that are defined on triplets and were given none.

The ways to draw are those of the code of arXiv 2106.03614 and 2203.01439, there for two images of each class of which
the first is the anchor; here for any batch with labels. Where a way leaves no candidate, all are candidates.
Draws from torch's global generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, PlanError
from ..training.batch import Batch
from ..training.loss_tuples import own_triplets
from ..training.tuples import IndicesTuple, rank_in_group
from .rows import on_sphere

KINDS = ("random", "semihard", "softhard")


def sample_triplets(kind: str, batch: Batch, margin: float = 0.2, anchors_per_class: int | None = None) -> IndicesTuple:
    """One triplet for each query row that has a positive and a negative, over the rows of the batch.

    Args:
        kind: "random": positive and negative at random. "semihard": a negative further than the positive, by less than
            the margin. "softhard": a positive further than the nearest negative, and a negative nearer than the
            furthest positive. Distances are Euclidean between the rows of ``batch.context`` at unit length.
        batch: with reference rows, positives and negatives are among these.
        margin: of "semihard".
        anchors_per_class: at most so many anchors of each class, drawn at random; None: all.

    Raises:
        PlanError: there are no labels.
    """
    positive, negative, distances = _candidates(batch)
    anchors = (positive.any(1) & negative.any(1)).nonzero().flatten()
    if anchors_per_class is not None:
        anchors = anchors[torch.randperm(len(anchors), device=anchors.device)]
        rank = rank_in_group(_labels(batch)[anchors])
        anchors = anchors[rank < anchors_per_class].sort().values
    positives = _draw_positives(kind, positive[anchors], negative[anchors], distances[anchors])
    return (
        anchors,
        positives,
        _draw_negatives(kind, positive[anchors], negative[anchors], distances[anchors], positives, margin),
    )


def triplets_for(
    wrapped: nn.Module, batch: Batch, kind: str, margin: float = 0.2, anchors_per_class: int | None = None
) -> IndicesTuple:
    """The caller's triplets, or those that his pairs form; where he gave neither, drawn by `sample_triplets`.

    Raises:
        PlanError: there are neither tuples nor labels.
    """
    if batch.indices_tuple is None:
        return sample_triplets(kind, batch, margin, anchors_per_class)
    return own_triplets(wrapped, batch)


def harder_triplets(kind: str, batch: Batch, triplets: IndicesTuple, margin: float = 0.2) -> IndicesTuple:
    """For each triplet another one with the same anchor, drawn as `sample_triplets` does.

    "semihard" keeps the positive, relative to which it is defined; "softhard" draws one. The members of the triplet
    itself are among the candidates, whatever the labels say.

    Raises:
        PlanError: there are no labels.
    """
    anchors, positives, negatives = triplets
    positive, negative, distances = (of_row[anchors] for of_row in _candidates(batch))
    positive = positive.scatter(1, positives[:, None], True)
    negative = negative.scatter(1, negatives[:, None], True)
    if kind == "softhard":
        positives = _draw_positives(kind, positive, negative, distances)
    return anchors, positives, _draw_negatives(kind, positive, negative, distances, positives, margin)


def check_options(kind: Any, anchors_per_class: Any) -> None:
    """Refuses options that cannot be.

    Raises:
        InputError: an unknown way to draw, or a number of anchors that is none.
    """
    if kind not in KINDS:
        raise InputError(f"source={kind!r}; expected one of {', '.join(map(repr, KINDS))}.")
    whole = isinstance(anchors_per_class, int) and not isinstance(anchors_per_class, bool)
    if anchors_per_class is not None and not (whole and anchors_per_class >= 1):
        raise InputError(
            f"anchors_per_class={anchors_per_class!r}; expected a whole number from 1 on, or None for every row."
        )


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise PlanError(
            "There are no labels to draw triplets by; expected loss_func(embeddings, labels), or triplets of a miner."
        )
    return batch.labels


def _candidates(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """``(Q, N)`` masks of the positives and negatives of each query, and its distances to all rows."""
    labels, queries = _labels(batch), batch.num_queries
    row = torch.arange(len(batch), device=labels.device)
    itself = row[:queries, None] == row
    if queries < len(batch):
        among = (row >= queries).expand_as(itself)
        itself = itself | (row[:queries, None] + queries == row) & batch.shared_labels
    else:
        among = torch.ones_like(itself)
    same = labels[:queries, None] == labels
    unit = on_sphere(batch.context)
    distances = torch.cdist(unit[:queries], unit, compute_mode="donot_use_mm_for_euclid_dist")
    return same & among & ~itself, ~same & among, distances


def _draw_positives(kind: str, positive: Tensor, negative: Tensor, distances: Tensor) -> Tensor:
    if kind == "softhard":
        nearest = distances.masked_fill(~negative, torch.inf).amin(1, keepdim=True)
        positive = _those_if_any(positive & (distances > nearest), positive)
    return _draw(positive)


def _draw_negatives(
    kind: str, positive: Tensor, negative: Tensor, distances: Tensor, positives: Tensor, margin: float
) -> Tensor:
    if kind == "softhard":
        furthest = distances.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        negative = _those_if_any(negative & (distances < furthest), negative)
    elif kind == "semihard":
        further = distances - distances.gather(1, positives[:, None])
        negative = _those_if_any(negative & (further > 0) & (further < margin), negative)
    return _draw(negative)


def _those_if_any(preferred: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(preferred.any(1, keepdim=True), preferred, otherwise)


def _draw(mask: Tensor) -> Tensor:
    """``(T,)`` of each row ``(T, N)`` one column that is True, at random."""
    return torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1).argmax(1)
