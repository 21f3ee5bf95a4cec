"""What `HM`, `ACT` and `TRIDE` share: where triplets come from, copies of their members, distances and hardness.

The triplets are the caller's, or all that the caller's pairs form. Without tuples, one triplet is drawn for each row
that has a positive and a negative, with torch's global generator. The published batches hold two images of each class,
and the first is the anchor, which gives half as many triplets. ``anchors_per_class=1`` gives as many; it draws the
anchor.

A loss that looks at rows beyond its triplets sees all copies, also several of one row. With reference rows, positives
and negatives are among these, and the loss is taken on the members without a reference. Where processes share a batch,
each perturbs its own copies while those of the others stay clean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pairwise_distance

from ..attacks.checks import check_choice, check_whole
from ..errors import PlanError
from ..training.batch import Batch
from ..training.loss_tuples import own_triplets
from ..training.numeric import unit_length
from ..training.plan import Plan, plan_tuples
from ..training.tuples import IndicesTuple, rank_in_group

STRATEGIES = ("random", "semihard", "softhard")


def sample_triplets(
    strategy: str, batch: Batch, margin: float = 0.2, anchors_per_class: int | None = None
) -> IndicesTuple:
    """Draws one triplet for each query row that has a positive and a negative.

    The strategies are those of the code of arXiv 2106.03614 and 2203.01439. Where no row meets the condition of a
    strategy, all rows of the right label are candidates.

    Args:
        strategy: "random": any positive and any negative. "semihard": a negative that is further than the positive, by
            less than the margin. "softhard": a positive further than the nearest negative, and a negative nearer than
            the furthest positive. Distances are Euclidean, between the rows of ``batch.context`` at unit length.
        batch: with reference rows, positives and negatives are among these.
        margin: of "semihard".
        anchors_per_class: the largest number of anchors of a class, drawn at random; None: all rows are anchors.

    Returns:
        Rows of the batch: anchors, positives and negatives, each ``(T,)``.

    Raises:
        PlanError: there are no labels.
    """
    positive, negative, distances = _candidates(batch)
    anchors = (positive.any(1) & negative.any(1)).nonzero().flatten()
    if anchors_per_class is not None:
        anchors = anchors[torch.randperm(len(anchors), device=anchors.device)]
        rank = rank_in_group(_labels(batch)[anchors])
        anchors = anchors[rank < anchors_per_class].sort().values
    candidates = positive[anchors], negative[anchors], distances[anchors]
    positives = draw_positives(strategy, *candidates)
    return anchors, positives, draw_negatives(strategy, *candidates, positives, margin)


def triplets_for(
    wrapped: nn.Module, batch: Batch, strategy: str, margin: float = 0.2, anchors_per_class: int | None = None
) -> IndicesTuple:
    """The caller's triplets, or those that the caller's pairs form; without tuples, those of `sample_triplets`."""
    if batch.indices_tuple is None:
        return sample_triplets(strategy, batch, margin, anchors_per_class)
    return own_triplets(wrapped, batch)


def harder_triplets(strategy: str, batch: Batch, triplets: IndicesTuple, margin: float = 0.2) -> IndicesTuple:
    """For each triplet, draws another one with the same anchor, as `sample_triplets` does.

    "semihard" keeps the positive; "softhard" draws another. The members of the triplet itself are among the candidates,
    also where the labels contradict it.
    """
    anchors, positives, negatives = triplets
    positive, negative, distances = (of_row[anchors] for of_row in _candidates(batch))
    positive = positive.scatter(1, positives[:, None], True)
    negative = negative.scatter(1, negatives[:, None], True)
    if strategy == "softhard":
        positives = draw_positives(strategy, positive, negative, distances)
    return anchors, positives, draw_negatives(strategy, positive, negative, distances, positives, margin)


def check_sampling(source: Any, anchors_per_class: Any) -> None:
    """Checks the options of a method that draws triplets."""
    check_choice("source", source, STRATEGIES)
    if anchors_per_class is not None:
        check_whole("anchors_per_class", anchors_per_class, hint=", or None for every row")


def unit_distances(queries: Tensor, rows: Tensor) -> Tensor:
    """``(Q, N)`` Euclidean distances between embeddings ``(Q, D)`` and ``(N, D)`` at unit length."""
    return torch.cdist(unit_length(queries), unit_length(rows), compute_mode="donot_use_mm_for_euclid_dist")


def draw_positives(
    strategy: str, positive: Tensor, negative: Tensor, distances: Tensor, otherwise: Tensor | None = None
) -> Tensor:
    """One positive for each anchor, ``(T,)``; "softhard" prefers one that is further than the nearest negative.

    ``positive`` and ``negative`` are masks ``(T, N)`` of the rows that may be drawn, ``distances`` ``(T, N)`` those of
    all rows from the anchor. An anchor without a preferred positive gets one of ``otherwise``, or any.
    """
    if strategy == "softhard":
        nearest = distances.masked_fill(~negative, torch.inf).amin(1, keepdim=True)
        positive = _preferred(positive & (distances > nearest), positive if otherwise is None else otherwise)
    return draw_columns(positive)


def draw_negatives(
    strategy: str, positive: Tensor, negative: Tensor, distances: Tensor, positives: Tensor, margin: float = 0.2
) -> Tensor:
    """One negative for each anchor, ``(T,)``.

    "softhard" prefers negatives that are nearer than the furthest positive; "semihard" those that are further than the
    anchor's positive, one of ``(T,)`` positives, by less than the margin. The rest is as in `draw_positives`.
    """
    if strategy == "softhard":
        furthest = distances.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        negative = _preferred(negative & (distances < furthest), negative)
    elif strategy == "semihard":
        further = distances - distances.gather(1, positives[:, None])
        negative = _preferred(negative & (further > 0) & (further < margin), negative)
    return draw_columns(negative)


def draw_columns(mask: Tensor) -> Tensor:
    """``(T,)`` a random column of each row of ``(T, N)`` in which the mask is True."""
    return torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1).argmax(1)


def perturb_members(triplets: IndicesTuple, roles: Iterable[str], batch: Batch) -> Plan:
    """A plan in which each triplet has its own copies of these roles. The loss sees only rows that triplets name."""
    plan = plan_tuples(triplets, roles, len(batch)).only_named()
    if batch.num_attackable < len(batch) and not batch.can_be_perturbed(plan.rows).all():
        raise PlanError(
            f"Triplets have members in ref_emb or elsewhere whose inputs are not known, so {', '.join(roles)} cannot "
            "all be perturbed. Compute ref_emb with the watched model and with gradient, or leave it out."
        )
    return plan


def distance(left: Tensor, right: Tensor) -> Tensor:
    """``(T,)`` Euclidean distances in [0, 2] between embeddings ``(T, D)`` scaled to unit length.

    They are computed in single precision at least; in half precision, close embeddings would be equally far.
    """
    return pairwise_distance(unit_length(left), unit_length(right))


def hardness(anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """``(T,)`` distance to the positive minus distance to the negative; above 0 where the negative is nearer."""
    return distance(anchors, positives) - distance(anchors, negatives)


def three_members(plan: Plan, clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings ``(T, D)`` of anchors, positives and negatives, see `Plan.members`; refuses a plan of pairs."""
    members = plan.members(clean, adversarial)
    if len(members) != 3:
        raise PlanError(
            "The plan of another plugin has pairs; expected triplets. Name the method on triplets before that plugin."
        )
    anchors, positives, negatives = members
    return anchors, positives, negatives


def per_copy(plan: Plan, values: Tensor, num_rows: int) -> Tensor:
    """For each copy, the sum ``(M,)`` of the values ``(T,)`` of the triplets in which it stands."""
    found = values.new_zeros(len(plan) + 1)  # the last element collects the rows that are no copies
    for member in plan.indices_tuple or ():
        address = plan.pool_indices[member]
        found = found.index_add(0, torch.where(address < num_rows, len(plan), address - num_rows), values)
    return found[:-1]


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise PlanError("There are no labels to draw triplets by; expected loss_func(embeddings, labels), or triplets.")
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
    distances = unit_distances(batch.context[:queries], batch.context)
    return same & among & ~itself, ~same & among, distances


def _preferred(preferred: Tensor, otherwise: Tensor) -> Tensor:
    """``(T, N)`` the preferred candidates of each row; the others where it has none."""
    return torch.where(preferred.any(1, keepdim=True), preferred, otherwise)
