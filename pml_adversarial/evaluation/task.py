"""The model, the queries and the gallery of an evaluation, ready to be attacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..training.pixels import Normalization, PixelSpace
from .attacks import QueryBatch
from .gallery import Gallery, Targets
from .images import Images, ImageSet


def whole_numbers(values: Any, name: str) -> list[int]:
    """Whole numbers of any kind: a list, a range, an array, a tensor.

    Raises:
        InputError: they are something else.
    """
    try:
        found = torch.as_tensor(values if hasattr(values, "dtype") else list(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}={values!r}; expected whole numbers, in a list or a tensor.") from error
    if found.ndim != 1 or (len(found) and (found.dtype == torch.bool or found.is_floating_point())):
        raise InputError(
            f"{name} is {found.dtype} of shape {tuple(found.shape)}; expected whole numbers, in a list or a tensor."
        )
    return [int(value) for value in found.tolist()]


class Embedder:
    """A model as a function of pixels that counts what it is asked.

    Args:
        model: inputs -> embeddings ``(N, D)``.
        normalization: ``(mean, std)`` if it takes normalised inputs.

    Attributes:
        forward_passes: images embedded so far.
        backward_passes: those of them that may have had a gradient taken.
    """

    def __init__(self, model: nn.Module, normalization: Normalization | None = None) -> None:
        self.model = model
        self._space = PixelSpace(normalization)
        self.forward_passes = self.backward_passes = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels ``(n, C, H, W)`` in [0, 1] -> embeddings ``(n, D)``.

        Raises:
            InputError: the model gives something else.
        """
        with_gradient = pixels.requires_grad and torch.is_grad_enabled()
        self.forward_passes += len(pixels)
        self.backward_passes += len(pixels) * with_gradient
        embeddings = self.model(self._space.to_inputs(pixels))
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != len(pixels):
            found = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise InputError(
                f"The model gave {found} for {len(pixels)} images; expected embeddings ({len(pixels)}, D)."
            )
        if with_gradient and not embeddings.requires_grad:  # the model gives none, which is a gradient of 0
            embeddings = embeddings + 0 * pixels.flatten(1).sum(1, keepdim=True)
        return embeddings


class RetrievalTask:
    """What an evaluation needs to make scenes.

    Args:
        model: images -> embeddings, in eval mode and frozen.
        queries: see `images.Images`.
        gallery: None: the queries, each left out for itself.
        norm: "Linf" or "L2".
        normalization: ``(mean, std)`` if the model takes normalised inputs.
        own: ``(Q,)`` the item of a given gallery that is the query itself, -1 for none; None: no query is in it.

    Raises:
        InputError: ``own`` of another length, without a gallery, or items that do not exist.
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
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.embed = Embedder(model, normalization)
        self.queries = ImageSet(queries, device, "queries")
        self.items = self.queries if gallery is None else ImageSet(gallery, device, "gallery")
        self.own = self._own(own, gallery is None)
        self.leave_one_out = bool((self.own >= 0).any())
        self.norm = norm
        self.gallery: Gallery

    def search(self, embeddings: Tensor) -> None:
        """From now on, these embeddings ``(G, D)`` of the gallery are searched.

        Raises:
            InputError: there are no wrong items, or embeddings are not finite or of another number.
        """
        if len(embeddings) != len(self.items):
            raise InputError(f"There are {len(embeddings)} embeddings for {len(self.items)} items of the gallery.")
        _check_finite(embeddings)
        self.gallery = Gallery(embeddings, self.items.labels)
        if len(self.gallery.classes) < 2:
            raise InputError("All items of the gallery have one label; expected at least two, else nothing is wrong.")

    def known(self, embeddings: Tensor) -> Tensor:
        """Embeddings of the gallery ``(G, D)`` that were not made here, on the model's device.

        Raises:
            InputError: the model's have another dimension.
        """
        with torch.no_grad():
            ours = self.embed(self.queries.pixels([0]))
        if embeddings.ndim != 2 or embeddings.shape[1] != ours.shape[1]:
            raise InputError(
                f"gallery_embeddings are {tuple(embeddings.shape)}; expected ({len(self.items)}, {ours.shape[1]}), as "
                "the model gives them."
            )
        return embeddings.to(self.items.labels.device)

    def targets(self, rows: Tensor) -> Targets:
        """What some queries are to find."""
        return Targets(self.queries.labels[rows], self.own[rows])

    def answerable(self, subset: Sequence[int] | Tensor | None) -> tuple[Tensor, int]:
        """Rows of queries with a right item, and how many have none.

        Raises:
            InputError: indices that do not exist or repeat, or no query has a right item.
        """
        everyone = torch.arange(len(self.queries), device=self.queries.labels.device)
        rows = everyone if subset is None else everyone.new_tensor(whole_numbers(subset, "subset"))
        if not len(rows) or not torch.isin(rows, everyone).all() or len(rows.unique()) < len(rows):
            raise InputError(
                f"subset={rows.tolist()[:8]}; expected different indices, one at least, below {len(everyone)}."
            )
        has_right = self.gallery.num_right(self.targets(rows)) > 0
        if not has_right.any():
            raise InputError(
                f"None of {len(rows)} queries has a right item in the gallery; expected labels that occur there"
                + (" at least twice." if self.leave_one_out else ".")
            )
        return rows[has_right], int((~has_right).sum())

    def batch(self, rows: Tensor) -> QueryBatch:
        """Some queries before the gallery.

        Raises:
            InputError: the model gives something else than finite embeddings for them.
        """
        images = self.queries.pixels(rows)
        targets = self.targets(rows)
        with torch.no_grad():
            known = bool((targets.own >= 0).all())
            clean = self.gallery.embeddings[targets.own] if known else self.embed(images)
        _check_finite(clean)
        return QueryBatch(
            self.embed, (self.embed.model,), self.gallery, self.items.pixels, images, clean, targets, self.norm
        )

    def _own(self, own: Sequence[int] | Tensor | None, is_gallery: bool) -> Tensor:
        device, count = self.queries.labels.device, len(self.queries)
        if own is None:
            return torch.arange(count, device=device) if is_gallery else torch.full((count,), -1, device=device)
        found = torch.tensor(whole_numbers(own, "own"), dtype=torch.long, device=device)
        exists = (found >= -1) & (found < len(self.items))
        if is_gallery or len(found) != count or not bool(exists.all()):
            raise InputError(
                f"own holds {found.tolist()[:8]}...; expected for each of {count} queries the index of the item that "
                "is the query itself, or -1, together with a gallery."
            )
        return found


def _check_finite(embeddings: Tensor) -> None:
    bad = int((~embeddings.isfinite()).any(1).sum())
    if bad:
        raise InputError(f"The model gave NaN or infinite embeddings for {bad} of {len(embeddings)} clean images.")
