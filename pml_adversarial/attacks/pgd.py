"""Projected gradient ascent (PGD): a score is raised by gradient steps within a ball around clean images.

The parts of `PGD` are methods. Every other attack of this package that follows gradients is a `PGD` with some parts of
its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..errors import AttackError
from .ball import COUNTS, NORMS, chosen_at_random, per_image, project, sparse_direction
from .checks import check_choice, check_eps, check_number, check_steps
from .objective import Objective

WIDE = 10.0
"""How far a step in "L0" and "patch" may lead, on average over pixels of [0, 1].

Far out of [0, 1], the projection compares slopes; near, it would keep the positions that it has kept before.
"""


class PGD:
    """PGD with steps of a constant length (Madry et al., arXiv 1706.06083); the last point is returned.

    A row that the score calls satisfied does not move, see `objective.Score`.

    Args:
        objective: what is raised.
        eps: radius of the ball, see `ball.NORMS`; for lengths in pixels of [0, 1].
        alpha: length of a step, in pixels of [0, 1]; None: ``2.5 eps / steps``, in "L0" and "patch" ``25 / steps``.
        steps: number of steps.
        random_start: whether it starts at a random point of the ball instead of the clean inputs.
        norm: "Linf", with steps along the gradient's sign; "L2", with steps along the gradient; "L1", with steps of few
            pixels, see `ball.sparse_direction`; "L0" (PGD0, Croce and Hein, arXiv 1909.05040) and "patch", with steps
            along the gradient in all pixels, ``alpha`` on average, of which the projection keeps the largest.

    Raises:
        AttackError: an option cannot be used.

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
        norm: str = "Linf",
    ) -> None:
        self.norm = check_choice("norm", norm, NORMS, error=AttackError)
        self.eps = check_eps(eps, norm)
        self.steps = check_steps(steps)
        self.reach = WIDE if norm in COUNTS else self.eps
        self.alpha = 2.5 * self.reach / steps if alpha is None else check_number("alpha", alpha, error=AttackError)
        self.objective, self.random_start = objective, random_start

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Perturbs inputs ``(M, ...)`` in [0, 1]. Labels are not used."""
        projection = self.projection(inputs)
        points = self.start(inputs)
        for step in range(self.steps):
            direction = self.direction(self.gradient(points), points)
            points = projection(points.add(direction, alpha=self.step_size(step)))
        return self.result(points)

    def start(self, inputs: Tensor) -> Tensor:
        """The first points ``(M, ...)``."""
        if not self.random_start:
            return inputs
        return uniform_noise(inputs, self.eps, self.norm).add_(inputs).clamp_(0, 1)

    def gradient(self, points: Tensor) -> Tensor:
        """The gradient ``(M, ...)`` of the scores; 0 for satisfied rows."""
        score, gradient = ascent(self.objective, points)
        if self.objective.satisfied is None:
            return gradient
        return gradient.masked_fill(per_image(self.objective.satisfied(score.detach()), gradient), 0)

    def step_size(self, step: int) -> float:
        """The length of a step, in pixels of [0, 1]."""
        return self.alpha

    def direction(self, gradient: Tensor, points: Tensor) -> Tensor:
        """The direction ``(M, ...)`` of a step from points, of length 1 in the norm."""
        if self.norm == "Linf":
            return gradient.sign()
        if self.norm == "L1":
            return sparse_direction(gradient, points, self.eps)
        return gradient / row_length(gradient, mean_absolute=self.norm != "L2")

    def projection(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that moves points ``(M, ...)`` into the ball around the inputs, and into [0, 1]."""
        if self.norm != "Linf":
            return partial(project, clean=inputs, eps=self.eps, norm=self.norm)
        low, high = (inputs - self.eps).clamp_(min=0), (inputs + self.eps).clamp_(max=1)
        return lambda points: torch.clamp(points, low, high)

    def result(self, points: Tensor) -> Tensor:
        """What is returned; ``points`` are the last ones."""
        return points


