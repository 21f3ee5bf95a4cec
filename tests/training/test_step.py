"""How straight one default step is: what it enters, evaluates, draws and isolates, and how many operations it adds."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from notes import Notes
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.utils._python_dispatch import TorchDispatchMode

import pml_adversarial
from benchmarks.bare import attack_by_hand, small_cnn
from pml_adversarial import AdversarialLoss
from pml_adversarial.training import monitor, step

PACKAGE = str(Path(pml_adversarial.__file__).parent)
EPS = 8 / 255


class Case:
    """A small CNN, a batch, and a loss whose calls are counted."""

    def __init__(self, steps=3, **options):
        torch.manual_seed(0)
        self.model = small_cnn()
        self.images, self.labels = torch.rand(32, 1, 28, 28), torch.arange(32) // 2
        self.steps, self.loss, self.calls = steps, MultiSimilarityLoss(2, 40, 0.5), Notes()
        self.loss.register_forward_pre_hook(self._count)
        self.loss_func = AdversarialLoss(self.loss, self.model, steps=steps, warmup=0, **options)
        while self.loss_func.adversary.step < 2 or self.loss_func.adversary.step % monitor.EVERY == 0:
            self.library()  # until the next step is one of the four of five in which R@1 is not measured
        self.calls.taken()

    def _count(self, module, arguments):
        self.calls.append(module)

    def library(self):
        self.model.zero_grad()
        self.loss_func(self.model(self.images), self.labels).backward()

    def bare(self):
        """The same passes by hand, with the perturbed rows in place of the clean ones."""
        self.model.zero_grad()
        context = self.model(self.images).detach()
        options = {"eps": EPS, "alpha": EPS, "steps": self.steps}
        points = attack_by_hand(self.model, self.images, self.labels, context, **options)
        self.loss(self.model(points), self.labels).backward()


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.count += 1
        return operation(*arguments, **(keywords or {}))


def operations(work):
    with Dispatched() as dispatched:
        work()
    return dispatched.count


def modules_in_order(work):
    """The package's files, one for each of its calls."""
    found = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def test_the_wrapped_loss_is_evaluated_twice():
    case = Case()
    case.library()
    assert len(case.calls) == 2  # once with unperturbed copies for the records, and once for training


def test_random_streams_and_isolations_are_two(monkeypatch):
    case, opened = Case(), []
    for name in ("random_stream", "isolated"):
        whole = getattr(step, name)
        spy = lambda *given, n=name, of=whole, **named: opened.append(n) or of(*given, **named)  # noqa: E731
        monkeypatch.setattr(step, name, spy)
    case.library()
    assert sorted(opened) == ["isolated", "isolated", "random_stream", "random_stream"]


def test_few_modules_are_entered_and_seldom_changed():
    case = Case()
    embeddings = case.model(case.images)
    found = modules_in_order(lambda: case.loss_func(embeddings, case.labels))
    assert len(set(found)) <= 32
    assert sum(one != other for one, other in pairwise(found)) <= 236


@pytest.mark.parametrize("steps", [3, 5])
def test_operations_beside_the_bare_step(steps):
    case = Case(steps, keep_clean=False, guard=False)
    assert operations(case.library) <= 1.25 * operations(case.bare)
