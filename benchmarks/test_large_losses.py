"""What does a step cost with a loss of large tensors: a classifier of 100,000 classes, a memory of 100,000 rows?

The model is one linear layer, so that the loss is what is measured. "first" is the first step of a new wrapper beside a
later one; "later" is a later step beside one evaluation (forward and backward) of the plain loss; "memory" is a step
beside a step of the plain memory.

    python -m pytest benchmarks/test_large_losses.py --no-cov -p no:cacheprovider

Nothing here asserts a time. Both sides of a pair run right after one another, in alternating order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import ArcFaceLoss, ContrastiveLoss, CosFaceLoss, CrossBatchMemory
from torch import Tensor, nn

from benchmarks.measure import DEVICE, compared, paired, seconds
from pml_adversarial import AdversarialLoss

CLASSES = MEMORY = 100_000
BATCH, SIZE, STEPS = 64, 512, 3
PGD = partial(torchattacks.PGD, eps=8 / 255, alpha=2 / 255, steps=STEPS)


class Case:
    """A loss on a batch of random images."""

    def __init__(self, loss: nn.Module) -> None:
        torch.manual_seed(0)
        self.loss = loss.to(DEVICE)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, SIZE)).to(DEVICE)
        self.images = torch.rand(BATCH, 1, 8, 8, device=DEVICE)
        self.labels = torch.arange(BATCH, device=DEVICE) // 2

    def wrapped(self) -> AdversarialLoss:
        """A new wrapper with the package's defaults."""
        return AdversarialLoss(self.loss, self.model, attack=PGD, warmup=0, seed=0)

    def step(self, loss: Callable[..., Tensor]) -> None:
        """Forward and backward pass of the model and the loss."""
        self.loss.zero_grad()
        self.model.zero_grad()
        loss(self.model(self.images), self.labels).backward()


@pytest.mark.parametrize("kind", [ArcFaceLoss, CosFaceLoss])
def test_many_classes(kind: type[nn.Module], benchmark: Callable[..., object]) -> None:
    """A step of a classifier beside evaluations of the plain loss."""
    case = Case(kind(CLASSES, SIZE))
    later = case.wrapped()
    times = paired(lambda: case.step(later), lambda: case.step(case.loss), 5)
    firsts = [(seconds(lambda: case.step(case.wrapped())), seconds(lambda: case.step(later))) for _ in range(5)]
    benchmark.extra_info["first_beside_later"] = compared(tuple(zip(*firsts, strict=True)))
    benchmark.extra_info["later_beside_plain"] = {**compared(times), "attack_steps": STEPS}
    benchmark.pedantic(case.step, args=(later,), rounds=1)


def test_large_memory(benchmark: Callable[..., object]) -> None:
    """A step with a full memory beside a step of the plain memory."""
    case = Case(CrossBatchMemory(ContrastiveLoss(), SIZE, memory_size=MEMORY))
    case.loss.embedding_memory.normal_()
    case.loss.label_memory.random_(1000)
    case.loss.has_been_filled = True
    wrapped = case.wrapped()
    times = paired(lambda: case.step(wrapped), lambda: case.step(case.loss), 5)
    benchmark.extra_info["memory_beside_plain"] = compared(times)
    benchmark.pedantic(case.step, args=(wrapped,), rounds=1)
