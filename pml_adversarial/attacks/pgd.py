"""Projected gradient ascent (PGD): a score is raised by gradient steps within a ball around clean images.

`PGD` is the attack of Madry et al. (arXiv 1706.06083). Its parts are methods: where it starts, how long and in which
direction a step is, where a point is projected to, and which point is returned. Every other attack by gradients of
this package is a `PGD` with some parts of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from .ball import per_image, projected, uniform_start
from .checks import check_eps, check_steps
from .objective import Objective


class PGD:
    """l-inf PGD: sign steps of a constant length, and the last point is returned.

    Rows that the score calls satisfied do not move, see `objective.Score`.

    Args:
        objective: what is raised.
        eps: radius of the ball, in pixels of [0, 1].
        alpha: length of a step, in pixels of [0, 1]; None: ``2.5 eps / steps``.
        steps: number of steps.
        random_start: whether it starts anywhere in the ball, or at the clean inputs.

    Raises:
        AttackError: ``eps`` is not a radius, or ``steps`` is not a number of steps.

    Example:
        >>> from functools import partial
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_adversarial import AdversarialLoss
        >>> attack = partial(PGD, eps=8 / 255, alpha=2 / 255, steps=10)
        >>> loss_func = AdversarialLoss(ContrastiveLoss(), torch.nn.Flatten(), attack=attack)
    """

    def __init__(
        self,
        objective: Objective,
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 3,
        random_start: bool = True,
    ) -> None:
        check_eps(eps)
        check_steps(steps)
        self.objective, self.eps, self.steps, self.random_start = objective, eps, steps, random_start
        self.alpha = 2.5 * eps / steps if alpha is None else alpha

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Inputs ``(M, ...)`` in [0, 1] -> perturbed inputs ``(M, ...)``. Labels are not needed."""
        self._low, self._high = (inputs - self.eps).clamp_(min=0), (inputs + self.eps).clamp_(max=1)
        points = self.start(inputs)
        for step in range(self.steps):
            score, gradient = ascent(self.objective, points)
            self.seen(points, score)
            moved = self.project(points.add(self.direction(gradient), alpha=self.step_size(step)), inputs)
            points = moved if self.objective.satisfied is None else self._without_satisfied(points, moved, score)
        return self.result(points)

    def start(self, inputs: Tensor) -> Tensor:
        """The first point ``(M, ...)``."""
        if not self.random_start:
            return inputs
        return self.project(torch.empty_like(inputs).uniform_(-self.eps, self.eps).add_(inputs), inputs)

    def step_size(self, step: int) -> float:
        """Length of a step."""
        return self.alpha

    def direction(self, gradient: Tensor) -> Tensor:
        """Direction ``(M, ...)`` of a step."""
        return gradient.sign()

    def project(self, points: Tensor, inputs: Tensor) -> Tensor:
        """The nearest points ``(M, ...)`` in the ball around the inputs and in [0, 1]."""
        return torch.clamp(points, self._low, self._high)

    def seen(self, points: Tensor, score: Tensor) -> None:
        """Is told the score ``(M,)`` of every point that is passed."""

    def result(self, points: Tensor) -> Tensor:
        """What is returned, of the last points ``(M, ...)``."""
        return points

    def _without_satisfied(self, points: Tensor, moved: Tensor, score: Tensor) -> Tensor:
        satisfied = cast(Callable[[Tensor], Tensor], self.objective.satisfied)(score.detach())
        return torch.where(per_image(satisfied, points), points, moved)


class MomentumPGD(PGD):
    """PGD with momentum, with steps that fall from eps to 0 along a cosine; the best point of each row is returned.

    The momentum is that of MI-FGSM (Dong et al., arXiv 1710.06081). Like APGD (Croce and Hein, arXiv 2003.01690) it
    returns the best point of each row's path. It breaks more queries than torchattacks' PGD with as many gradients, and
    its settings hardly matter. Where a gradient is not finite, it counts as 0.

    Args:
        objective: what is raised.
        eps: radius of the ball, in pixels of [0, 1].
        steps: gradient steps; one more forward pass is spent on the last point.
        norm: "Linf", with sign steps, or "L2".
        momentum: share of the past direction that is kept.
        random_start: whether it starts anywhere in the ball, or at the clean inputs.
    """

    def __init__(
        self,
        objective: Objective,
        eps: float,
        steps: int,
        norm: str = "Linf",
        momentum: float = 0.75,
        random_start: bool = True,
    ) -> None:
        self.objective, self.eps, self.steps, self.random_start = objective, eps, steps, random_start
        self.norm, self.momentum = norm, momentum

    def start(self, inputs: Tensor) -> Tensor:
        """The first point, and nothing that is remembered of an earlier run."""
        self._best, self._highest = inputs, torch.full((len(inputs),), -torch.inf, device=inputs.device)
        self._velocity = torch.zeros_like(inputs)
        return projected(self._anywhere(inputs), inputs, self.eps, self.norm) if self.random_start else inputs.clone()

    def step_size(self, step: int) -> float:
        """From eps to 0 along a cosine."""
        return self.eps * (1 + math.cos(math.pi * step / self.steps)) / 2

    def direction(self, gradient: Tensor) -> Tensor:
        """The velocity, as a step of length 1."""
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        self._velocity = self.momentum * self._velocity + gradient / self._length(gradient)
        return self._velocity.sign() if self.norm == "Linf" else self._velocity / self._length(self._velocity)

    def project(self, points: Tensor, inputs: Tensor) -> Tensor:
        """The nearest points in the ball of the norm and in [0, 1]."""
        return projected(points, inputs, self.eps, self.norm)

    def seen(self, points: Tensor, score: Tensor) -> None:
        """Keeps the points that are the best so far."""
        score = score.detach()
        higher = score > self._highest
        self._best = torch.where(per_image(higher, points), points, self._best)
        self._highest = torch.maximum(self._highest, score)

    def result(self, points: Tensor) -> Tensor:
        """The best points, the last ones included."""
        with torch.no_grad():
            self.seen(points, self.objective.score(points))
        return self._best

    def _anywhere(self, inputs: Tensor) -> Tensor:
        return inputs + self.eps * uniform_start(inputs, self.norm)

    def _length(self, vectors: Tensor) -> Tensor:
        """Mean absolute value for "Linf", Euclidean length for "L2", of each row, in a shape that goes with it."""
        flat = vectors.flatten(1)
        length = flat.abs().mean(1) if self.norm == "Linf" else flat.norm(dim=1)
        return per_image(length.clamp(min=torch.finfo(length.dtype).tiny), vectors)


def ascent(objective: Objective, points: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores ``(K,)`` of points ``(K, ...)``, whose graph is gone, and the gradient ``(K, ...)`` of their sum.

    Args:
        objective: what is raised.
        points: where the inputs are.
        rows: ``(K,)`` which rows they are, where they are not all of them.
    """
    points = points.detach().requires_grad_()
    score = objective.score(points, rows)
    (gradient,) = torch.autograd.grad(score.sum(), points)
    return score, gradient
