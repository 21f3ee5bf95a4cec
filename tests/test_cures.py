"""What an error says to do is true: when it is followed, that very loop trains."""

import ast
import re
from pathlib import Path

import pytest
import torch
from cures import CASES
from pytorch_metric_learning.miners import BaseMiner
from torch import nn
from traces import alone

import pml_adversarial
from pml_adversarial import AdversarialLoss, AdversarialMiner

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of torch, in the plain loop too
NOTHING = {"eps": 1e-6, "steps": 1}
SOMETHING = {"eps": 0.1, "steps": 3}
CURES = [pytest.param(name, cure, id=f"{name}: {cure}") for name, found in CASES.items() for cure in found.cures]


class Plain(nn.Module):
    """A loss or a miner as it is, which takes the inputs too."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *args, inputs=None):
        return self.wrapped(*args)


class Run:
    """One step of a loop.

    Args:
        name: of the case.
        cure: what is followed; None: nothing.
        budget: options of the attack; none: the plain loop.

    Attributes:
        value: of the loss.
        gradients: of all parameters.
        wrapped: the losses and miners that were made adversarial.
    """

    def __init__(self, name, cure=None, **budget):
        self.budget, self.wrapped = budget, []
        torch.manual_seed(0)
        value, modules = CASES[name].loop(self.wrap, cure)
        self.value = value.item()
        if value.requires_grad:
            value.backward()
        parameters = [p for module in modules for p in module.parameters()]
        self.gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def wrap(self, wrapped, model=None, **options):
        if not self.budget:
            return Plain(wrapped)
        if isinstance(wrapped, BaseMiner):
            self.wrapped.append(AdversarialMiner(wrapped, model, seed=0, **self.budget, **options))
        else:
            own = {"warmup": 0, "guard": False, "seed": 0, "keep_clean": self.budget["eps"] > 0.01, **self.budget}
            self.wrapped.append(AdversarialLoss(wrapped, model, **own, **options))
        return self.wrapped[-1]


def assert_same(found, expected):
    """Value and gradient to 1e-3 of their size."""
    assert abs(found.value - expected.value) <= 1e-3 * abs(expected.value)
    apart = torch.stack([(f - e).norm() for f, e in zip(found.gradients, expected.gradients, strict=True)]).norm()
    assert apart <= 1e-3 * torch.stack([e.norm() for e in expected.gradients]).norm()


def message(name):
    with alone(), pytest.raises(CASES[name].error, match=CASES[name].found) as caught:
        Run(name, **SOMETHING)
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_the_loop_is_refused_and_the_error_names_its_cures(name):
    text = message(name)
    for cure in CASES[name].cures:
        assert re.search(cure, text), text


@pytest.mark.parametrize(("name", "cure"), CURES)
def test_with_the_cure_and_a_budget_of_nothing_it_trains_as_the_plain_loop(name, cure):
    plain, run = Run(name, cure), Run(name, cure, **NOTHING)
    assert plain.value > 0
    assert_same(run, plain)
    if cure not in CASES[name].idle:
        assert any(gradient.any() for gradient in run.gradients)
        assert all(tool.records.embedding_shift < 1e-3 for tool in run.wrapped)


@pytest.mark.parametrize(("name", "cure"), CURES)
def test_the_cure_leaves_the_plain_loop_as_it_was(name, cure):
    if cure not in CASES[name].changes and _runs(name):
        assert_same(Run(name, cure), Run(name))


def _runs(name):
    try:
        Run(name)
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "cure"), [found for found in CURES if found.values[1] not in CASES[found.values[0]].idle]
)
def test_with_the_cure_and_a_budget_the_loss_rises(name, cure):
    run = Run(name, cure, **SOMETHING)
    assert run.wrapped
    for tool in run.wrapped:
        assert tool.records.num_perturbed > 0
        assert tool.records.embedding_shift > 1e-3
        if isinstance(tool, AdversarialLoss):
            assert tool.records.loss_after > tool.records.loss_before


SOURCES = {  # file -> functions whose texts are held here; None: all
    "training/capture.py": None,
    "training/sources.py": None,
    "training/rows.py": None,
    "training/replay.py": None,
    "training/pixels.py": None,
    "training/options.py": {"check_inputs"},
    "losses.py": {"_check_gradient"},
}
ELSEWHERE = "Expected torch 2.5 or newer"  # in what this torch does not do


def texts(tree, functions):
    """What errors may say, as far as it stays the same: the pieces of literal text in these functions."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    logged = {id(found) for call in calls if "warning" in ast.unparse(call.func) for found in ast.walk(call)}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or (functions and function.name not in functions):
            continue
        for found in ast.walk(function):
            is_text = isinstance(found, ast.Constant) and isinstance(found.value, str) and len(found.value) > 40
            if is_text and id(found) not in docstrings | logged:
                yield found.value


def test_each_text_of_an_error_is_that_of_a_case():
    said = "\n".join(map(message, CASES))
    package = Path(pml_adversarial.__file__).parent
    for name, functions in SOURCES.items():
        told = texts(ast.parse((package / name).read_text()), functions)
        missing = [text for text in told if text not in said and ELSEWHERE not in text]
        assert not missing, name
