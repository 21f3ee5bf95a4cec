"""Search in a gallery: which right and wrong items are nearest to a query, other than the query itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..training.numeric import unit_length
from .embedder import batches

TIE = 1e-6  #: Similarities that differ by less count as equal, because rounding alone makes such differences.


@dataclass(frozen=True, eq=False)
class Targets:
    """What queries should find.

    Attributes:
        labels: ``(Q,)`` labels of the queries. Items with the same label are right, all others are wrong.
        own: ``(Q,)`` index of the gallery item that is the query itself; it is never found. -1: there is none.
    """

    labels: Tensor
    own: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Targets:
        return Targets(self.labels[rows], self.own[rows])

    def __len__(self) -> int:
        return len(self.labels)


class ReplacedItems(NamedTuple):
    """For each query, one item ``(Q,)`` that has another embedding ``(Q, D)`` when this query searches."""

    items: Tensor
    embeddings: Tensor


class Ranking(NamedTuple):
    """The nearest right and the nearest wrong items of each query.

    Attributes:
        right: ``(Q, K)`` similarities of the nearest right items, descending; -inf if there are fewer than K.
        wrong: ``(Q, K)`` similarities of the nearest wrong items, in the same way.
        num_right: ``(Q,)`` how many right items the gallery holds.
    """

    right: Tensor
    wrong: Tensor
    num_right: Tensor

    @property
    def margin(self) -> Tensor:
        """``(Q,)`` see `Gallery.margin`."""
        return self.wrong[:, 0] - self.right[:, 0] + TIE


class _Head(NamedTuple):
    """The first K items of each query's list: similarities ``(Q, K)``, descending, and indices ``(Q, K)``."""

    similarities: Tensor
    items: Tensor

    @staticmethod
    def empty(queries: Tensor, dtype: torch.dtype) -> _Head:
        none = torch.empty(len(queries), 0, device=queries.device)
        return _Head(none.to(dtype), none.long())

    def last(self) -> Tensor:
        """``(Q,)`` the last item of each list; the first, if all are infinitely far."""
        count = (self.similarities > -torch.inf).sum(1, keepdim=True)
        return self.items.gather(1, count.clamp(min=1) - 1).squeeze(1)

    def joined(self, similarities: Tensor, rows: slice, depth: int) -> _Head:
        """The first ``depth`` items after the items ``rows`` were added to the list."""
        values, order = similarities.topk(min(depth, similarities.shape[1]), dim=1)
        values = torch.cat([self.similarities, values], 1)
        items = torch.cat([self.items, order + rows.start], 1)
        values, order = values.topk(min(depth, values.shape[1]), dim=1)
        return _Head(values, items.gather(1, order))


