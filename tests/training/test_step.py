"""How straight one default step is: what it enters, evaluates, draws and isolates, and how many operations it adds."""

import copy
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from notes import Notes
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pml_adversarial
from benchmarks.bare import attack_by_hand, small_cnn
from pml_adversarial import AdversarialLoss, hookimpl
from pml_adversarial.defenses import HM
from pml_adversarial.training import monitor, step, tracing

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


def test_few_modules_are_entered_and_seldom_changed(monkeypatch):
    case = Case()
    monkeypatch.setattr(tracing, "threads", {threading.get_ident()})  # other tests run models in other threads
    embeddings = case.model(case.images)
    found = modules_in_order(lambda: case.loss_func(embeddings, case.labels))
    assert len(set(found)) <= 32
    assert sum(one != other for one, other in pairwise(found)) <= 236


@pytest.mark.parametrize("steps", [3, 5])
def test_operations_beside_the_bare_step(steps):
    case = Case(steps, keep_clean=False, guard=False)
    assert operations(case.library) <= 1.25 * operations(case.bare)


class Scaled(nn.Module):
    """Divides by a running deviation, which it updates first."""

    def __init__(self, kind):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8))
        if kind == "buffer":
            self.register_buffer("scale", torch.ones(8))
        else:
            self.scale = torch.ones(8) if kind == "tensor" else nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x):
        found = self.net(x)
        self.scale.data.lerp_(found.detach().std(0), 0.02)
        self.scale.detach().add_(0)  # so that graphs see that it was changed
        return found / self.scale


class Copies:
    @hookimpl(wrapper=True)
    def pml_adversarial_training_loss(self, adversarial):
        self.inputs = adversarial.inputs
        return (yield)


@pytest.mark.parametrize("kind", ["buffer", "tensor", "frozen"])
def test_state_that_forward_changes_and_uses_is_that_of_two_passes(kind):
    torch.manual_seed(0)
    model, labels, copies = Scaled(kind), torch.arange(8) // 2, Copies()
    loss_func = AdversarialLoss(ContrastiveLoss(), model, warmup=0, plugins=[copies])
    for _ in range(3):
        model.zero_grad()
        images, first = torch.rand(8, 1, 6, 6), copy.deepcopy(model)
        value = loss_func(model(images), labels)
        value.backward()
        clean = first(images)
        second = copy.deepcopy(first)
        by_hand = ContrastiveLoss()(torch.cat([clean, second(copies.inputs)]), labels.repeat(2))
        by_hand.backward()
        torch.testing.assert_close(value, by_hand)
        torch.testing.assert_close(model.net[1].weight.grad, first.net[1].weight.grad + second.net[1].weight.grad)
        torch.testing.assert_close(model.scale, second.scale)


@pytest.mark.parametrize("plugins", [[], [HM()]], ids=["default", "HM"])  # HM asks the loss later
def test_state_of_the_wrapped_loss_is_changed_by_its_own_calls_alone(plugins):
    model, loss, calls = nn.Sequential(nn.Flatten(), nn.Linear(36, 8)), ContrastiveLoss(), torch.zeros(())
    loss.register_forward_hook(lambda *_: calls.add_(1) and None)
    loss_func = AdversarialLoss(loss, model, warmup=0, plugins=plugins)
    for step_now in range(3):
        loss_func(model(torch.rand(8, 1, 6, 6)), torch.arange(8) // 2).backward()
        assert calls == step_now + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("towers", [1, 2])
def test_coarse_inputs_are_attacked_in_single_precision(dtype, towers):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(36, 8)).to(dtype) for _ in range(towers)]
    copies, seen = Copies(), []
    for model in models:
        model.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    for eps in (1e-4, 1 / 255, 8 / 255):
        loss_func = AdversarialLoss(MultiSimilarityLoss(), eps=eps, warmup=0, plugins=[copies])
        images = [(torch.rand(8, 1, 6, 6) * 0.6 + 0.2).to(dtype) for _ in models]
        embeddings = torch.cat([model(given) for model, given in zip(models, images, strict=True)])
        loss_func(embeddings, torch.arange(8).repeat(towers) // 2).backward()
        assert copies.inputs.dtype == torch.float32
        assert (copies.inputs - torch.cat(images)).abs().max() == pytest.approx(eps, rel=1e-3)
        assert loss_func.perturbation_linf == pytest.approx(eps, rel=1e-3)
    assert set(seen) == {dtype}


def test_a_warmup_below_what_the_type_resolves_is_no_error():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8)).bfloat16()
    loss_func = AdversarialLoss(MultiSimilarityLoss(), model, warmup=1000)
    for _ in range(3):
        images = (torch.rand(8, 1, 6, 6) * 0.6 + 0.2).bfloat16()
        loss_func(model(images), torch.arange(8) // 2).backward()
    assert 0 < loss_func.perturbation_linf < 1e-4
