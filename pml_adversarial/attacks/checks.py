"""Checks of options: each returns the value, or raises an error that names the option and what it takes.

``hint`` follows the range in the message, such as ``", such as 0.2"``. ``error`` is the class of the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from ..errors import AdversarialError, AttackError, InputError
from .ball import COUNTS


def check_number(
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    hint: str = "",
    error: type[AdversarialError] = InputError,
) -> float:
    """A finite number from ``low`` to ``high``, as a float; with ``above``, ``low`` itself is not allowed."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and low <= value <= high and not (above and value == low):
        return float(value)
    if above:
        allowed = f"above {low:g}" + (f" and up to {high:g}" if high < math.inf else "")
    else:
        allowed = f"from {low:g} on" if high == math.inf else f"from {low:g} to {high:g}"
    raise error(f"{name}={value!r}; expected a number {allowed}{hint}.")


def check_whole(
    name: str, value: Any, low: int = 1, *, hint: str = "", error: type[AdversarialError] = InputError
) -> int:
    """An ``int`` from ``low`` on."""
    found = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if found is None or found < low:
        raise error(f"{name}={value!r}; expected a whole number from {low} on{hint}.")
    return found


def check_choice(
    name: str, value: Any, choices: Iterable[str], *, hint: str = "", error: type[AdversarialError] = InputError
) -> str:
    """One of a few words."""
    words = tuple(choices)
    if not isinstance(value, str) or value not in words:
        *others, last = map(repr, words)
        raise error(f"{name}={value!r}; expected {', '.join(others)}{' or ' if others else ''}{last}{hint}.")
    return value


def check_eps(eps: Any, norm: str = "Linf", error: type[AdversarialError] = AttackError) -> float:
    """The radius of a ball, above 0, see `ball.NORMS`: in "Linf" up to 1, in "L0" and "patch" a whole number."""
    if norm in COUNTS:
        whole = int(eps) if isinstance(eps, float) and eps.is_integer() else eps
        return check_whole("eps", whole, hint=f", of pixels, in norm={norm!r}", error=error)
    hint = ", in pixels of [0, 1]: for 8 of 256 levels write eps=8/255"
    return check_number("eps", eps, 0, 1 if norm == "Linf" else math.inf, above=True, hint=hint, error=error)


def check_steps(steps: Any, error: type[AdversarialError] = AttackError) -> int:
    """The number of steps of an attack, from 1 on."""
    return check_whole("steps", steps, hint=", as the number of attack steps", error=error)
