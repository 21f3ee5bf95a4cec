"""How a score is raised within a ball around clean images: projected ascent with momentum."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..attacks import Attack
from ..objective import Objective


def within(found: Tensor, clean: Tensor, eps: float, norm: str) -> Tensor:
    """What was found, held to the ball and to [0, 1]; what is not finite becomes clean again."""
    difference = torch.nan_to_num(found.detach().to(clean) - clean, nan=0.0, posinf=0.0, neginf=0.0)
    if norm == "Linf":
        return (clean + difference.clamp(-eps, eps)).clamp(0, 1)
    length = like(difference.flatten(1).norm(dim=1), clean)
    return (clean + difference * (eps / length.clamp(min=eps))).clamp(0, 1)


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
        point = within(inputs + eps * in_ball(inputs, norm), inputs, eps, norm) if random_start else inputs.clone()
        best, highest = inputs, torch.full((len(inputs),), -torch.inf, device=inputs.device)
        direction = torch.zeros_like(inputs)
        for step in range(steps + 1):
            point.requires_grad_(step < steps)
            value = cross_entropy(objective(point), labels, reduction="none")
            higher = value.detach() > highest
            best, highest = torch.where(like(higher, point), point.detach(), best), highest.maximum(value.detach())
            if step < steps:
                gradient = torch.autograd.grad(value.sum(), point)[0].nan_to_num(0.0, 0.0, 0.0)
                direction = momentum * direction + gradient / _size(gradient, norm)
                size = eps * (1 + math.cos(math.pi * step / steps)) / 2
                step_taken = direction.sign() if norm == "Linf" else direction / _size(direction, norm)
                point = within(point.detach() + size * step_taken, inputs, eps, norm)
        return best

    return attack


def in_ball(like_inputs: Tensor, norm: str) -> Tensor:
    """A random point of the unit ball per row."""
    if norm == "Linf":
        return 2 * torch.rand_like(like_inputs) - 1
    noise = torch.randn_like(like_inputs)
    radius = torch.rand(len(noise), device=noise.device, dtype=noise.dtype) ** (1 / noise[0].numel())
    return noise * like(radius / noise.flatten(1).norm(dim=1), noise)


def _size(gradient: Tensor, norm: str) -> Tensor:
    flat = gradient.flatten(1)
    size = flat.abs().mean(1) if norm == "Linf" else flat.norm(dim=1)
    return like(size.clamp(min=torch.finfo(size.dtype).tiny), gradient)


def like(per_row: Tensor, images: Tensor) -> Tensor:
    """``(Q,)`` in a shape that goes with ``(Q, ...)``."""
    return per_row.reshape(-1, *[1] * (images.ndim - 1))
