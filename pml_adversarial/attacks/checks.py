"""Checks of options: each returns the value, or raises an error that names the option and what it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..errors import AdversarialError, AttackError, InputError


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
    """Checks that an option is a finite number of a range.

    Args:
        name: of the option.
        value: what the user gave.
        low: the smallest number that is allowed.
        high: the largest number that is allowed.
        above: whether the number has to be larger than ``low``.
        hint: follows the range in the message, such as ``", such as 0.2"``.
        error: the class of the error.

    Returns:
        The number as a float.

    Raises:
        AdversarialError: of the class ``error``; the value is no number, not finite, or out of the range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (above and value == low):
        raise error(f"{name}={value!r}; expected a number {_range(low, high, above)}{hint}.")
    return float(value)


def check_whole(
    name: str, value: Any, low: int = 1, *, hint: str = "", error: type[AdversarialError] = InputError
) -> int:
    """Checks that an option is a whole number.

    Args:
        name: of the option.
        value: what the user gave.
        low: the smallest number that is allowed.
        hint: follows the range in the message, such as ``", or None for all"``.
        error: the class of the error.

    Returns:
        The number.

    Raises:
        AdversarialError: of the class ``error``; the value is no ``int``, or less than ``low``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise error(f"{name}={value!r}; expected a whole number from {low} on{hint}.")
    return value


def check_choice(
    name: str, value: Any, choices: Iterable[str], *, hint: str = "", error: type[AdversarialError] = InputError
) -> str:
    """Checks that an option is one of a few words.

    Args:
        name: of the option.
        value: what the user gave.
        choices: the words that are allowed.
        hint: follows the words in the message.
        error: the class of the error.

    Returns:
        The word.

    Raises:
        AdversarialError: of the class ``error``; the value is none of the words.
    """
    words = tuple(choices)
    if not isinstance(value, str) or value not in words:
        *others, last = map(repr, words)
        raise error(f"{name}={value!r}; expected {', '.join(others)}{' or ' if others else ''}{last}{hint}.")
    return value


def check_radius(eps: Any, error: type[AdversarialError] = InputError) -> float:
    """Checks that ``eps`` is the radius of a ball in pixels of [0, 1].

    Raises:
        AdversarialError: of the class ``error``; ``eps`` is no number above 0 and up to 1.
    """
    hint = ", in pixels of [0, 1]: for 8 of 256 levels write eps=8/255"
    return check_number("eps", eps, 0, 1, above=True, hint=hint, error=error)


def _range(low: float, high: float, above: bool) -> str:
    if above:
        return f"above {low:g}" + (f" and up to {high:g}" if high < math.inf else "")
    return f"from {low:g} on" if high == math.inf else f"from {low:g} to {high:g}"


def check_eps(eps: Any) -> float:
    """Checks the radius of an attack, see `check_radius`.

    Raises:
        AttackError: ``eps`` is no number above 0 and up to 1.
    """
    return check_radius(eps, AttackError)


def check_steps(steps: Any) -> int:
    """Checks the number of steps of an attack.

    Raises:
        AttackError: ``steps`` is no whole number from 1 on.
    """
    return check_whole("steps", steps, hint=", as the number of attack steps", error=AttackError)
