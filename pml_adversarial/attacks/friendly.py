"""Rows that are broken already take no further steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .ball import drawn, projected
from .objective import Objective
from .pgd import ascend
from .presets import check_steps


class FriendlyPGD:
    """l-inf PGD from a random start in which a row rests once its score is above ``enough``.

    As in friendly adversarial training (Zhang et al., arXiv 2002.11242): what is wrong already need not be made worse.
    With the package's own score, 0 is where a wrong row is as near as a right one. Rows at rest are passed no more.

    Spares: the steps of rows at rest. On an accelerator each step waits for the host, which has to
    know how many go on.

    Args:
        objective: what is raised.
        eps: radius, in pixels of [0, 1].
        alpha: step; None: ``2.5 eps / steps``.
        steps: at most.
        enough: the score at which a row rests.

    Raises:
        AttackError: ``steps`` is no number of steps.
    """

    def __init__(
        self,
        objective: Objective,
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 3,
        enough: float = 0.0,
    ) -> None:
        check_steps(steps)
        self.objective, self.eps, self.steps, self.enough = objective, eps, steps, enough
        self.alpha = 2.5 * eps / steps if alpha is None else alpha

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Inputs ``(M, ...)`` -> perturbed inputs ``(M, ...)``."""
        points = projected(inputs + self.eps * drawn(inputs), inputs, self.eps)
        going = torch.arange(len(inputs), device=inputs.device)
        for step in range(self.steps):
            moved, score = ascend(self.objective, points[going], self.alpha, going if step else None)
            moves = (score <= self.enough).nonzero().flatten()
            going, moved = going[moves], moved[moves]
            if not len(going):
                break
            points = points.index_copy(0, going, projected(moved, inputs[going], self.eps))
        return points
