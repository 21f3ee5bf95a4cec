"""An attack that sees losses only: squares of an image are changed at random, and a change that does no harm stays.

Squares as proposals, from large to small, are those of the Square attack (Andriushchenko et al., arXiv 1912.00049).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..attacks.ball import per_image, project
from .attacks import QueryBatch

NORMS = ("Linf", "L2")  #: In which it can search.
Loss = Callable[[Tensor, Tensor], Tensor]
"""Images ``(n, ...)``, the rows ``(n,)`` they belong to -> a loss for each; it is ``-inf`` where no more is wanted."""

_LARGEST = 0.8  # share of the pixels that the first squares cover
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # share of the search after which it is halved
_TILES = 3  # in each direction, of the first perturbation in l2


def random_search(loss: Loss, images: Tensor, eps: float, norm: str, queries: int) -> Tensor:
    """Images ``(N, ...)`` whose loss was lowered within the budget, by ``queries`` calls of the loss for each at most.

    A change that leaves the loss as it is stays too, so the search goes on where the loss is flat.
    """
    with torch.no_grad():
        points = project(_start(images, eps, norm), images, eps, norm)
        lowest = loss(points, torch.arange(len(images), device=images.device))
        for step in range(1, queries):
            rows = (lowest > -torch.inf).nonzero().squeeze(1)
            if not len(rows):
                break
            clean, before = images[rows], points[rows]
            proposed = project(_changed(before, clean, eps, norm, _share(step / queries)), clean, eps, norm)
            found = loss(proposed, rows)
            taken = found <= lowest[rows]
            points[rows] = torch.where(per_image(taken, proposed), proposed, before)
            lowest[rows] = torch.where(taken, found, lowest[rows])
        return points


def margin_search(batch: QueryBatch, eps: float, queries: int) -> Tensor:
    """Queries ``(Q, C, H, W)`` whose margin was raised by a `random_search`, until the nearest item is wrong."""

    def loss(images: Tensor, rows: Tensor) -> Tensor:
        margin = batch.gallery.margin(batch.embed(images), batch.targets[rows])
        return torch.where(margin >= 0, -torch.inf, -margin)

    return random_search(loss, batch.images, eps, batch.norm, queries)


def _start(images: Tensor, eps: float, norm: str) -> Tensor:
    """Vertical stripes of eps in l-inf; tiles in l2."""
    planes = _as_planes(images)
    count, channels, height, width = planes.shape
    if norm == "Linf":
        return (planes + eps * _signs(planes, (count, channels, 1, width))).reshape(images.shape)
    tiles = interpolate(_signs(planes, (count, channels, _TILES, _TILES)), (height, width))
    return (planes + eps * _directed(tiles)).reshape(images.shape)


def _changed(points: Tensor, clean: Tensor, eps: float, norm: str, share: float) -> Tensor:
    """Points of which one square of pixels has another perturbation; it covers about a share of the image."""
    now, planes = _as_planes(points), _as_planes(clean)
    square = _squares(planes, share) * _signs(planes, (*planes.shape[:2], 1, 1))
    if norm == "Linf":
        return torch.where(square == 0, now, planes + eps * square).reshape(points.shape)
    height = 2 * eps / math.sqrt(planes[0].numel())  # of a perturbation in all pixels that changes its sign
    return (planes + eps * _directed(now - planes + height * square)).reshape(points.shape)


def _squares(planes: Tensor, share: float) -> Tensor:
    """``(n, 1, H, W)`` bool, a square at a random place of each image."""
    count, _, height, width = planes.shape
    side = max(1, round(math.sqrt(share * height * width)))
    inside = []
    for length in (height, width):
        first = torch.randint(max(length - side, 0) + 1, (count, 1), device=planes.device)
        places = torch.arange(length, device=planes.device)
        inside.append((places >= first) & (places < first + side))
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)


def _share(progress: float) -> float:
    """Share of the pixels that a square covers after a share of the search."""
    return _LARGEST * 0.5 ** sum(progress > halving for halving in _HALVINGS)


def _signs(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return 2 * torch.randint(2, shape, device=like.device).to(like) - 1


def _directed(planes: Tensor) -> Tensor:
    """The same directions with length 1."""
    length = planes.flatten(1).norm(dim=1).clamp(min=torch.finfo(planes.dtype).tiny)
    return planes / per_image(length, planes)


def _as_planes(images: Tensor) -> Tensor:
    """Images or other inputs ``(n, ...)`` as ``(n, C, H, W)``."""
    size = images.shape[-2:] if images.ndim > 2 else (1, images.shape[-1])
    return images.reshape(len(images), -1, *size)
