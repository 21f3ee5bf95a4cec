"""How eps grows: the share of an attack's budget that each training step may spend."""

from __future__ import annotations

from ..errors import InputError

DEFAULT_WARMUP = 200
"""Steps over which `AdversarialLoss` lets eps grow, unless it is told otherwise."""


class EpsSchedule:
    """Eps and alpha grow linearly from 0 to their full values.

    Args:
        warmup: number of steps over which they grow; 0: they have their full values from the start.

    Raises:
        InputError: ``warmup`` is not a whole number of steps.

    Example:
        >>> schedule = EpsSchedule(warmup=10)
        >>> schedule.at(step=5), schedule.at(step=50)
        (0.5, 1.0)
    """

    def __init__(self, warmup: int = 0) -> None:
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise InputError(f"warmup={warmup!r}; expected a whole number of training steps, 0 for no warm-up.")
        self.warmup = warmup

    def at(self, step: int) -> float:
        """The share of the full budget in this step, from 0 to 1."""
        return min(1.0, step / self.warmup) if self.warmup else 1.0
