"""A black-box attack by random search: squares of the image are changed, and what raises the score is kept.

After Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search" (arXiv
1912.00049), in l-inf and l2; in the other norms, after Croce et al., "Sparse-RS" (arXiv 2006.12834). It sees outputs of
the model alone, and takes images of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attacks.ball import per_image, project
from ...attacks.objective import Score
from ..retrieval.batch import QueryBatch

_HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 steps: the share of the image that changes
_FIRST_SHARE = 0.8

Proposal = Callable[[Tensor, Tensor, float, float], Tensor]
"""Clean images and the best points ``(n, C, H, W)``, eps, the share of the image to change -> new points."""


def square_attack(
    score: Callable[[QueryBatch, int], Score], queries: int = 500
) -> Callable[[QueryBatch, float, int], Tensor]:
    """Random search that raises a score, as `QueryAttack` takes it.

    Args:
        score: the score of a batch. A query whose score is 0 or above is broken, and is not asked about any more.
        queries: how often the model is asked about each query, at most.
    """
    return partial(search_squares, score=score, queries=queries)


def search_squares(
    batch: Any, eps: float, restart: int, *, score: Callable[[Any, int], Score], queries: int, goal: float = 0.0
) -> Tensor:
    """Images ``(n, C, H, W)`` of a batch of queries or of pairs as random search perturbed them, see `square_attack`.

    An image whose score is ``goal`` or above is not asked about any more.
    """
    search = _Search(batch, score, eps, restart, goal)
    for step in range(queries):
        if not len(search.open):
            break
        search.step(_share(step, queries), is_first=step == 0)
    return search.best.reshape(batch.images.shape)


class _Search:
    """The best points so far; `open` are the rows that have not reached the goal."""

    def __init__(self, batch: Any, score: Callable[[Any, int], Score], eps: float, restart: int, goal: float) -> None:
        self._batch, self._make_score, self._eps, self._restart, self._goal = batch, score, eps, restart, goal
        self._propose = _PROPOSALS.get(batch.norm, _sparse)
        self._clean = _as_images(batch.images)
        self.best = self._clean.clone()
        self.open = torch.arange(len(batch), device=batch.images.device)
        self._part = batch
        self._score = score(batch, restart)
        self._highest = torch.full((len(batch),), -torch.inf, device=batch.images.device)

    def step(self, share: float, is_first: bool) -> None:
        rows, norm = self.open, self._batch.norm
        clean, best = self._clean[rows], self.best[rows]
        start = _STARTS.get(norm)
        points = start(clean, self._eps) if is_first and start else self._propose(clean, best, self._eps, share)
        images = self._part.images
        points = project(points.reshape(images.shape), images, self._eps, norm)
        with torch.no_grad():
            found = self._score(self._part.embed(points)).to(self._highest)
        higher = found >= self._highest[rows]
        self.best[rows] = torch.where(per_image(higher, clean), points.reshape(clean.shape), best)
        self._highest[rows] = torch.where(higher, found, self._highest[rows])
        still = self._highest[rows] < self._goal
        if not still.all():
            self.open = rows[still]
            self._part = self._batch[self.open]
            if len(self.open):
                self._score = self._make_score(self._part, self._restart)


def _as_images(inputs: Tensor) -> Tensor:
    """Inputs ``(N, ...)`` of any shape as ``(N, C, H, W)``."""
    if inputs.ndim == 2:
        return inputs[:, None, None]
    if inputs.ndim == 3:
        return inputs.unsqueeze(2)
    return inputs.flatten(1, -3)


def _share(step: int, total: int) -> float:
    """The share of the image that a step changes."""
    scaled = 10_000 * step / max(total, 1)
    return _FIRST_SHARE / 2 ** sum(scaled > at for at in _HALVED_AT)


def _sides(share: float, images: Tensor, least: int = 1) -> tuple[int, int]:
    """Height and width of a square that covers a share of the image; at most the whole image."""
    height, width = images.shape[2:]
    side = max(least, round(math.sqrt(share * height * width)))
    return min(side, height), min(side, width)


def _windows(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """``(N, 1, H, W)`` bool: a random rectangle of these sides for each image."""
    inside = []
    for length, side in zip(images.shape[2:], sides, strict=True):
        first = torch.randint(length - side + 1, (len(images), 1), device=images.device)
        places = torch.arange(length, device=images.device)
        inside.append((places >= first) & (places < first + side))
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)


def _signs(images: Tensor, height: int = 1, width: int = 1) -> Tensor:
    """``(N, C, height, width)`` of 1 and -1, drawn at random."""
    shape = (*images.shape[:2], height, width)
    return 2 * torch.randint(2, shape, device=images.device).to(images) - 1


# l-inf: within a square, each channel moves to a border of the ball.


def _stripes(clean: Tensor, eps: float) -> Tensor:
    return clean + eps * _signs(clean, width=clean.shape[3])


def _corners(clean: Tensor, best: Tensor, eps: float, share: float) -> Tensor:
    window = _windows(clean, _sides(share, clean))
    return torch.where(window, clean + eps * _signs(clean), best)


# l2: what was changed in two windows, and the budget that is left, goes to one of them. Flat windows of two pixels and
# more broke more queries than the bumps of the paper.


def _noise(clean: Tensor, eps: float) -> Tensor:
    return clean + eps * _unit(_signs(clean, *clean.shape[2:]))


def _moved_budget(clean: Tensor, best: Tensor, eps: float, share: float) -> Tensor:
    sides = _sides(share, clean, least=2)
    to, other = _windows(clean, sides), _windows(clean, sides)
    change = best - clean
    kept = change.masked_fill(to | other, 0)
    budget = (eps**2 - kept.flatten(1).square().sum(1)).clamp(min=0).sqrt()
    added = _unit(change * to) + _unit(_signs(clean) * to)
    return clean + kept + per_image(budget, clean) * _unit(added)


def _unit(change: Tensor) -> Tensor:
    length = change.flatten(1).norm(dim=1)
    return change / per_image(length.clamp(min=torch.finfo(change.dtype).tiny), change)


# l1, l0 and patches: some pixels take extreme values; what is too much is taken back by the projection.


def _sparse(clean: Tensor, best: Tensor, eps: float, share: float) -> Tensor:
    height, width = clean.shape[2:]
    changed = (best != clean).any(1).flatten(1)
    free = torch.rand(len(clean), height * width, device=clean.device)
    count = max(1, min(height * width, math.ceil(share * eps)))
    added = torch.zeros_like(changed).scatter(1, free.topk(count, 1).indices, True)
    removed = torch.zeros_like(changed).scatter(1, (free * changed).topk(count, 1).indices, True) & changed
    extreme = (_signs(clean, height, width) + 1) / 2
    points = torch.where(removed.reshape(-1, 1, height, width), clean, best)
    return torch.where(added.reshape(-1, 1, height, width), extreme, points)


def _patch(clean: Tensor, best: Tensor, eps: float, share: float) -> Tensor:
    """A rectangle within the patch changes its colour; each third time, another patch is drawn in place of it."""
    side = min(int(eps), *clean.shape[2:])
    at = (best != clean).any(1, keepdim=True)
    anew = per_image(~at.flatten(1).any(1) | (torch.rand(len(clean), device=clean.device) < 1 / 3), clean)
    within = _windows(clean, _sides(share, clean)) & _hull(at)
    changed = torch.where(within, (_signs(clean) + 1) / 2, best)
    drawn = torch.where(_windows(clean, (side, side)), (_signs(clean, *clean.shape[2:]) + 1) / 2, clean)
    return torch.where(anew, drawn, changed)


def _hull(mask: Tensor) -> Tensor:
    """``(N, 1, H, W)``: the smallest rectangle around what is True."""

    def between(line: Tensor) -> Tensor:
        return (line.cumsum(1) > 0) & (line.flip(1).cumsum(1).flip(1) > 0)

    rows, columns = (between(mask[:, 0].any(dim)) for dim in (2, 1))
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


_STARTS: dict[str, Callable[[Tensor, float], Tensor]] = {"Linf": _stripes, "L2": _noise}
_PROPOSALS: dict[str, Proposal] = {"Linf": _corners, "L2": _moved_budget, "patch": _patch}
