"""How eps grows: the share of an attack's budget that each training step may spend."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_WARMUP = 200
"""Steps over which `AdversarialLoss` lets eps grow, unless it is told otherwise."""


@dataclass(frozen=True)
class EpsSchedule:
    """Eps and alpha grow linearly from 0 to their full values over ``warmup`` steps; 0: they are full from the start.

    Example:
        >>> schedule = EpsSchedule(warmup=10)
        >>> schedule.at(step=5), schedule.at(step=50)
        (0.5, 1.0)
    """

    warmup: int = 0

    def at(self, step: int) -> float:
        """The share of the full budget in this step, from 0 to 1."""
        return min(1.0, step / self.warmup) if self.warmup else 1.0
