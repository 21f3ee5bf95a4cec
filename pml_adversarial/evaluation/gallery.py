"""What a query finds: the nearest right and wrong items of a gallery, the query itself left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

Embed = Callable[[Tensor], Tensor]

TIE = 1e-6
"""Similarities that differ by less are equal: products of equal vectors, too, come out differently rounded."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What queries are to find.

    Attributes:
        labels: ``(Q,)``, the right items have the same.
        own: ``(Q,)``, the gallery item that is the query itself and never found; -1 where it is not in the gallery.
    """

    labels: Tensor
    own: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Targets:
        return Targets(self.labels[rows], self.own[rows])

    def __len__(self) -> int:
        return len(self.labels)


class Changed(NamedTuple):
    """One item of the gallery per query that lies elsewhere when this query is asked.

    Attributes:
        items: ``(Q,)``.
        embeddings: ``(Q, D)``.
    """

    items: Tensor
    embeddings: Tensor


class Ranking(NamedTuple):
    """The head of each query's list, right and wrong items apart.

    Attributes:
        right: ``(Q, K)`` similarities of the nearest right items, descending; -inf where there are fewer.
        wrong: ``(Q, K)`` the same of wrong items.
        num_right: ``(Q,)`` how many right items the gallery holds.
    """

    right: Tensor
    wrong: Tensor
    num_right: Tensor

    @property
    def margin(self) -> Tensor:
        """``(Q,)`` how much nearer the nearest wrong item is than the nearest right one, plus `TIE`.

        From 0 on, R@1 fails.
        """
        return self.wrong[:, 0] - self.right[:, 0] + TIE


class _Head(NamedTuple):
    """The first of each query's list: similarities ``(Q, K)``, descending, and items ``(Q, K)``."""

    similarities: Tensor
    items: Tensor

    @staticmethod
    def empty(queries: Tensor, dtype: torch.dtype) -> _Head:
        none = torch.empty(len(queries), 0, device=queries.device)
        return _Head(none.to(dtype), none.long())

    def joined(self, similarities: Tensor, rows: slice, depth: int) -> _Head:
        """With the items ``rows`` added, cut to ``depth``."""
        values, order = similarities.topk(min(depth, similarities.shape[1]), dim=1)
        values = torch.cat([self.similarities, values], 1)
        items = torch.cat([self.items, order + rows.start], 1)
        values, order = values.topk(min(depth, values.shape[1]), dim=1)
        return _Head(values, items.gather(1, order))


class Gallery:
    """Clean items to be searched, by cosine similarity, in memory that does not grow with their number.

    Args:
        embeddings: ``(G, D)``.
        labels: ``(G,)``.
        block: items that are compared at once.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor, block: int = 8192) -> None:
        self.embeddings = unit(embeddings.detach())
        self.labels = labels
        self.block = block
        self.classes, self.columns, self.class_sizes = labels.unique(return_inverse=True, return_counts=True)

    def __len__(self) -> int:
        return len(self.labels)

    def leave_one_out(self, rows: Tensor | None = None) -> Targets:
        """Items of the gallery as queries for the others; None: all of them."""
        rows = torch.arange(len(self), device=self.labels.device) if rows is None else rows
        return Targets(self.labels[rows], rows)

    def num_right(self, targets: Targets) -> Tensor:
        """``(Q,)`` how many items are right for each query, itself left out."""
        column = torch.searchsorted(self.classes, targets.labels).clamp(max=len(self.classes) - 1)
        size = torch.where(self.classes[column] == targets.labels, self.class_sizes[column], 0)
        own = targets.own.clamp(min=0)
        return size - ((targets.own >= 0) & (self.labels[own] == targets.labels)).to(size)

    def hardest(self, queries: Tensor, targets: Targets, nth: int = 0) -> tuple[Tensor, Tensor]:
        """Items ``(Q,)``: each query's nearest wrong and nearest right one, or the ``nth`` after it, if there are."""
        right, wrong = self._heads(queries, targets, nth + 1, None)
        return tuple(
            head.items.gather(1, (head.similarities > -torch.inf).sum(1, keepdim=True).clamp(min=1) - 1).squeeze(1)
            for head in (wrong, right)
        )  # type: ignore[return-value]

    def margin(self, queries: Tensor, targets: Targets) -> Tensor:
        """How much nearer the nearest wrong item is than the nearest right one, ``(Q,)``, plus `TIE`, with gradient.

        From 0 on, R@1 fails: a tie counts as a failure. Every query needs a right item.
        """
        wrong, right = self.hardest(queries, targets)
        return (unit(queries) * (self.embeddings[wrong] - self.embeddings[right])).sum(1) + TIE

    def ranking(self, queries: Tensor, targets: Targets, depth: int, changed: Changed | None = None) -> Ranking:
        """The ``depth`` nearest right and wrong items of each query."""
        right, wrong = self._heads(queries, targets, depth, changed)
        return Ranking(right.similarities, wrong.similarities, self.num_right(targets))

    def nearest(self, queries: Tensor, own: Tensor, count: int, changed: Changed | None = None) -> Tensor:
        """``(Q, count)`` indices of the nearest items, nearest first."""
        head = _Head.empty(queries, self.embeddings.dtype)
        for rows, similarities, _ in self._blocks(queries, Targets(own, own), changed):
            head = head.joined(similarities, rows, count)
        return head.items

    def _heads(self, queries: Tensor, targets: Targets, depth: int, changed: Changed | None) -> tuple[_Head, _Head]:
        right_head = wrong_head = _Head.empty(queries, self.embeddings.dtype)
        for rows, similarities, right in self._blocks(queries, targets, changed):
            right_head = right_head.joined(similarities.masked_fill(~right, -torch.inf), rows, depth)
            wrong_head = wrong_head.joined(similarities.masked_fill(right, -torch.inf), rows, depth)
        return right_head, wrong_head

    @torch.no_grad()
    def _blocks(
        self, queries: Tensor, targets: Targets, changed: Changed | None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Similarities ``(Q, block)``, the own item at -inf, and which items are right."""
        queries = unit(queries.detach())
        for rows in chunks(len(self), self.block):
            similarities = queries @ self.embeddings[rows].T
            if changed is not None:
                _put(similarities, rows, changed.items, (queries * unit(changed.embeddings)).sum(1))
            _put(similarities, rows, targets.own, torch.full_like(similarities[:, 0], -torch.inf))
            yield rows, similarities, targets.labels.unsqueeze(1) == self.labels[rows]


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings of length 1, in single precision at least; one with NaN or infinity in it is 0, and finds nothing."""
    real = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    return normalize(torch.where(real.isfinite().all(1, keepdim=True), real, 0.0))


def embed_all(embed: Embed, images: Tensor, chunk: int) -> Tensor:
    """Embeddings of all images, without gradient, ``chunk`` at a time."""
    with torch.no_grad():
        return torch.cat([embed(images[rows]) for rows in chunks(len(images), chunk)])


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices that cover ``range(total)``, each of at most ``size``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _put(similarities: Tensor, rows: slice, items: Tensor, values: Tensor) -> None:
    inside = ((items >= rows.start) & (items < rows.stop)).nonzero().squeeze(1)
    similarities[inside, items[inside] - rows.start] = values[inside]
