"""How long does training take by each method, per step and per image pass?

Steps at full strength, each run in turn with one of HM & ICS (arXiv 2203.01439), the strongest published method here,
which takes 32 attack steps of 168 images each. The images are noise, of Omniglot's size and number. The optimiser's
step and the reading of a batch are part of a step, as in training.

    python -m pytest benchmarks/test_training.py --no-cov -p no:cacheprovider

Nothing here asserts a time. The ratio is of seconds per image pass, the method's to HM's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.measure import DEVICE, compared, paired
from benchmarks.robustness.data import InMemory
from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.protocol import named
from benchmarks.robustness.train import Training

CLASSES, PER_CLASS, PAIRS = 136, 20, 5
TIMED = ("plain-both", "preset-both", "two-steps", "noisy-step", "early-stop", "hard-rows", "reuse", "replay")


def stepper(name: str) -> tuple[Callable[[], object], int]:
    """A step of a method, and how many image passes it takes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(CLASSES * PER_CLASS, 1, 28, 28, generator=generator)
    part = InMemory(images, torch.arange(CLASSES).repeat_interleave(PER_CLASS))
    training = Training(METHODS[name], named("helped", "omniglot", {}), part, 0, torch.device(DEVICE))
    training._make(0)
    batches = training.batches.after(0)

    def step() -> object:
        return training._step(*(of.to(DEVICE) for of in next(batches)))

    step()
    return step, training.passed.forward


@pytest.fixture(scope="module")
def published() -> tuple[Callable[[], object], int]:
    return stepper("hm-lga-ics")


@pytest.mark.parametrize("name", TIMED)
def test_training_step(benchmark, published, name: str) -> None:
    (step, passes), (other, other_passes) = stepper(name), published
    benchmark.group = "training step / one of HM & ICS, per image pass"
    pairs = 1 if benchmark.disabled else PAIRS
    found = compared(benchmark.pedantic(paired, args=(step, other, pairs), rounds=1))
    scale = other_passes / passes
    benchmark.extra_info.update(
        case=name,
        image_passes=[passes, other_passes],
        ratio=scale * found["ratio"],
        quartiles=[scale * quartile for quartile in found["quartiles"]],
        ms=found["ms"],
    )
