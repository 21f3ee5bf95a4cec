"""The only door to torchattacks: attacks are built, given their strength, run, and held to their contract.

An attack is a *factory*, called with the objective (a classifier-like module) and returning a callable
``(inputs, labels) -> inputs``. A torchattacks class fits, with ``functools.partial`` for its options, if it raises
the loss of a whole batch; the others are refused with their reason.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torchattacks

from ..errors import AttackError
from .ball import is_radius
from .objective import AttackFactory


def preset(eps: float, steps: int = 3) -> AttackFactory:
    """l-inf PGD from a random start, with steps of ``alpha = 2.5 eps / steps``.

    Raises:
        AttackError: ``eps`` is no radius in pixels of [0, 1], or ``steps`` no number of steps.

    Example:
        >>> from pml_adversarial.attacks import budget
        >>> budget(preset(0.3, steps=5))
        {'eps': 0.3, 'alpha': 0.15}
    """
    if not is_radius(eps):
        raise AttackError(
            f"eps={eps!r}; expected a number above 0 and up to 1, in pixels of [0, 1]: for 8 of 256 levels write "
            "eps=8/255."
        )
    check_steps(steps)
    return partial(torchattacks.PGD, eps=eps, alpha=2.5 * eps / steps, steps=steps, random_start=True)


def check_steps(steps: Any) -> None:
    """Refuses what is no number of attack steps.

    Raises:
        AttackError: it is none.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise AttackError(f"steps={steps!r}; expected a whole number of attack steps, from 1 on.")


PRESET = preset(8 / 255)
"""l-inf PGD of the package's own preset: eps 8/255, 3 steps of alpha = 2.5 eps / steps, random start."""

SEED_PAPER = partial(torchattacks.PGD, eps=0.01, alpha=0.004, steps=5, random_start=True)
"""l-inf PGD as in arXiv 2102.07265: eps 0.01, 5 steps of alpha = 2 eps / steps, random start."""
