"""Projected gradient ascent: how a score is raised within a ball around clean images."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .ball import drawn, per_image, projected
from .objective import Attack, Objective


def momentum_pgd(
    objective: Objective, eps: float, steps: int, norm: str = "Linf", momentum: float = 0.75, random_start: bool = True
) -> Attack:
    """An attack from a random start, by steps that fall from eps to 0 along a cosine.

    Projected gradient ascent (Madry et al., arXiv 1706.06083) with the momentum of MI-FGSM (Dong et al., arXiv
    1710.06081); like APGD (Croce, Hein, arXiv 2003.01690) it returns the best point of each row's path. It breaks
    more queries than torchattacks' PGD with the same gradients, and hardly depends on its settings.

    Args:
        objective: what is raised.
        eps: radius, in pixels of [0, 1].
        steps: gradient steps; one more forward pass looks at the last point.
        norm: "Linf", by sign steps, or "L2".
        momentum: share of the past direction that is kept.
        random_start: whether it starts anywhere in the ball, or at the clean inputs.
    """

    def attack(inputs: Tensor, labels: Tensor) -> Tensor:
        point = projected(inputs + eps * drawn(inputs, norm), inputs, eps, norm) if random_start else inputs.clone()
        best, highest = inputs, torch.full((len(inputs),), -torch.inf, device=inputs.device)
        direction = torch.zeros_like(inputs)
        for step in range(steps + 1):
            point.requires_grad_(step < steps)
            value = cross_entropy(objective(point), labels, reduction="none")
            higher = value.detach() > highest
            best, highest = torch.where(per_image(higher, point), point.detach(), best), highest.maximum(value.detach())
            if step < steps:
                gradient = torch.autograd.grad(value.sum(), point)[0].nan_to_num(0.0, 0.0, 0.0)
                direction = momentum * direction + gradient / _size(gradient, norm)
                size = eps * (1 + math.cos(math.pi * step / steps)) / 2
                step_taken = direction.sign() if norm == "Linf" else direction / _size(direction, norm)
                point = projected(point.detach() + size * step_taken, inputs, eps, norm)
        return best

    return attack


def _size(gradient: Tensor, norm: str) -> Tensor:
    flat = gradient.flatten(1)
    size = flat.abs().mean(1) if norm == "Linf" else flat.norm(dim=1)
    return per_image(size.clamp(min=torch.finfo(size.dtype).tiny), gradient)


def ascend(objective: Objective, points: Tensor, alpha: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One sign step up the score, unbounded; and the scores ``(K,)`` before it.

    Args:
        objective: what is raised.
        points: ``(K, ...)`` where the inputs are.
        alpha: length of the step, in pixels of [0, 1].
        rows: ``(K,)`` which rows they are, where it is not all of them.
    """
    points = points.detach().requires_grad_()
    score = objective.score(points, rows)
    (gradient,) = torch.autograd.grad(score.sum(), points)
    return points.detach() + alpha * gradient.sign(), score.detach()
