"""How inputs move up their score: the sign step that several savings share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective import Objective


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
