"""What do capture, hooks and isolation cost by themselves, without any pass?

    python -m pytest benchmarks/test_overhead.py --no-cov -p no:cacheprovider

Nothing here asserts a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.bare import small_cnn
from benchmarks.measure import DEVICE
from benchmarks.test_step import resnet
from pml_adversarial import hookimpl
from pml_adversarial.plugins.manager import make_manager
from pml_adversarial.training.capture import InputCapture
from pml_adversarial.training.isolation import isolated, random_stream
from pml_adversarial.training.pixels import PixelSpace

MODELS: dict[str, Callable[[], nn.Module]] = {
    "small CNN": small_cnn,
    "ResNet-18": partial(resnet, "resnet18"),
    "ResNet-50": partial(resnet, "resnet50"),
}
ROUNDS: dict[str, Any] = {"rounds": 50, "iterations": 5, "warmup_rounds": 2}


class Silent:
    """A plugin that has no opinion on anything."""

    @hookimpl
    def pml_adversarial_plan(self, wrapped, batch) -> None:
        """None."""

    @hookimpl
    def pml_adversarial_score(self, wrapped, batch, plan) -> None:
        """None."""

    @hookimpl
    def pml_adversarial_attack(self, objective, batch, plan) -> None:
        """None."""

    @hookimpl
    def pml_adversarial_training_loss(self, wrapped, batch, plan, adversarial) -> None:
        """None."""

    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial) -> None:
        """None."""


def small_pass(watched: bool) -> Callable[[], Any]:
    """A forward pass that costs hardly anything; what it gave is asked for if it is watched."""
    model, inputs = nn.Linear(4, 4).to(DEVICE), torch.rand(4, 4, device=DEVICE)
    capture = InputCapture(model) if watched else None
    return lambda: model(inputs) if capture is None else capture.replay(PixelSpace(), model(inputs))


@pytest.mark.parametrize("watched", [False, True], ids=["bare", "captured"])
def test_capture(benchmark, watched: bool) -> None:
    benchmark.group = "overhead"
    benchmark.extra_info["case"] = "one linear layer, captured and asked for" if watched else "one linear layer"
    benchmark.pedantic(small_pass(watched), **ROUNDS)


def test_hooks(benchmark) -> None:
    hooks = make_manager([Silent()]).hook

    def all_five() -> None:
        hooks.pml_adversarial_plan(wrapped=None, batch=None)
        hooks.pml_adversarial_score(wrapped=None, batch=None, plan=None)
        hooks.pml_adversarial_attack(objective=None, batch=None, plan=None)
        hooks.pml_adversarial_training_loss(wrapped=None, batch=None, plan=None, adversarial=None)
        hooks.pml_adversarial_record(batch=None, plan=None, adversarial=None)

    benchmark.group = "overhead"
    benchmark.extra_info["case"] = "five hooks"
    benchmark.pedantic(all_five, **ROUNDS)


def test_random_stream(benchmark) -> None:
    def entered() -> None:
        with random_stream(0, 1):
            pass

    benchmark.group = "overhead"
    benchmark.extra_info["case"] = "a random stream"
    benchmark.pedantic(entered, **ROUNDS)


@pytest.mark.parametrize("name", MODELS)
def test_isolation(benchmark, name: str) -> None:
    model = MODELS[name]().to(DEVICE)

    def entered() -> None:
        with isolated(model):
            pass

    benchmark.group = "overhead"
    benchmark.extra_info["case"] = f"isolation of a {name}"
    benchmark.pedantic(entered, **ROUNDS)
