"""What is evaluated: a model that embeds queries, which search a gallery."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..training.pixels import Normalization
from .attacks import QueryBatch
from .embedder import Embedder, check_finite
from .gallery import Gallery, Targets
from .images import Images, ImageSet
from .options import to_rows, to_whole_numbers


class RetrievalTask:
    """A model, queries and the gallery that they search, from the arguments of `evaluate_robustness`.

    Attributes:
        items: images and labels of the gallery.
        gallery: embeddings of the gallery, after `set_gallery`.
        own: ``(Q,)`` index of the item that is the query itself, -1 where it is not in the gallery.
        leave_one_out: whether any query is in the gallery.
    """

    def __init__(
        self,
        model: nn.Module,
        queries: Images,
        gallery: Images | None,
        norm: str,
        normalization: Normalization | None,
        own: Sequence[int] | Tensor | None = None,
    ) -> None:
        self.embed = Embedder(model, normalization)
        self.queries = ImageSet(queries, self.embed.device, "queries")
        self.items = self.queries if gallery is None else ImageSet(gallery, self.embed.device, "gallery")
        self.own = self._own(own, gallery is None)
        self.leave_one_out = bool((self.own >= 0).any())
        self.norm = norm
        self.gallery: Gallery

    def set_gallery(self, embeddings: Tensor) -> None:
        """Uses embeddings ``(G, D)`` of all items as the gallery, if they are finite and of two classes or more."""
        if len(embeddings) != len(self.items):
            raise InputError(
                f"There are {len(embeddings)} embeddings for {len(self.items)} items of the gallery; expected one each."
            )
        self.gallery = Gallery(check_finite(embeddings), self.items.labels)
        if len(self.gallery.classes) < 2:
            raise InputError("All items of the gallery have one label; expected two or more, else no item is wrong.")

    def check_embeddings(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``(G, D)`` that the user gives, on the model's device; D has to be that of the model."""
        with torch.no_grad():
            dimension = self.embed(self.queries[:1]).shape[1]
        if embeddings.ndim != 2 or embeddings.shape[1] != dimension:
            raise InputError(
                f"gallery_embeddings are {tuple(embeddings.shape)}; expected ({len(self.items)}, {dimension}), as the "
                "model gives them."
            )
        return embeddings.to(self.embed.device)

    def targets(self, rows: Tensor) -> Targets:
        """What the queries ``rows`` should find."""
        return Targets(self.queries.labels[rows], self.own[rows])

    def rows_with_right_item(self, subset: Sequence[int] | Tensor | None) -> tuple[Tensor, int]:
        """Indices of the queries of a subset (None: all) that have a right item, one at least; how many have none."""
        rows = to_rows(subset, len(self.queries)).to(self.embed.device)
        has_right = self.gallery.num_right(self.targets(rows)) > 0
        if not has_right.any():
            raise InputError(
                f"None of {len(rows)} queries has a right item in the gallery; expected labels that occur there"
                + (" at least twice." if self.leave_one_out else ".")
            )
        return rows[has_right], int((~has_right).sum())

    def batch(self, rows: Tensor) -> QueryBatch:
        """The queries ``rows`` with the gallery that they search, ready to be attacked."""
        images, targets = self.queries[rows], self.targets(rows)
        with torch.no_grad():
            in_gallery = bool((targets.own >= 0).all())
            clean = self.gallery.embeddings[targets.own] if in_gallery else self.embed(images)
        return QueryBatch(
            embed=self.embed,
            modules=(self.embed.model,),
            gallery=self.gallery,
            pixels_of=self.items.__getitem__,
            images=images,
            clean=check_finite(clean),
            targets=targets,
            norm=self.norm,
        )

    def _own(self, own: Sequence[int] | Tensor | None, is_gallery: bool) -> Tensor:
        device, count = self.embed.device, len(self.queries)
        if own is None:
            return torch.arange(count, device=device) if is_gallery else torch.full((count,), -1, device=device)
        found = torch.tensor(to_whole_numbers(own, "own"), dtype=torch.long, device=device)
        exists = (found >= -1) & (found < len(self.items))
        if is_gallery or len(found) != count or not bool(exists.all()):
            raise InputError(
                f"own holds {found.tolist()[:8]}...; expected, together with a gallery, for each of {count} queries "
                "the index of the item that is the query itself, or -1."
            )
        return found
