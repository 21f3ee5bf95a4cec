"""The attack alone in lower precision; what is trained on is computed as ever."""

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

    Only the sign of a gradient moves an input, and distances are taken in single precision all the same. Attacks that
    step by the size of a gradient are better left alone with float16, in which small ones become 0.

    Spares: time and memory where the device computes faster in lower precision; no passes.

    Args:
        factory: the attack, see `attacks`.
        dtype: torch.bfloat16 or torch.float16.

    Raises:
        AttackError: another type, or the factory cannot be one.

    Example:
        >>> from pml_adversarial.attacks import Autocast, budget, preset
        >>> budget(Autocast(preset(0.3, steps=5)))
        {'eps': 0.3, 'alpha': 0.15}
    """

    def __init__(self, factory: AttackFactory, dtype: torch.dtype = torch.bfloat16) -> None:
        if dtype not in _LOWER:
            raise AttackError(f"dtype={dtype!r}; expected one of {', '.join(map(str, _LOWER))}.")
        adapter.check(factory)
        self.factory, self.dtype = factory, dtype
        self.__signature__ = signature(factory)  # by which the budget is found, and scaled

    def __call__(self, objective: Objective, **scaled: float) -> Attack:
        """The attack on the objective."""
        attack = adapter.build(partial(self.factory, **scaled), objective)

        def lowered(inputs: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(inputs.device.type, self.dtype):
                return attack(inputs, labels)

        return lowered
