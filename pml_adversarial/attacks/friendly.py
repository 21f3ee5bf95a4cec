"""Friendly adversarial training: rows that are broken already are not attacked any further."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import Objective
from .pgd import PGD, ascent


class FriendlyPGD(PGD):
    """PGD in which a row stops once its score is above ``enough``.

    As in friendly adversarial training (Zhang et al., arXiv 2002.11242): what is wrong already need not be made worse.
    With the package's own score, 0 is where a wrong row is as near as a right one. Rows that have stopped are passed
    through the model no more.

    It saves the steps of these rows. On an accelerator each step waits for the host, which has to know how many rows go
    on.

    Args:
        objective: what is raised.
        eps: radius, in pixels of [0, 1].
        alpha: length of a step; None: ``2.5 eps / steps``.
        steps: the most steps of a row.
        enough: the score above which a row stops.

    Raises:
        AttackError: ``eps`` is not a radius, or ``steps`` is not a number of steps.
    """

    def __init__(
        self,
        objective: Objective,
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 3,
        enough: float = 0.0,
    ) -> None:
        super().__init__(objective, eps, alpha, steps)
        self.enough = enough

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Inputs ``(M, ...)`` in [0, 1] -> perturbed inputs ``(M, ...)``."""
        low, high = (inputs - self.eps).clamp_(min=0), (inputs + self.eps).clamp_(max=1)
        self._low, self._high = low, high
        points = self.start(inputs)
        going = torch.arange(len(inputs), device=inputs.device)
        for step in range(self.steps):
            score, gradient = ascent(self.objective, points[going], going if step else None)
            goes_on = (score <= self.enough).nonzero().flatten()
            going, gradient = going[goes_on], gradient[goes_on]
            if not len(going):
                break
            self._low, self._high = low[going], high[going]
            moved = points[going].add(self.direction(gradient), alpha=self.step_size(step))
            points = points.index_copy(0, going, self.project(moved, inputs[going]))
        return points
