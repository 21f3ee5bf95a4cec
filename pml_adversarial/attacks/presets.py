"""Attack factories with published settings, with those of the package's own method, and with given eps and steps."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from ..errors import AttackError
from . import adapter
from .checks import check_eps, check_steps
from .objective import AttackFactory
from .pgd import PGD


def preset(eps: float, steps: int = 3) -> AttackFactory:
    """l-inf PGD from a random start, with steps of ``alpha = 2.5 eps / steps``; eps in pixels of [0, 1].

    Raises:
        AttackError: ``eps`` is not a radius, or ``steps`` is not a number of steps.

    Example:
        >>> from pml_adversarial.attacks import budget
        >>> budget(preset(0.3, steps=5))
        {'eps': 0.3, 'alpha': 0.15}
    """
    eps, steps = check_eps(eps), check_steps(steps)
    return partial(PGD, eps=eps, alpha=2.5 * eps / steps, steps=steps, random_start=True)


PRESET = preset(8 / 255)
"""l-inf PGD of the package's own method: eps 8/255, 3 steps of ``alpha = 2.5 eps / steps``, random start."""

SEED_PAPER = partial(PGD, eps=0.01, alpha=0.004, steps=5, random_start=True)
"""l-inf PGD as in arXiv 2102.07265: eps 0.01, 5 steps of ``alpha = 2 eps / steps``, random start."""

_DEFAULT = {"eps": 8 / 255, "steps": 3}


def attack_of(attack: AttackFactory | None = None, eps: float | None = None, steps: int | None = None) -> AttackFactory:
    """The attack factory, or `preset` where there is none, with the given eps and steps; None: its own.

    Raises:
        AttackError: a value cannot be used, or the factory does not take it, or sets it itself.
    """
    wanted: dict[str, Any] = {}
    if attack is not None:
        adapter.check(attack)
    if eps is not None:
        wanted["eps"] = check_eps(eps, "Linf" if attack is None else adapter.norm_of(attack))
    if steps is not None:
        wanted["steps"] = check_steps(steps)
    if attack is None:
        return preset(**{**_DEFAULT, **wanted}) if wanted else PRESET
    for name, value in wanted.items():
        _check_is_free(attack, name, value)
    return partial(attack, **wanted) if wanted else attack


def seed_paper_attack(eps: float | None = None, steps: int | None = None) -> AttackFactory:
    """`SEED_PAPER`, or the same with another radius or number of steps: ``alpha = 2 eps / steps``."""
    published = SEED_PAPER.keywords
    eps = check_eps(published["eps"] if eps is None else eps)
    steps = check_steps(published["steps"] if steps is None else steps)
    return partial(SEED_PAPER, eps=eps, alpha=2 * eps / steps, steps=steps)


def shown_options(attack: AttackFactory) -> dict[str, Any]:
    """Eps, steps and name of an attack factory, as far as it tells them."""
    parameters = inspect.signature(attack).parameters
    numbers = {name: parameters[name].default for name in _DEFAULT if name in parameters}
    return {**numbers, "attack": _name(attack)}


def _check_is_free(attack: AttackFactory, name: str, value: float) -> None:
    set_by_attack = _keywords(attack)
    if name in set_by_attack:
        raise AttackError(
            f"{name}={value!r} was given, and the attack sets {name}={set_by_attack[name]!r} itself; expected one of "
            f"them. Leave out the keyword {name}, or make the attack without it."
        )
    parameters = inspect.signature(attack).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if name not in parameters and not takes_all:
        raise AttackError(
            f"{name}={value!r} was given, and attack={_name(attack)} takes no keyword {name}. Leave out {name}, or "
            "pass an attack that takes it, such as torchattacks.PGD."
        )


def _keywords(attack: Any) -> dict[str, Any]:
    """The keywords that were bound to a factory in all of its layers."""
    if isinstance(attack, partial):
        return {**_keywords(attack.func), **attack.keywords}
    inner = getattr(attack, "factory", None)
    return {} if inner is None else _keywords(inner)


def _name(attack: Any) -> str:
    while isinstance(attack, partial):
        attack = attack.func
    return getattr(attack, "__name__", type(attack).__name__)
