"""Friendly PGD: rows that are wrong already stop."""

from __future__ import annotations

import torch
from torch import Tensor

from .ball import per_image
from .objective import Objective
from .pgd import PGD, ascent


class FriendlyPGD(PGD):
    """l-inf PGD in which a row stops once its score is above ``enough``.

    As in friendly adversarial training (Zhang et al., arXiv 2002.11242): what is wrong already need not be made worse.
    With the package's own score, 0 is where the nearest wrong row is as near as the furthest right one. It saves the
    passes of rows that have stopped. On an accelerator the host waits in each step for how many rows go on.

    Args:
        objective, eps, alpha: as in `PGD`.
        steps: the largest number of steps that a row takes.
        enough: the score above which a row stops.

    Raises:
        AttackError: an option cannot be used.
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

    def start(self, inputs: Tensor) -> Tensor:
        """A random point of the ball; no row has stopped yet."""
        self._rows = torch.arange(len(inputs), device=inputs.device)
        return super().start(inputs)

    def gradient(self, points: Tensor) -> Tensor:
        """The gradient of the rows that go on; 0 for those that have stopped."""
        full, rows = torch.zeros_like(points), self._rows
        if not len(rows):
            return full
        score, gradient = ascent(self.objective, points[rows], rows)
        goes_on = score <= self.enough
        self._rows = rows[goes_on]
        return full.index_copy(0, rows, gradient.masked_fill(per_image(~goes_on, gradient), 0))
