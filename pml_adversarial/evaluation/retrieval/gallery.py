"""Search in a gallery: which right and wrong items are nearest to a query, other than the query itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...training.numeric import unit_length
from .distance import Cosine, Distance
from .embedder import batches

TIE = 1e-6  #: Similarities that differ by less of their scale count as equal, in single precision: see `tie_of`.


@dataclass(frozen=True, eq=False)
class Targets:
    """What queries should find.

    Attributes:
        labels: ``(Q,)`` labels of the queries. Items with the same label are right, all others are wrong.
        own: ``(Q,)`` index of the gallery item that is the query itself; it is never found. -1: there is none.
        ignored: ``(Q, G)`` bool, further items that are never found; None: there are none.
        relevant: ``(Q, G)`` bool, the items that are right; None: labels say it.
    """

    labels: Tensor
    own: Tensor
    ignored: Tensor | None = None
    relevant: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> Targets:
        masks = (None if mask is None else mask[rows] for mask in (self.ignored, self.relevant))
        return Targets(self.labels[rows], self.own[rows], *masks)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def are_alike(self) -> bool:
        """Whether queries with the same label search the same items for the same ones."""
        return self.ignored is None and self.relevant is None and bool((self.own < 0).all())

    def is_right(self, labels: Tensor, items: slice = slice(None)) -> Tensor:
        """``(Q, n)`` bool: which of some items, whose labels are ``(n,)``, are right."""
        return self.labels.unsqueeze(1) == labels if self.relevant is None else self.relevant[:, items]

    def is_left_out(self, items: slice) -> Tensor:
        """``(Q, n)`` bool: which of some items are never found."""
        places = torch.arange(items.start, items.stop, device=self.own.device)
        own = self.own.unsqueeze(1) == places
        return own if self.ignored is None else own | self.ignored[:, items]

    def aimed_at(self, labels: Tensor) -> Targets:
        """Targets of an attack that leads to other labels ``(Q,)``; items that are right are then left out."""
        if self.relevant is None:
            return replace(self, labels=labels)
        ignored = self.relevant if self.ignored is None else self.relevant | self.ignored
        return Targets(labels, self.own, ignored)


class ReplacedItems(NamedTuple):
    """For each query, one item ``(Q,)`` that has another embedding ``(Q, D)`` when this query searches."""

    items: Tensor
    embeddings: Tensor


def tie_of(dtype: torch.dtype) -> float:
    """By how much of their scale rounding alone makes similarities differ that are computed in a type."""
    return TIE * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


class Ranking(NamedTuple):
    """The nearest right and the nearest wrong items of each query.

    Attributes:
        right: ``(Q, K)`` similarities of the nearest right items, descending; -inf if there are fewer than K.
        wrong: ``(Q, K)`` similarities of the nearest wrong items, in the same way.
        num_right: ``(Q,)`` how many right items the gallery holds.
        tie: similarities that differ by less count as equal.
    """

    right: Tensor
    wrong: Tensor
    num_right: Tensor
    tie: float = TIE

    @property
    def margin(self) -> Tensor:
        """``(Q,)`` see `Gallery.margin`."""
        return self.wrong[:, 0] - self.right[:, 0] + self.tie


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
    """Items that are searched, a block at a time, so that a large gallery needs little memory.

    Attributes:
        embeddings: ``(G, D)``, as the distance compares them: of length 1 for cosine similarity.
        labels: ``(G,)``.
        distance: how queries and items are compared.
        tie: similarities that differ by less count as equal.
        block: items that are compared at once.
        classes: ``(C,)`` different labels, ascending.
        columns: ``(G,)`` index into ``classes`` of each item.
        class_sizes: ``(C,)`` items of each class.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, block: int = 8192, distance: Distance | None = None) -> None:
        self.distance = Cosine() if distance is None else distance
        self.embeddings = self.distance.vectors(finite_or_zero(embeddings.detach()))
        self.tie = tie_of(self.embeddings.dtype) * self.distance.scale(self.embeddings)
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
        """``(Q,)`` how many items are right for each query, not counting those that are left out."""
        if targets.ignored is not None or targets.relevant is not None:
            return torch.stack([counted.sum(1) for _, counted in self._right_by_block(targets)]).sum(0)
        column = torch.searchsorted(self.classes, targets.labels).clamp(max=len(self.classes) - 1)
        size = torch.where(self.classes[column] == targets.labels, self.class_sizes[column], 0)
        own = targets.own.clamp(min=0)
        return size - ((targets.own >= 0) & (self.labels[own] == targets.labels)).to(size)

    def num_searched(self, targets: Targets) -> Tensor:
        """``(Q,)`` how many items each query searches."""
        if targets.ignored is None:
            return len(self) - (targets.own >= 0).long()
        return torch.stack([(~targets.is_left_out(rows)).sum(1) for rows in self._rows()]).sum(0)

    def chance(self, targets: Targets) -> Tensor:
        """``(Q,)`` R@1 of a random ranking."""
        return self.num_right(targets) / self.num_searched(targets).clamp(min=1).double()

    def hardest(self, queries: Tensor, targets: Targets, nth: int = 0) -> tuple[Tensor, Tensor]:
        """Indices ``(Q,)`` of the nearest wrong items of queries ``(Q, D)``, and of their nearest right items.

        With ``nth`` 1 it is the second nearest, and so on; the last one, if there are fewer.
        """
        right, wrong = self._heads(queries, targets, nth + 1, None)
        return wrong.last(), right.last()

    def margin(self, queries: Tensor, targets: Targets) -> Tensor:
        """``(Q,)`` similarity of the nearest wrong item minus that of the nearest right item, plus `tie`.

        At 0 or above, the query fails; so a tie counts as a failure. It has a gradient. Every query needs a right item.
        """
        return self.lead(queries, *self.hardest(queries, targets)) + self.tie

    def lead(self, queries: Tensor, items: Tensor, others: Tensor) -> Tensor:
        """``(Q,)`` by how much the similarity of ``items`` ``(Q,)`` exceeds that of ``others``, with a gradient."""
        return self.similarity(queries, self.embeddings[items]) - self.similarity(queries, self.embeddings[others])

    def similarity(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """``(Q,)`` similarity of queries ``(Q, D)`` to vectors ``(Q, D)``; 0 for queries that are not finite."""
        finite = queries.isfinite().all(1)
        compared = self.distance.to_each(*_of_one_type(self.distance.query_vectors(finite_or_zero(queries)), vectors))
        return torch.where(finite, compared, 0.0)

    def similarity_of_items(self, queries: Tensor, embeddings: Tensor) -> Tensor:
        """``(Q,)`` similarity of queries ``(Q, D)`` to embeddings ``(Q, D)`` that items would have, with a gradient."""
        return self.similarity(queries, self.distance.vectors(finite_or_zero(embeddings)))

    def similarities(self, queries: Tensor, rows: slice = slice(None)) -> Tensor:
        """``(Q, n)`` similarities of queries to items, with a gradient; 0 for queries that are not finite."""
        finite = queries.isfinite().all(1, keepdim=True)
        queries = self.distance.query_vectors(finite_or_zero(queries))
        return torch.where(finite, self.distance.to_all(*_of_one_type(queries, self.embeddings[rows])), 0.0)

    def shift(self, embeddings: Tensor, others: Tensor) -> Tensor:
        """``(Q,)`` Euclidean distance between embeddings ``(Q, D)`` and others, as they are compared."""
        return self.shift_squared(embeddings, others).sqrt()

    def shift_squared(self, embeddings: Tensor, others: Tensor) -> Tensor:
        """Its square, which has a gradient where it is 0."""
        one, other = (self.distance.query_vectors(finite_or_zero(e)) for e in (embeddings, others))
        return (one - other).square().sum(1)

    def ranking(self, queries: Tensor, targets: Targets, depth: int, replaced: ReplacedItems | None = None) -> Ranking:
        """The ``depth`` nearest right items and the ``depth`` nearest wrong items of each query."""
        right, wrong = self._heads(queries, targets, depth, replaced)
        return Ranking(right.similarities, wrong.similarities, self.num_right(targets), self.tie)

    def nearest(self, queries: Tensor, targets: Targets, count: int) -> Tensor:
        """``(Q, count)`` indices of the nearest items, nearest first; -1 where a query may find no more items."""
        head = _Head.empty(queries, self.embeddings.dtype)
        for rows, similarities, _ in self._blocks(queries, targets, None):
            head = head.joined(similarities, rows, count)
        return head.items.masked_fill(head.similarities == -torch.inf, -1)

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
        """Of each block: its items; similarities ``(Q, block)``, -inf for what is left out; which items are right."""
        queries = queries.detach()
        for rows in self._rows():
            similarities = self.similarities(queries, rows)
            if replaced is not None:
                _put(similarities, rows, replaced.items, self.similarity_of_items(queries, replaced.embeddings))
            similarities = similarities.masked_fill(targets.is_left_out(rows), -torch.inf)
            yield rows, similarities, targets.is_right(self.labels[rows], rows)

    def _right_by_block(self, targets: Targets) -> Iterator[tuple[slice, Tensor]]:
        for rows in self._rows():
            yield rows, targets.is_right(self.labels[rows], rows) & ~targets.is_left_out(rows)

    def _rows(self) -> Iterator[slice]:
        return batches(len(self), self.block)


def _of_one_type(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the more precise of their types; known embeddings of a gallery are often less precise."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return one.to(wide), other.to(wide)


def finite_or_zero(embeddings: Tensor) -> Tensor:
    """Embeddings ``(N, D)``. One that is not finite becomes 0."""
    return torch.where(embeddings.isfinite().all(1, keepdim=True), embeddings, 0.0)


def unit_or_zero(embeddings: Tensor) -> Tensor:
    """Embeddings ``(N, D)`` of length 1, in single precision at least. One that is not finite becomes 0."""
    return unit_length(finite_or_zero(embeddings))


def _put(similarities: Tensor, rows: slice, items: Tensor, values: Tensor) -> None:
    inside = ((items >= rows.start) & (items < rows.stop)).nonzero().squeeze(1)
    similarities[inside, items[inside] - rows.start] = values[inside]
