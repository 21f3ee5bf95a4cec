"""Where an attack may move an image: within a ball around it, and within [0, 1]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_radius(eps: Any) -> bool:
    """Whether ``eps`` is a number above 0 and up to 1, as radii in pixels of [0, 1] are."""
    return isinstance(eps, int | float) and not isinstance(eps, bool) and 0 < eps <= 1


def projected(points: Tensor, clean: Tensor, eps: float, norm: str = "Linf") -> Tensor:
    """The points, moved into the ball and into [0, 1]. Values that are not finite become the clean ones.

    Args:
        points: ``(M, ...)``, of any floating-point type.
        clean: ``(M, ...)`` the centres of the balls, in [0, 1].
        eps: radius, in pixels of [0, 1].
        norm: "Linf" or "L2".
    """
    difference = torch.nan_to_num(points.detach().to(clean) - clean, nan=0.0, posinf=0.0, neginf=0.0)
    if norm == "Linf":
        return (clean + difference.clamp(-eps, eps)).clamp(0, 1)
    length = per_image(difference.flatten(1).norm(dim=1), clean)
    return (clean + difference * (eps / length.clamp(min=eps))).clamp(0, 1)


def uniform_start(like: Tensor, norm: str = "Linf") -> Tensor:
    """One random point of the unit ball around 0 for each row, in the shape and type of ``like``."""
    if norm == "Linf":
        return torch.empty_like(like).uniform_(-1, 1)
    direction = torch.randn_like(like)
    radius = torch.rand(len(like), device=like.device, dtype=like.dtype) ** (1 / like[0].numel())
    return direction * per_image(radius / direction.flatten(1).norm(dim=1), direction)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """``(M,)`` in a shape that goes with images ``(M, ...)``."""
    return values.reshape(-1, *[1] * (images.ndim - 1))
