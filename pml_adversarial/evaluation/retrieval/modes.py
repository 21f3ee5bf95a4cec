"""The modes in which a model is evaluated: those in which its user runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...attacks.objective import Objective
from ...training.isolation import depends_on_mode, freeze, is_training, preserved


@contextmanager
def as_deployed(*modules: nn.Module, learns: bool = False) -> Iterator[None]:
    """Puts modules into eval mode, freezes their parameters and enables gradients; restores all, see `preserved`.

    A module that is in eval mode already stays as it is: if a part of it is in train mode, its user wants this, as for
    Monte-Carlo dropout. Any other module is switched by its own ``eval()``, which may do more than set the mode.

    Args:
        modules: any.
        learns: see `preserved`.
    """
    with preserved(*modules, learns=learns), ExitStack() as stack, torch.enable_grad():
        for module in modules:
            if is_training(module):
                stack.enter_context(_switched(module))
        freeze(*modules)
        yield


def left_in_train_mode(*modules: nn.Module) -> list[str]:
    """The parts whose code asks for the mode and that are in train mode, in words such as "3 (Dropout)".

    The code that torch made for a `GraphModule` does not ask.
    """
    return [
        f"{name} ({type(part).__name__})" if name else type(part).__name__
        for module in modules
        for name, part in module.named_modules()
        if not isinstance(part, torch.fx.GraphModule)
        and depends_on_mode(part)
        and not depends_on_mode(*part.children())
    ]


class SteadyObjective(Objective):
    """An `Objective` in which an attack cannot change the modes of the model."""

    def train(self, mode: bool = True) -> SteadyObjective:
        """Changes nothing. `nn.Module.eval`, which attacks of torchattacks call, calls this too."""
        return self


@contextmanager
def _switched(module: nn.Module) -> Iterator[None]:
    """In eval mode. An ``eval`` or ``train`` of a class's own may merge weights or replace parts; this is undone."""
    parts = list(module.modules())
    torch_does_it = all((type(part).train, type(part).eval) == (nn.Module.train, nn.Module.eval) for part in parts)
    weights = [] if torch_does_it else [(weight, weight.detach().clone()) for weight in module.parameters()]
    python = [part for part in parts if not isinstance(part, torch.jit.ScriptModule)]
    held: list[dict[str, Any]] = [names for part in python for names in (part._parameters, part._modules)]
    before = [names.copy() for names in held]
    try:
        module.eval()
    except Exception:  # exported programs refuse it
        for part in filter(is_training, parts):
            part.training = False
    changed = [(weight, value) for weight, value in weights if not torch.equal(weight, value)]
    try:
        yield
    finally:
        for names, kept in zip(held, before, strict=True):
            names.clear()
            names.update(kept)
        with torch.no_grad():
            for weight, value in changed:
                weight.copy_(value)
