"""How long does training take by each method, per step and per image pass?

Steps at full strength, each run in turn with one of HM & ICS (arXiv 2203.01439), the strongest published method here,
which takes 32 attack steps of 168 images each. The images are blots, one for each class, of Omniglot's size and number,
which any network tells apart: HM attacks none that are confused anyhow. The optimiser's step and the reading of a batch
are part of a step, as in training.

    python -m pytest benchmarks/test_training.py --no-cov -p no:cacheprovider

Nothing here asserts a time. The ratio is of seconds per image pass, the method's to HM's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import interpolate

from benchmarks.measure import DEVICE, compared, paired
from benchmarks.robustness.data import InMemory
from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.protocol import named
from benchmarks.robustness.train import Training

CLASSES, PER_CLASS, PAIRS = 136, 20, 5
TIMED = ("plain-both", "preset-both", "two-steps", "noisy-step", "early-stop", "hard-rows", "reuse", "replay")


def blots() -> InMemory:
    """Of each class the same image, of 7x7 squares that are black or white."""
    squares = torch.rand(CLASSES, 1, 7, 7, generator=torch.Generator().manual_seed(0)).round()
    of_class = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
    return InMemory(interpolate(squares, scale_factor=4)[of_class], of_class)


def stepper(name: str) -> tuple[Callable[[], object], int]:
    """A step of a method, and how many image passes it takes."""
    training = Training(METHODS[name], named("helped", "omniglot", {}), blots(), 0, torch.device(DEVICE))
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
    assert other_passes == 112 + 33 * 168  # it does attack
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
