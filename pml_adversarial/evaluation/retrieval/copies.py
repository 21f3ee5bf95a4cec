"""Which items of a gallery are the image of a query itself, maybe stored in another form."""

from __future__ import annotations

import torch
from torch import Tensor

from .embedder import batches
from .gallery import Gallery, Targets
from .images import ImageSet

_CANDIDATES = 8  # nearest items whose images are compared with a query's
_NEAR = 0.1  # of the spread of the gallery: embeddings of one image, stored in another form, differ by less
_ROUNDING = 1e-4  # of the size of embeddings: those of one image in single precision differ by less
_SAME_PIXELS = 1 / 255  # one image, stored in another form, differs by less in each pixel


def find_copies(
    queries: ImageSet,
    items: ImageSet,
    gallery: Gallery,
    stored_in: torch.dtype,
    rows: Tensor,
    clean: Tensor,
    targets: Targets,
) -> Tensor:
    """``(n,)`` index of an item that a query may find and that has its image; -1: there is none.

    Items with images are compared by their pixels, if their embeddings are near. Others are known by embeddings alone,
    which differ by rounding.

    Args:
        queries: images of the queries.
        items: images of the gallery, or its labels alone.
        gallery: their embeddings.
        stored_in: the type in which the embeddings were given.
        rows: ``(n,)`` which queries.
        clean: ``(n, D)`` their embeddings.
        targets: which items they may find.
    """
    vectors, others = (gallery.distance.vectors(embeddings) for embeddings in (clean, gallery.embeddings))
    apart = torch.cat(
        [
            torch.cdist(vectors.double(), others[part].double()).masked_fill(targets.is_left_out(part), torch.inf)
            for part in batches(len(others), 8192)
        ],
        1,
    )
    apart, nearest = apart.topk(min(_CANDIDATES, len(others)), dim=1, largest=False)
    spread = float((others - others.mean(0)).double().square().sum(1).mean().sqrt())
    rounding = max(_ROUNDING, 2 * torch.finfo(stored_in).eps) * gallery.distance.scale(others)
    if not items.has_images:
        return torch.where(apart[:, 0] <= min(rounding, _NEAR * spread), nearest[:, 0], -1)
    near, found = max(rounding, _NEAR * spread), torch.full_like(rows, -1)
    for place in (apart[:, 0] <= near).nonzero().flatten().tolist():
        close = nearest[place][apart[place] <= near]
        images, image = items[close], queries[rows[place : place + 1]]
        if images.shape[1:] == image.shape[1:]:
            same = (images - image).flatten(1).abs().amax(1) <= _SAME_PIXELS
            found[place] = close[same][0] if same.any() else -1
    return found
