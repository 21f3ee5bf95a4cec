"""What does one training step of `AdversarialLoss` cost beside the passes that no implementation can spare?

Both sides embed the batch, attack every row in k steps with frozen parameters, embed the perturbed rows, take
the loss and go backward. "library" is `AdversarialLoss`, "bare" the same passes written by hand for one fixed
case, with no checks, no records and no isolation. "bare" spares what need not be done: when every row is
perturbed, the loss does not depend on the clean embeddings, so its backward pass leaves the clean batch out.
"bare_through_clean" goes backward through the clean batch too, as any implementation has to do when clean rows
enter the loss. "torchattacks_classifier" is the classic training of a classifier with the same backbone on clean and
perturbed rows, whose weights stay trainable during the attack. The optimiser's step is on no side.

    python -m pytest benchmarks --no-cov -p no:cacheprovider

Nothing here asserts a time. Read the ratio: both sides of a pair run right after one another, in alternating
order, so whatever else the machine does slows both. `PML_ADVERSARIAL_DEVICE=cuda` measures on an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare import UnitNorm, attack_by_hand, small_cnn
from benchmarks.measure import DEVICE, compared, paired, seconds
from pml_adversarial import AdversarialLoss
from pml_adversarial.attacks.objective import AttackFactory

EPS, ALPHA = 8 / 255, 2 / 255
SIDES = ("library", "bare", "bare_through_clean", "torchattacks_classifier")

Step = Callable[[], Tensor]


def resnet(name: str) -> nn.Module:
    """A ResNet of torchvision with random weights, 128 outputs and BatchNorm frozen in eval mode."""
    models = pytest.importorskip("torchvision.models")
    trunk = getattr(models, name)(weights=None, num_classes=128)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return nn.Sequential(trunk, UnitNorm())


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how many pairs of steps are timed beside the bare ones; a quarter elsewhere."""

    name: str
    make_model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    pairs: int
    steps: int = 5


CASES = [
    Case("small_cnn_28x28_batch112", small_cnn, (1, 28, 28), 112, 100),
    Case("resnet18_64x64_batch32", partial(resnet, "resnet18"), (3, 64, 64), 32, 32),
]
if DEVICE == "cuda":
    CASES.append(Case("resnet50_224x224_batch112", partial(resnet, "resnet50"), (3, 224, 224), 112, 16, steps=10))
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Bench:
    """One case on its device: the same model, batch and loss for both sides."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = case.make_model().to(DEVICE)
        self.images = torch.rand(case.batch, *case.shape, device=DEVICE)
        self.labels = torch.arange(case.batch, device=DEVICE) // 2
        self.loss = MultiSimilarityLoss(2, 40, 0.5)
        self.attack = partial(torchattacks.PGD, eps=EPS, alpha=ALPHA, steps=case.steps, random_start=True)
        self.wrap(self.attack)
        head = nn.Linear(128, case.batch // 2)
        # A model of its own, in eval mode: torchattacks would put its BatchNorm, frozen or not, back into train mode.
        self.classifier = nn.Sequential(case.make_model(), head).to(DEVICE).eval()
        self.classifier_attack = self.attack(self.classifier)

    def wrap(self, attack: AttackFactory) -> None:
        """The library's side, with an attack."""
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

    def torchattacks_classifier(self) -> Tensor:
        """What those do who train a classifier against torchattacks: the same backbone, with a linear head."""
        self.classifier.zero_grad()
        perturbed = self.classifier_attack(self.images, self.labels)
        logits = self.classifier(torch.cat([self.images, perturbed]))
        loss = cross_entropy(logits, self.labels.repeat(2))
        loss.backward()
        return loss.detach()

    def _attack_by_hand(self, context: Tensor) -> Tensor:
        return attack_by_hand(
            self.model, self.images, self.labels, context, eps=EPS, alpha=ALPHA, steps=self.case.steps
        )


@every_case
@pytest.mark.parametrize("side", SIDES[1:])
def test_ratio(benchmark, case: Case, side: str, capsys, pytestconfig) -> None:
    bench = Bench(case)
    benchmark.group = f"library / {side}"
    pairs = 1 if benchmark.disabled else case.pairs if side == "bare" else case.pairs // 4
    times = benchmark.pedantic(paired, args=(bench.library, getattr(bench, side), pairs), rounds=1)
    found = compared(times)
    benchmark.extra_info.update(case=case.name, **found, **(_throughput(bench, found) if DEVICE == "cuda" else {}))
    with capsys.disabled():
        pytestconfig.pluginmanager.get_plugin("terminalreporter").write_line(
            f"\n{case.name} on {DEVICE}: library / {side} = {found['ratio']:.3f} "
            f"(median of {pairs} pairs, quartiles {found['quartiles'][0]:.3f} to {found['quartiles'][1]:.3f})"
        )


@every_case
def test_all_sides_embed_the_same_rows(case: Case) -> None:
    bench = Bench(case)
    bench.library()  # the first step of a loop checks it in two further passes
    for side in SIDES:
        assert _rows_embedded(bench, side) == (case.steps + 2) * case.batch


@every_case
def test_all_passes_are_counted(case: Case) -> None:
    bench = Bench(case)
    with torch.no_grad():
        forward = _flops(bench.model, bench.images)
    passes = 1 + 2 * case.steps + 3  # a gradient to inputs costs as much as the pass, as does one to weights
    assert (passes - 1) * forward < _flops_of_a_step(bench) < passes * forward  # images get none in the last pass


def _throughput(bench: Bench, found: dict[str, Any]) -> dict[str, float]:
    """Of the card: the share of its matrix throughput in TF32, as convolutions compute, that a library step reaches."""
    side = torch.rand(8192, 8192, device=DEVICE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    product = min(seconds(lambda: side @ side) for _ in range(5))
    torch.set_float32_matmul_precision(before)
    rates = _flops_of_a_step(bench) / (found["ms"][0] / 1e3), 2 * 8192**3 / product
    return {"share_of_matmul": rates[0] / rates[1], "matmul_tflops": rates[1] / 1e12}


def _flops_of_a_step(bench: Bench) -> int:
    """Of the clean pass, the attack's passes to the inputs, and those of the perturbed rows to the weights.

    Each alone: within `torch.autograd.grad`, as attacks call it, torch's counter fails.
    """
    with torch.no_grad():
        clean = _flops(bench.model, bench.images)
    bench.model.requires_grad_(False)
    attack_step = _flops(bench.model, bench.images.clone().requires_grad_())
    bench.model.requires_grad_(True)
    return clean + bench.case.steps * attack_step + _flops(bench.model, bench.images)


def _flops(model: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        found = model(images).sum()
        if found.requires_grad:
            found.backward()
    return counter.get_total_flops()


def _rows_embedded(bench: Bench, side: str) -> int:
    model = bench.classifier if side == "torchattacks_classifier" else bench.model
    rows: SimpleQueue[int] = SimpleQueue()  # no list: after a step, lists that hooks keep hold what they held before it
    handle = model.register_forward_pre_hook(lambda module, args: rows.put(len(args[0])))
    getattr(bench, side)()
    handle.remove()
    return sum(rows.get() for _ in range(rows.qsize()))
