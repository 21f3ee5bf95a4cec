"""A model as a function from pixels to embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..training.pixels import Normalization, PixelSpace
from .images import ImageSet

Embed = Callable[[Tensor], Tensor]
"""Pixels ``(n, C, H, W)`` in [0, 1] -> embeddings ``(n, D)``."""


class Embedder:
    """A model that takes pixels, checks its embeddings, and counts the images that it embeds, also with gradient."""

    def __init__(self, model: nn.Module, normalization: Normalization | None = None) -> None:
        self.model = model
        self.device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.forward_passes = self.backward_passes = 0
        self._space = PixelSpace(normalization)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Embeddings ``(n, D)`` of pixels ``(n, C, H, W)`` in [0, 1]; refuses what is not one per image."""
        with_gradient = pixels.requires_grad and torch.is_grad_enabled()
        self.forward_passes += len(pixels)
        self.backward_passes += len(pixels) * with_gradient
        embeddings = self.model(self._space.to_inputs(pixels))
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != len(pixels):
            found = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise InputError(
                f"The model returned {found} for {len(pixels)} images; expected embeddings ({len(pixels)}, D)."
            )
        if with_gradient and not embeddings.requires_grad:  # the model has no gradient, so it is 0
            embeddings = embeddings + 0 * pixels.flatten(1).sum(1, keepdim=True)
        return embeddings

    def check_gradient(self, pixels: Tensor) -> None:
        """Refuses a model whose embeddings of pixels ``(n, C, H, W)`` have no gradient."""
        with torch.enable_grad():
            embeddings = self.model(self._space.to_inputs(pixels.detach().clone().requires_grad_()))
        if isinstance(embeddings, Tensor) and not embeddings.requires_grad:
            raise InputError(
                "The embeddings have no gradient with respect to the images, and the attacks need gradients. Use a "
                "model that computes embeddings with torch, without torch.no_grad() and detach()."
            )


def embed_all(
    embed: Embed, images: Tensor | ImageSet, batch_size: int, advance: Callable[[int], object] | None = None
) -> Tensor:
    """Embeddings ``(N, D)`` of all images, without gradient; ``advance`` takes the number of images of each batch."""
    parts = []
    with torch.no_grad():
        for rows in batches(len(images), batch_size):
            parts.append(embed(images[rows]))
            if advance is not None:
                advance(len(parts[-1]))
    return torch.cat(parts)


def check_finite(embeddings: Tensor) -> Tensor:
    """The same embeddings ``(N, D)``; refuses those that are not finite."""
    bad = int((~embeddings.isfinite()).any(1).sum())
    if bad:
        raise InputError(
            f"The model returned NaN or infinite embeddings for {bad} of {len(embeddings)} images without attack; "
            "expected finite ones."
        )
    return embeddings


def batches(total: int, size: int) -> Iterator[slice]:
    """Slices that cover ``range(total)``, each of at most ``size``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
