"""Modules and functions that the tests of traces share."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from pml_adversarial.training import watch
from pml_adversarial.training.trace import steps_to
from pml_adversarial.training.tracing import hooks, ref_of, watches


class Own(torch.Tensor):
    """A class of tensors of the user's."""


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Returns(nn.Module):
    """Returns its part's output in a container."""

    def __init__(self, inner, wrap):
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, images):
        return self.wrap(self.inner(images))


class Raises(nn.Module):
    def __init__(self, inner, after=True):
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, images):
        if self.after:
            self.inner(images)
        raise ArithmeticError("of the user's")


def names_of(tensor):
    """Names of the functions and modules that made a tensor, in order."""
    steps = steps_to([ref_of(tensor)])
    return [(s.function if s.call is None else type(s.function)).__name__ for s in steps]


def hooks_of(model):
    """All hooks of all modules, which must be the same before and after."""
    return [
        {name: dict(value) for name, value in vars(module).items() if "hooks" in name} for module in model.modules()
    ]


def global_hooks():
    return {name: dict(value) for name, value in vars(nn_module).items() if name.startswith("_global") and value}


@contextmanager
def alone():
    """Inside, no loss watches that was made outside, such as one that another test left and that nobody collected."""
    others = list(watches)
    watches.clear()
    watch._kinds.clear()
    while hooks:
        hooks.pop().remove()
    try:
        yield
    finally:
        watches.update(others)
        watch._kinds.clear()
        watch.Watch()  # sees to it that there is a hook; it dies at once
