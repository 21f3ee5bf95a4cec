"""What does remembering how embeddings were made cost in a loop?

Timed is a plain step: forward pass, `F.normalize`, a miner and a loss of PML, without an attack. On one side an
`AdversarialLoss` lives, so that all of this is noted, but it is not called in the timed part. On the other side none
lives, and no hook is there. "later" is a loss that was called before, as in any step but the first; "new" is one that
was never called, and wants random states and buffers kept as well.

    python -m pytest benchmarks/test_remembering.py --no-cov -p no:cacheprovider

Nothing here asserts a time. Both sides of a pair run right after one another, in alternating order. Read the difference
in milliseconds: it does not grow with the batch.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import nn
from torch.nn.functional import normalize

from benchmarks.bare import small_cnn
from benchmarks.measure import DEVICE, seconds
from benchmarks.test_step import resnet
from pml_adversarial import AdversarialLoss

BATCH, PAIRS, STEPS = 16, 40, 5


def deep() -> nn.Module:
    """A ResNet-18; where torchvision is not there, a plain network with as many modules."""
    try:
        return resnet("resnet18")
    except pytest.skip.Exception:
        blocks = [part for _ in range(20) for part in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
        return nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), *blocks, nn.Flatten(), nn.LazyLinear(128)).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small CNN": (small_cnn, (1, 28, 28)),
    "ResNet-18": (deep, (3, 32, 32)),
}


class Loop:
    """A loop that knows nothing of this package."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        make, shape = CASES[name]
        self.model = make().to(DEVICE)
        self.images = torch.rand(BATCH, *shape, device=DEVICE)
        self.labels = torch.arange(BATCH, device=DEVICE) // 2
        self.miner, self.loss = MultiSimilarityMiner(), TripletMarginLoss(margin=0.5)
        self.adversarial_loss: AdversarialLoss | None = None

    def step(self) -> None:
        """One step, without the backward pass, in which nothing is noted."""
        embeddings = normalize(self.model(self.images))
        self.loss(embeddings, self.labels, self.miner(embeddings, self.labels))

    def watched(self, called: bool) -> None:
        """From now on an `AdversarialLoss` lives."""
        self.adversarial_loss = AdversarialLoss(self.loss, self.model, steps=1, warmup=0)
        if called:
            self.adversarial_loss(normalize(self.model(self.images)), self.labels)

    def unwatched(self) -> None:
        """From now on none lives."""
        self.adversarial_loss = None
        gc.collect()
        nn.Identity()(self.images)  # the hook goes with the first call that nobody watches

    def times(self, called: bool) -> tuple[list[float], list[float]]:
        """Seconds of a step with a living loss, and without: of each side a median, for each pair."""
        sides = (partial(self.watched, called), self.unwatched)
        found: tuple[list[float], list[float]] = ([], [])
        for pair in range(PAIRS):
            for which in (1, 0) if pair % 2 else (0, 1):
                sides[which]()
                seconds(self.step)
                found[which].append(statistics.median(seconds(self.step) for _ in range(STEPS)))
        return found


@pytest.mark.parametrize("state", ["later", "new"])
@pytest.mark.parametrize("name", CASES)
def test_remembering(benchmark, name: str, state: str) -> None:
    loop = Loop(name)
    benchmark.group = "a plain loop with a living loss / without"
    found = benchmark.pedantic(loop.times, args=(state == "later",), rounds=1)
    more = [1e3 * (with_it - without) for with_it, without in zip(*found, strict=True)]
    low, middle, high = statistics.quantiles(more, n=4)
    benchmark.extra_info.update(
        case=f"{name}, {state}",
        ms=[1e3 * statistics.median(side) for side in found],
        more_ms=middle,
        more_ms_quartiles=[low, high],
    )