class MomentumPGD(PGD):
    """PGD with momentum and with steps that fall from eps to 0 along a cosine; it returns the best point of each row.

    The momentum is that of MI-FGSM (Dong et al., arXiv 1710.06081), and the best point of a row's path is what APGD
    returns (Croce and Hein, arXiv 2003.01690). One more forward pass is spent on the last point. A gradient that is not
    finite counts as 0.

    Args:
        objective, eps, steps, norm, random_start: as in `PGD`.
        momentum: share of the past direction that is kept.

    Raises:
        AttackError: an option cannot be used.
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
        super().__init__(objective, eps, steps=steps, random_start=random_start, norm=norm)
        self.momentum = check_number("momentum", momentum, 0, 1, error=AttackError)

    def start(self, inputs: Tensor) -> Tensor:
        """The first points. What was remembered of an earlier run is forgotten."""
        self._velocity = torch.zeros_like(inputs)
        self._best, self._highest = inputs, torch.full((len(inputs),), -torch.inf, device=inputs.device)
        return super().start(inputs)

    def gradient(self, points: Tensor) -> Tensor:
        """The gradient of the scores. The points are remembered where they are the best so far."""
        score, gradient = ascent(self.objective, points)
        self._keep_best(points, score.detach())
        return gradient.nan_to_num(0.0, 0.0, 0.0)

    def step_size(self, step: int) -> float:
        """From eps, in "L0" and "patch" from `WIDE`, to 0 along a cosine."""
        return self.reach * (1 + math.cos(math.pi * step / self.steps)) / 2

    def direction(self, gradient: Tensor, points: Tensor) -> Tensor:
        """The direction of the velocity, to which the gradient is added at a length of 1."""
        length = row_length(gradient, mean_absolute=self.norm != "L2")
        self._velocity = self.momentum * self._velocity + gradient / length
        return super().direction(self._velocity, points)

    def result(self, points: Tensor) -> Tensor:
        """The best points, the last ones included."""
        with torch.no_grad():
            self._keep_best(points, self.objective.mean_score(points))
        return self._best

    def _keep_best(self, points: Tensor, score: Tensor) -> None:
        higher = score > self._highest
        self._best = torch.where(per_image(higher, points), points, self._best)
        self._highest = torch.where(higher, score, self._highest)


def ascent(objective: Objective, points: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores ``(K,)`` of points ``(K, ...)``, whose graph is freed, and the gradient ``(K, ...)`` of their sum.

    With ``objective.samples``, both are means over so many draws, one after the other: expectation over transformation
    (EOT, Athalye et al., arXiv 1707.07397). ``rows`` are those of `Objective.score`.
    """
    points = points.detach().requires_grad_()
    score, gradient = _ascent_of_one_draw(objective, points, rows)
    for _ in range(objective.samples - 1):
        another = _ascent_of_one_draw(objective, points, rows)
        score, gradient = score + another[0], gradient + another[1]
    return (score, gradient) if objective.samples == 1 else (score / objective.samples, gradient / objective.samples)


def _ascent_of_one_draw(objective: Objective, points: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    score = objective.score(points, rows, alone=False)
    (gradient,) = torch.autograd.grad(score.sum(), points)
    return score, gradient


def uniform_noise(like: Tensor, eps: float = 1.0, norm: str = "Linf") -> Tensor:
    """A random point of the ball of radius eps around 0 for each row, in the shape and type of ``like``.

    In "L0" and "patch", random positions have random values in [-1, 1].
    """
    if norm == "Linf":
        return torch.empty_like(like).uniform_(-eps, eps)
    if norm in COUNTS:
        return torch.empty_like(like).uniform_(-1, 1) * chosen_at_random(like, eps, norm)
    count = like[0].numel()
    if norm == "L1":  # the shares of independent exponential parts, of which one is the distance to the border
        parts = torch.empty(len(like), count + 1, device=like.device, dtype=like.dtype).exponential_()
        signs = torch.randint_like(like, 2).mul_(2).sub_(1)
        return signs * (eps * parts[:, 1:] / parts.sum(1, keepdim=True)).reshape(like.shape)
    direction = torch.randn_like(like)
    radius = torch.rand(len(like), device=like.device, dtype=like.dtype) ** (1 / count)
    return direction * per_image(eps * radius / direction.flatten(1).norm(dim=1), direction)


def row_length(vectors: Tensor, mean_absolute: bool = False) -> Tensor:
    """Euclidean length, or mean absolute value, of each row of ``(M, ...)``: above 0, in a shape that goes with it."""
    flat = vectors.flatten(1)
    length = flat.abs().mean(1) if mean_absolute else flat.norm(dim=1)
    return per_image(length.clamp(min=torch.finfo(length.dtype).tiny), vectors)
