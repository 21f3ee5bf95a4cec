"""Which items of a gallery are the image of a query itself, maybe stored in another form."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from .embedder import batches
from .gallery import Gallery, Targets
from .images import ImageSet

_CANDIDATES = 8  # nearest items whose images are compared with a query's
_NEAR = 0.1  # of the spread of the gallery: embeddings of one image, stored in another form, differ by less
_ROUNDING = 1e-4  # of the size of embeddings: those of one image in single precision differ by less
_SAME_PIXELS = 1 / 255  # one image, stored in another form, differs by less in each pixel
_TOGETHER = 128  # images that are read at once


class Copies:
    """Finds the items of a gallery that have the image of a query.

    Items with images are compared by their pixels, if their embeddings are near. Others are known by embeddings alone,
    which differ by rounding.

    Args:
        queries: images of the queries.
        items: images of the gallery, or its labels alone.
        gallery: their embeddings.
        stored_in: the type in which the embeddings were given.
    """

    def __init__(self, queries: ImageSet, items: ImageSet, gallery: Gallery, stored_in: torch.dtype) -> None:
        self._queries, self._items, self._gallery = queries, items, gallery
        vectors = gallery.embeddings
        spread = float((vectors - vectors.mean(0)).double().square().sum(1).mean().sqrt())
        self._rounding = max(_ROUNDING, 2 * torch.finfo(stored_in).eps) * gallery.distance.scale(vectors)
        self._near = _NEAR * spread

    def __call__(self, rows: Tensor, clean: Tensor, targets: Targets) -> Tensor:
        """``(n,)`` index of an item that a query may find and that has its image; -1: there is none.

        Args:
            rows: ``(n,)`` which queries.
            clean: ``(n, D)`` their embeddings.
            targets: which items they may find.
        """
        vectors, others = (self._gallery.distance.vectors(e).double() for e in (clean, self._gallery.embeddings))
        parts = [
            torch.cdist(vectors, others[part]).masked_fill(targets.is_left_out(part), torch.inf)
            for part in batches(len(others), 8192)
        ]
        apart = torch.cat(parts, 1)
        if not self._items.has_images:
            least = apart.min(1)
            return torch.where(least.values <= min(self._rounding, self._near), least.indices, -1)
        last = apart.topk(min(_CANDIDATES, len(others)), dim=1, largest=False).values[:, -1]
        near = (last + self._rounding).clamp(max=max(self._rounding, self._near))  # with those as near as the last
        found = torch.full_like(rows, -1)
        for place in (apart.amin(1) <= near).nonzero().flatten().tolist():
            close = (apart[place] <= near[place]).nonzero().flatten()
            found[place] = self._same(rows[place], close[apart[place, close].argsort(stable=True)])
        return found

    def _same(self, row: Tensor, items: Tensor) -> int:
        """The first of some items that has the image of a query; -1: none has."""
        image = self._queries[row.unsqueeze(0)]
        if len(items) > 2 * _CANDIDATES:  # as of codes, which many images share
            alike = (self._summaries[items] - _summaries(image)).abs().amax(1) <= _SAME_PIXELS
            items = items[alike]
        images = self._items[items] if len(items) else image[:0]
        if images.shape[1:] != image.shape[1:]:
            return -1
        same = items[(images - image).flatten(1).abs().amax(1) <= _SAME_PIXELS]
        return int(same[0]) if len(same) else -1

    @cached_property
    def _summaries(self) -> Tensor:
        parts = torch.arange(len(self._items)).split(_TOGETHER)
        return torch.cat([_summaries(self._items[part]) for part in parts])


def _summaries(images: Tensor) -> Tensor:
    """``(n, 16)``, or as many as there are pixels: means over parts, which differ by no more than pixels do."""
    flat = images.flatten(1)
    return adaptive_avg_pool1d(flat.unsqueeze(1), min(16, flat.shape[1])).squeeze(1)
