"""Checks of the numbers that attacks are made with."""

from __future__ import annotations

from typing import Any

from ..errors import AttackError
from .ball import is_radius


def check_eps(eps: Any) -> None:
    """Refuses what is not a radius.

    Raises:
        AttackError: ``eps`` is not a number above 0 and up to 1.
    """
    if not is_radius(eps):
        raise AttackError(
            f"eps={eps!r}; expected a number above 0 and up to 1, in pixels of [0, 1]: for 8 of 256 levels write "
            "eps=8/255."
        )


def check_steps(steps: Any) -> None:
    """Refuses what is not a number of attack steps.

    Raises:
        AttackError: ``steps`` is not a whole number from 1 on.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise AttackError(f"steps={steps!r}; expected a whole number of attack steps, from 1 on.")
