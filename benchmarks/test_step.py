"""What does one training step of `AdversarialLoss` cost beside the passes that no implementation can spare?

Both sides embed the batch, attack every row in k steps with frozen parameters, embed the perturbed rows, take
the loss and go backward. "library" is `AdversarialLoss`, "bare" the same passes written by hand for one fixed
case, with no checks, no records and no isolation. "bare" spares what need not be done: when every row is
perturbed, the loss does not depend on the clean embeddings, so its backward pass leaves the clean batch out.
"bare_through_clean" goes backward through the clean batch too, as any implementation has to do when clean rows
enter the loss. The optimiser's step is on neither side.

    python -m pytest benchmarks --no-cov -p no:cacheprovider

Nothing here asserts a time. Read the ratio: both sides of a pair run right after one another, in alternating
order, so whatever else the machine does slows both. `PML_ADVERSARIAL_DEVICE=cuda` measures on an accelerator.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import Tensor, nn
from torch.nn.functional import normalize

from pml_adversarial import AdversarialLoss

DEVICE = os.environ.get("PML_ADVERSARIAL_DEVICE", "cpu")
EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 5

Step = Callable[[], Tensor]


class UnitNorm(nn.Module):
    """Embeddings on the unit sphere."""

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scales rows to length 1."""
        return normalize(embeddings)


def small_cnn() -> nn.Module:
    """Two convolutions for 28x28 images of one channel."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        UnitNorm(),
    )


def resnet18() -> nn.Module:
    """A ResNet-18 of torchvision with random weights, 128 outputs and BatchNorm frozen in eval mode."""
    models = pytest.importorskip("torchvision.models")
    trunk = models.resnet18(weights=None, num_classes=128)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return nn.Sequential(trunk, UnitNorm())


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how many pairs of steps are timed."""

    name: str
    make_model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    pairs: int


CASES = [
    Case("small_cnn_28x28_batch112", small_cnn, (1, 28, 28), 112, 40),
    Case("resnet18_64x64_batch32", resnet18, (3, 64, 64), 32, 12),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Bench:
    """One case on its device: the same model, batch and loss for both sides."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.model = case.make_model().to(DEVICE)
        self.images = torch.rand(case.batch, *case.shape, device=DEVICE)
        self.labels = torch.arange(case.batch, device=DEVICE) // 2
        self.loss = MultiSimilarityLoss(2, 40, 0.5)
        attack = partial(torchattacks.PGD, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=True)
        self.adversarial_loss = AdversarialLoss(
            self.loss, self.model, attack=attack, perturb="all", keep_clean=False, guard=False, warmup=0
        )

    def library(self) -> Tensor:
        """One step with `AdversarialLoss`."""
        self.model.zero_grad()
        loss = self.adversarial_loss(self.model(self.images), self.labels)
        loss.backward()
        return loss.detach()

    def bare(self) -> Tensor:
        """One step by hand."""
        self.model.zero_grad()
        context = self.model(self.images).detach()  # its graph is freed here, before the attack
        perturbed = self._attack_by_hand(context)
        loss = self.loss(self.model(perturbed), self.labels)
        loss.backward()
        return loss.detach()

    def bare_through_clean(self) -> Tensor:
        """The same, with a backward pass through the clean batch too, as when some clean rows enter the loss."""
        self.model.zero_grad()
        clean = self.model(self.images)
        perturbed = self._attack_by_hand(clean.detach())
        loss = self.loss(self.model(perturbed), self.labels) + 0 * clean.sum()
        loss.backward()
        return loss.detach()

    def _attack_by_hand(self, context: Tensor) -> Tensor:
        same = self.labels.unsqueeze(1) == self.labels
        wrong_or_itself = ~same | torch.eye(len(same), dtype=torch.bool, device=DEVICE)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        perturbed = (self.images + torch.empty_like(self.images).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            perturbed.requires_grad_(True)
            distances = torch.cdist(self.model(perturbed), context)
            furthest = distances.masked_fill(wrong_or_itself, -torch.inf).amax(1)
            nearest = distances.masked_fill(same, torch.inf).amin(1)
            (gradient,) = torch.autograd.grad((furthest - nearest).sum(), perturbed)
            moved = perturbed.detach() + ALPHA * gradient.sign()
            perturbed = (self.images + (moved - self.images).clamp(-EPS, EPS)).clamp(0, 1)
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        return perturbed


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One CPU thread, so that other processes on the machine disturb the two sides as little as possible."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@every_case
@pytest.mark.parametrize("side", ["library", "bare", "bare_through_clean"])
def test_step(benchmark, case: Case, side: str) -> None:
    benchmark.group = case.name
    benchmark.pedantic(getattr(Bench(case), side), rounds=max(3, case.pairs // 4), warmup_rounds=2)


@every_case
@pytest.mark.parametrize("side", ["bare", "bare_through_clean"])
def test_ratio(benchmark, case: Case, side: str, capsys, pytestconfig) -> None:
    bench = Bench(case)
    benchmark.group = f"{case.name}, {case.pairs} pairs of steps"
    ratios = benchmark.pedantic(_paired_ratios, args=(bench.library, getattr(bench, side), case.pairs), rounds=1)
    quartiles = statistics.quantiles(ratios, n=4)
    benchmark.extra_info.update(ratio=statistics.median(ratios), quartiles=[quartiles[0], quartiles[2]], device=DEVICE)
    with capsys.disabled():
        pytestconfig.pluginmanager.get_plugin("terminalreporter").write_line(
            f"\n{case.name} on {DEVICE}: library / {side} = {statistics.median(ratios):.3f} "
            f"(median of {case.pairs} pairs, quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})"
        )


@every_case
def test_both_sides_embed_the_same_rows(case: Case) -> None:
    bench = Bench(case)
    assert _rows_embedded(bench, bench.library) == _rows_embedded(bench, bench.bare) == (STEPS + 2) * case.batch


def _paired_ratios(library: Step, bare: Step, pairs: int) -> list[float]:
    for warm_up in (library, bare):
        _seconds(warm_up)
    ratios = []
    for pair in range(pairs):
        if pair % 2:
            against, of = _seconds(bare), _seconds(library)
        else:
            of, against = _seconds(library), _seconds(bare)
        ratios.append(of / against)
    return ratios


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _rows_embedded(bench: Bench, step: Step) -> int:
    rows: list[int] = []
    handle = bench.model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    step()
    handle.remove()
    return sum(rows)