class Gallery:
    """Items that are searched by cosine similarity, a block at a time, so that a large gallery needs little memory.

    Attributes:
        embeddings: ``(G, D)``, of length 1; those that are given may have any length.
        labels: ``(G,)``.
        block: items that are compared at once.
        classes: ``(C,)`` different labels, ascending.
        columns: ``(G,)`` index into ``classes`` of each item.
        class_sizes: ``(C,)`` items of each class.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, block: int = 8192) -> None:
        self.embeddings = unit_or_zero(embeddings.detach())
        self.labels = labels
        self.block = block
        self.classes, self.columns, self.class_sizes = labels.unique(return_inverse=True, return_counts=True)

    def __len__(self) -> int:
        return len(self.labels)

    def leave_one_out(self, rows: Tensor | None = None) -> Targets:
        """Targets of items that search all other items; ``rows`` are their indices ``(Q,)``, None: all."""
        rows = torch.arange(len(self), device=self.labels.device) if rows is None else rows
        return Targets(self.labels[rows], rows)

    def num_right(self, targets: Targets) -> Tensor:
        """``(Q,)`` how many items are right for each query, not counting the query itself."""
        column = torch.searchsorted(self.classes, targets.labels).clamp(max=len(self.classes) - 1)
        size = torch.where(self.classes[column] == targets.labels, self.class_sizes[column], 0)
        own = targets.own.clamp(min=0)
        return size - ((targets.own >= 0) & (self.labels[own] == targets.labels)).to(size)

    def chance(self, targets: Targets) -> Tensor:
        """``(Q,)`` R@1 of a random ranking."""
        return self.num_right(targets) / (len(self) - (targets.own >= 0).double())

    def hardest(self, queries: Tensor, targets: Targets, nth: int = 0) -> tuple[Tensor, Tensor]:
        """Indices ``(Q,)`` of the nearest wrong items of queries ``(Q, D)``, and of their nearest right items.

        With ``nth`` 1 it is the second nearest, and so on; the last one, if there are fewer.
        """
        right, wrong = self._heads(queries, targets, nth + 1, None)
        return wrong.last(), right.last()

    def margin(self, queries: Tensor, targets: Targets) -> Tensor:
        """``(Q,)`` similarity of the nearest wrong item minus that of the nearest right item, plus `TIE`.

        At 0 or above, the query fails; so a tie counts as a failure. It has a gradient. Every query needs a right item.
        """
        wrong, right = self.hardest(queries, targets)
        return (unit_or_zero(queries) * (self.embeddings[wrong] - self.embeddings[right])).sum(1) + TIE

    def ranking(self, queries: Tensor, targets: Targets, depth: int, replaced: ReplacedItems | None = None) -> Ranking:
        """The ``depth`` nearest right items and the ``depth`` nearest wrong items of each query."""
        right, wrong = self._heads(queries, targets, depth, replaced)
        return Ranking(right.similarities, wrong.similarities, self.num_right(targets))

    def nearest(self, queries: Tensor, own: Tensor, count: int) -> Tensor:
        """``(Q, count)`` indices of the nearest items, nearest first."""
        head = _Head.empty(queries, self.embeddings.dtype)
        for rows, similarities, _ in self._blocks(queries, Targets(own, own), None):
            head = head.joined(similarities, rows, count)
        return head.items

    def _heads(
        self, queries: Tensor, targets: Targets, depth: int, replaced: ReplacedItems | None
    ) -> tuple[_Head, _Head]:
        right_head = wrong_head = _Head.empty(queries, self.embeddings.dtype)
        for rows, similarities, right in self._blocks(queries, targets, replaced):
            right_head = right_head.joined(similarities.masked_fill(~right, -torch.inf), rows, depth)
            wrong_head = wrong_head.joined(similarities.masked_fill(right, -torch.inf), rows, depth)
        return right_head, wrong_head

    @torch.no_grad()
    def _blocks(
        self, queries: Tensor, targets: Targets, replaced: ReplacedItems | None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each block: its items; similarities ``(Q, block)``, -inf for the query itself; which items are right."""
        queries = unit_or_zero(queries.detach())
        for rows in batches(len(self), self.block):
            similarities = queries @ self.embeddings[rows].T
            if replaced is not None:
                _put(similarities, rows, replaced.items, (queries * unit_or_zero(replaced.embeddings)).sum(1))
            _put(similarities, rows, targets.own, torch.full_like(similarities[:, 0], -torch.inf))
            yield rows, similarities, targets.labels.unsqueeze(1) == self.labels[rows]


def unit_or_zero(embeddings: Tensor) -> Tensor:
    """Embeddings ``(N, D)`` of length 1, in single precision at least. One that is not finite becomes 0."""
    return unit_length(torch.where(embeddings.isfinite().all(1, keepdim=True), embeddings, 0.0))


def _put(similarities: Tensor, rows: slice, items: Tensor, values: Tensor) -> None:
    inside = ((items >= rows.start) & (items < rows.stop)).nonzero().squeeze(1)
    similarities[inside, items[inside] - rows.start] = values[inside]
