"""The ball around an image, in which an attack may move it; pixels are in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def project(points: Tensor, clean: Tensor, eps: float, norm: str = "Linf") -> Tensor:
    """Moves points ``(M, ...)`` into balls around clean ones and into [0, 1], in the type of the clean ones, detached.

    The radius eps is in pixels of [0, 1], the norm "Linf" or "L2". A value that is not finite becomes the clean one.
    """
    difference = torch.nan_to_num(points.detach().to(clean) - clean, nan=0.0, posinf=0.0, neginf=0.0)
    if norm == "Linf":
        return (clean + difference.clamp(-eps, eps)).clamp(0, 1)
    length = per_image(difference.flatten(1).norm(dim=1), clean)
    return (clean + difference * (eps / length.clamp(min=eps))).clamp(0, 1)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Values ``(M,)`` in the shape ``(M, 1, ...)``, so that each meets its image of ``(M, ...)``."""
    return values.reshape(-1, *[1] * (images.ndim - 1))
