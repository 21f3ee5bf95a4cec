"""Attack factories with published settings, and with those of the package's own method."""

from __future__ import annotations

from functools import partial

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
