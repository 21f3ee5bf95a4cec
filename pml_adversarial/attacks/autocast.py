"""Autocast: the attack runs in lower precision, and training in its own."""

from __future__ import annotations

from functools import partial
from inspect import signature

import torch
from torch import Tensor

from ..errors import AttackError
from . import adapter
from .objective import Attack, AttackFactory, Objective

_LOWER = (torch.bfloat16, torch.float16)


class Autocast:
    """An attack factory whose passes run under autocast.

    It saves time and memory where the device computes faster in lower precision. Distances are computed in single
    precision all the same. In float16 small gradients become 0, so use it for attacks that need only the sign, as l-inf
    PGD does.

    Args:
        factory: the attack factory, see `attacks`.
        dtype: torch.bfloat16 or torch.float16.

    Raises:
        AttackError: ``dtype`` is another type, or ``factory`` is no attack factory.

    Example:
        >>> from pml_adversarial.attacks import budget, preset
        >>> budget(Autocast(preset(0.3, steps=5)))
        {'eps': 0.3, 'alpha': 0.15}
    """

    def __init__(self, factory: AttackFactory, dtype: torch.dtype = torch.bfloat16) -> None:
        if dtype not in _LOWER:
            raise AttackError(f"dtype={dtype!r}; expected one of {', '.join(map(str, _LOWER))}.")
        adapter.check(factory)
        self.factory, self.dtype = factory, dtype
        self.__signature__ = signature(factory)  # the budget is found in it

    def __call__(self, objective: Objective, **scaled: float) -> Attack:
        """Makes the attack on the objective."""
        attack = adapter.build(partial(self.factory, **scaled), objective)

        def lowered(inputs: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(inputs.device.type, self.dtype):
                return attack(inputs, labels)

        return lowered
