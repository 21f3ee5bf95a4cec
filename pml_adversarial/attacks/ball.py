"""The ball around an image, in which an attack may move it; pixels are in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..errors import InputError

NORMS = ("Linf", "L2", "L1", "L0", "patch")
"""What bounds a change, by the radius eps.

"Linf", "L2" and "L1" are lengths in pixels of [0, 1]. In "L0", eps positions may change in any way, all channels of a
position together. In "patch", one square of side eps may change in any way. Images ``(M, C, H, W)`` have channels;
in clips, ``(M, C, T, H, W)`` or ``(M, T, C, H, W)``, a position lies in one frame, and a square in all frames. In rows
``(M, D)`` and ``(M, H, W)`` each value is a position of its own.
"""

COUNTS = ("L0", "patch")
"""The norms whose radius is a whole number, of positions."""

_CHANNELS = (1, 3, 4)  # of images; a last axis of this length, shorter than the others, holds them
_BISECTIONS = 50  # each halves the error of the l1 threshold


def radius_text(eps: float, norm: str = "Linf") -> str:
    """An eps as a reader expects it: a multiple of 0.5/255 as a fraction, unless it is a round number too.

    >>> [radius_text(eps, "Linf") for eps in (8 / 255, 0.5 / 255, 0.1, 0.2, 0.12345)], radius_text(2.0, "L2")
    (['8/255', '0.5/255', '0.1', '0.2', '0.1235'], '2')
    """
    levels = round(eps * 510) / 2
    meant = norm == "Linf" and 0 < levels < 255 and abs(eps * 255 - levels) < 1e-4 and float(f"{eps:.2g}") != eps
    return f"{levels:g}/255" if meant else f"{eps:.4g}"


def project(points: Tensor, clean: Tensor, eps: float, norm: str = "Linf") -> Tensor:
    """Moves points ``(M, ...)`` into balls around clean ones and into [0, 1], in the type of the clean ones, detached.

    eps and norm are as in `NORMS`. A value that is not finite becomes the clean one. In "L1", "L0" and "patch" it is
    the nearest of the points that lie in both; "L0" and "patch" keep the positions whose change is largest.
    """
    difference = torch.nan_to_num(points.detach().to(clean) - clean, nan=0.0, posinf=0.0, neginf=0.0)
    if norm == "Linf":
        return (clean + difference.clamp(-eps, eps)).clamp(0, 1)
    if norm == "L2":
        length = per_image(difference.flatten(1).norm(dim=1), clean)
        return (clean + difference * (eps / length.clamp(min=eps))).clamp(0, 1)
    allowed = difference.clamp(-clean, 1 - clean)
    if norm == "L1":
        return (clean + _shortened(difference, allowed, eps)).clamp(0, 1)
    gain = difference.square() - (difference - allowed).square()  # in distance to the point, if the change is kept
    return (clean + allowed * chosen(gain, eps, norm)).clamp(0, 1)


def _shortened(difference: Tensor, allowed: Tensor, eps: float) -> Tensor:
    """The changes of l1 length eps at most that are nearest to ``difference`` and keep pixels in [0, 1].

    All absolute values are lowered by one threshold, and cut where the pixels end (Croce and Hein, arXiv 2103.01208,
    section 2). A bisection finds the lowest threshold.
    """
    size, room = difference.abs().flatten(1), allowed.abs().flatten(1)
    low, high = torch.zeros_like(size[:, :1]), size.amax(1, keepdim=True)
    inside = room.sum(1, keepdim=True) <= eps
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_long = (size - middle).clamp(min=0).minimum(room).sum(1, keepdim=True) > eps
        low, high = torch.where(is_long, middle, low), torch.where(is_long, high, middle)
    kept = (size - high.masked_fill(inside, 0)).clamp(min=0).minimum(room)
    return kept.reshape(difference.shape) * difference.sign()


def channel_dim(shape: Sequence[int]) -> int | None:
    """The axis of the channels of an image or clip of a shape without the batch; None: each value is a position.

    Raises:
        InputError: of a clip it cannot be told.
    """
    if len(shape) < 3:
        return None
    fitting = [axis for axis in dict.fromkeys((0, len(shape) - 3)) if len(shape) == 3 or shape[axis] in _CHANNELS]
    if len(fitting) != 1:
        raise InputError(
            f"Of clips of the shape {tuple(shape)} it cannot be told which axis holds the channels, and in norm='L0' "
            "those of a position change together; expected (C, T, H, W) or (T, C, H, W) with 1, 3 or 4 channels and "
            "another number of frames. In norm='patch' it makes no difference."
        )
    return fitting[0]


def check_channels_first(shape: Sequence[int], norm: str) -> None:
    """Refuses an image of a shape such as (224, 224, 3) where the channels of a position count as one.

    Raises:
        InputError: in "L0" or "patch", the channels seem to be last. Rows of the image would be taken for channels.
    """
    if norm in COUNTS and len(shape) == 3 and shape[2] in _CHANNELS and min(shape[:2]) > shape[2]:
        height, width, channels = shape
        raise InputError(
            f"Images have the shape {tuple(shape)}, and norm={norm!r} takes the first axis for the channels; expected "
            f"(C, H, W), such as ({channels}, {height}, {width}). Pass images.permute(0, 3, 1, 2), to a model that "
            "turns them back: lambda images: model(images.permute(0, 2, 3, 1))."
        )


def chosen(weights: Tensor, eps: float, norm: str) -> Tensor:
    """Where ``(M, ...)`` may change, as bool that goes with them: in "L0" or "patch", where most of the weight is."""
    check_channels_first(weights.shape[1:], norm)
    if norm == "L0":
        channels = channel_dim(weights.shape[1:])
        positions = weights if channels is None else weights.sum(1 + channels, keepdim=True)
        return _largest(positions, eps)
    sides = _sides(weights, eps)
    plane = weights.reshape(len(weights), -1, *_plane(weights)).sum(1, keepdim=True)
    best = avg_pool2d(plane.float(), sides, stride=1).flatten(1).argmax(1)
    return _squares(best, weights, sides)


def _largest(positions: Tensor, eps: float) -> Tensor:
    """Bool in the shape ``(M, ...)`` of the positions: the eps largest of each image."""
    flat = positions.flatten(1)
    best = flat.topk(min(int(eps), flat.shape[1]), sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, best, True).reshape(positions.shape)


def chosen_at_random(like: Tensor, eps: float, norm: str) -> Tensor:
    """Random positions that may change in "L0" or "patch", in the form of `chosen`."""
    check_channels_first(like.shape[1:], norm)
    if norm == "L0":
        channels = channel_dim(like.shape[1:])
        values = torch.rand_like(like if channels is None else like.narrow(1 + channels, 0, 1))
        return _largest(values, eps)
    sides = _sides(like, eps)
    corners = math.prod(whole - side + 1 for whole, side in zip(_plane(like), sides, strict=True))
    return _squares(torch.randint(corners, (len(like),), device=like.device), like, sides)


def _plane(images: Tensor) -> tuple[int, int]:
    """Height and width; a row of values has the height 1."""
    return (images.shape[-2], images.shape[-1]) if images.ndim > 2 else (1, images.shape[-1])


def _sides(images: Tensor, eps: float) -> tuple[int, int]:
    height, width = _plane(images)
    return min(int(eps), height), min(int(eps), width)


def _squares(corners: Tensor, like: Tensor, sides: tuple[int, int]) -> Tensor:
    """The squares of the upper left corners ``(M,)``, which are counted row by row among all that fit."""
    height, width = _plane(like)
    columns = width - sides[1] + 1
    down = torch.arange(height, device=like.device) - (corners // columns).unsqueeze(1)
    right = torch.arange(width, device=like.device) - (corners % columns).unsqueeze(1)
    rows, columns_of = ((at >= 0) & (at < side) for at, side in zip((down, right), sides, strict=True))
    inside = rows.unsqueeze(2) & columns_of.unsqueeze(1)
    return inside.reshape(len(like), *[1] * (like.ndim - 3), *like.shape[max(1, like.ndim - 2) :])


def sparse_direction(gradient: Tensor, points: Tensor, eps: float) -> Tensor:
    """The direction ``(M, ...)`` of an l1 step of length 1: the ``4 eps`` largest gradients of pixels that can follow.

    A pixel at the border of [0, 1] cannot follow a gradient that leads out (Croce and Hein, arXiv 2103.01208). Each
    moves in proportion to its gradient: equal parts come to rest before the best point is reached.
    """
    leads_out = ((points <= 0) & (gradient < 0)) | ((points >= 1) & (gradient > 0))
    able = gradient.masked_fill(leads_out, 0).flatten(1)
    best = able.abs().topk(min(math.ceil(4 * eps), able.shape[1]), sorted=False).indices
    largest = torch.zeros_like(able).scatter(1, best, able.gather(1, best))
    length = largest.abs().sum(1, keepdim=True).clamp(min=torch.finfo(able.dtype).tiny)
    return (largest / length).reshape(gradient.shape)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Values ``(M,)`` in the shape ``(M, 1, ...)``, so that each meets its image of ``(M, ...)``."""
    return values.reshape(-1, *[1] * (images.ndim - 1))
