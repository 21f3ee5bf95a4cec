"""The drop-in in loops of the shapes that public training scripts have.

Scripts that use pytorch-metric-learning were read: re-identification, geo-localisation and place recognition, copy
detection, animals, retrieval benchmarks, microscopy, network traffic, sketches and 3D objects, point clouds. Each
loop in `public_loops` has the shape of one of them in code of its own: kinds of modules, calls of the model, what is
done to its outputs, losses and miners, mixed precision, accumulation and schedules. To each of them two lines are
added, the import and the wrapping of the loss, which also says how the inputs were normalised.
"""

import contextlib
import math
from functools import partial

import public_loops
import pytest
import torch

from pml_adversarial import AdversarialLoss, CaptureError, InputError

RUNS = [
    pytest.param(loop, named, id=f"{loop.__name__}-{'model named' if named else 'model found'}")
    for loop in public_loops.LOOPS
    for named in (True, False)
    if not (named and loop in public_loops.WITHOUT_MODEL)
]


class Enough(Exception):
    """Ends a loop."""


class Run:
    """What a loop did, step by step.

    Args:
        loop: one of `public_loops`.
        named: whether the model is named in the line that is added.
        steps: after so many it ends; None: it runs to its end.
        options: of the adversarial loss; None: the loop runs without it.

    Attributes:
        values: loss of each step.
        gradients: of each step, of all parameters; None where a parameter got none.
        wrapped: the adversarial losses.
        rises: of each step, how much the attack raised the loss, in all of them.
        shifts: of each step, the largest mean distance from the embedding of a row to that of its copy.
    """

    def __init__(self, loop, named=True, steps=None, **options):
        torch.manual_seed(1)
        self.named, self.steps, self.options = named, steps, options
        self.values, self.gradients, self.wrapped, self.rises, self.shifts = [], [], [], [], []
        with contextlib.suppress(Enough):
            loop(self.wrap, self.seen)

    def wrap(self, loss, model=None, **keywords):
        if not self.options:
            return loss
        loss = AdversarialLoss(loss, model if self.named else None, warmup=0, guard=False, **keywords, **self.options)
        self.wrapped.append(loss)
        return loss

    def seen(self, loss, *modules):
        parameters = [parameter for module in modules for parameter in module.parameters()]
        self.values.append(loss.item())
        self.gradients.append([None if p.grad is None else p.grad.float().clone() for p in parameters])
        records = [loss.records for loss in self.wrapped]
        self.rises.append([found.loss_after - found.loss_before for found in records])
        self.shifts.append(max((found.embedding_shift for found in records), default=math.nan))
        if len(self.values) == self.steps:
            raise Enough


def reached(gradients):
    """Which parameters got a gradient, and which of these one that is not zero."""
    return [None if found is None else bool(found.any()) for found in gradients]


def together(gradients):
    return torch.cat([found.flatten() for found in gradients if found is not None])


@pytest.mark.parametrize(("loop", "named"), RUNS)
def test_training_runs_and_the_attack_raises_the_loss(loop, named):
    run = Run(loop, named, eps=0.1)
    assert len(run.values) >= public_loops.STEPS
    assert all(map(math.isfinite, run.values))
    assert all(max(rise) > 0 for rise in zip(*run.rises, strict=True))  # of each wrapped loss, in a step
    assert all(0 < loss.records.perturbation_linf <= 0.1 + 1e-6 for loss in run.wrapped)


@pytest.mark.parametrize(("loop", "named"), RUNS)
def test_without_a_budget_it_is_the_plain_loop(loop, named):
    plain = Run(loop, steps=1)
    check_equal(Run(loop, named, steps=1, eps=1e-6, keep_clean=False), plain)


def check_equal(run, plain):
    """Value and gradient to 1e-3."""
    (value,), (gradients,), (expected,) = run.values, run.gradients, plain.gradients
    assert value == pytest.approx(plain.values[0], rel=1e-3)
    assert reached(gradients) == reached(expected)
    apart = torch.linalg.vector_norm(together(gradients) - together(expected))
    assert apart <= 1e-3 * torch.linalg.vector_norm(together(expected))
    assert run.shifts[0] < 1e-4


@pytest.mark.parametrize("loop", public_loops.LOOPS)
def test_gradients_reach_what_they_reach_in_the_plain_loop(loop):
    plain, run = Run(loop), Run(loop, eps=0.1)
    assert len(plain.gradients) == len(run.gradients)
    for expected, found in zip(plain.gradients, run.gradients, strict=True):
        assert reached(found) == reached(expected)


@pytest.mark.parametrize("loop", public_loops.LOOPS)
def test_left_out_normalisation_is_asked_for(monkeypatch, loop):
    monkeypatch.setattr(Run, "wrap", lambda run, loss, model=None, **keywords: AdversarialLoss(loss, model, warmup=0))
    with pytest.raises(InputError, match=r"normalization=\(mean, std\)"):
        Run(loop)


@pytest.mark.parametrize(
    "loop",
    [
        partial(public_loops.logits_and_features, dropout=0.2),  # at 0.5 a row of zeros is not rare
        partial(public_loops.half_without_labels, precision=torch.bfloat16),
    ],
    ids=["dropout", "bfloat16"],
)
def test_training_with_noise_runs(loop):
    run = Run(loop, eps=0.1)
    assert len(run.values) == public_loops.STEPS
    assert all(map(math.isfinite, run.values))
    assert max(max(rise) for rise in run.rises) > 0


class TestGradientInStages:
    """Embeddings that were computed without gradient are refused; what the error says to do works."""

    def test_is_refused(self):
        with pytest.raises(CaptureError, match="as GradCache does"):
            Run(public_loops.gradient_in_stages, eps=0.1)

    def test_cure_trains(self):
        run = Run(partial(public_loops.gradient_in_stages, cure=True), eps=0.1)
        assert len(run.values) == public_loops.STEPS
        assert min(max(rise) for rise in run.rises) > 0

    def test_cure_is_the_plain_loop_without_a_budget(self):
        plain = Run(public_loops.gradient_in_stages, steps=1)
        cured = partial(public_loops.gradient_in_stages, cure=True)
        check_equal(Run(cured, steps=1, eps=1e-6, keep_clean=False), plain)


class TestClassOfTheLoss:
    """A loop that asks for the class of its loss has to ask for that of the wrapped one."""

    def test_wrapper_is_of_another_class(self):
        with pytest.raises(KeyError, match="negative"):
            Run(public_loops.class_of_the_loss, eps=0.1)

    def test_asking_the_wrapped_loss_trains(self):
        run = Run(partial(public_loops.class_of_the_loss, cure=True), eps=0.1)
        assert len(run.values) == public_loops.STEPS
        assert min(max(rise) for rise in run.rises) > 0

    def test_without_a_budget_it_is_the_plain_loop(self):
        plain = Run(public_loops.class_of_the_loss, steps=1)
        check_equal(Run(partial(public_loops.class_of_the_loss, cure=True), steps=1, eps=1e-6, keep_clean=False), plain)
