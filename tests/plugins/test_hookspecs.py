"""The five questions: who is asked what, in which order, and whose answer counts."""

import inspect
from collections.abc import Callable

import pluggy
import pytest
from pytorch_metric_learning.losses import TripletMarginLoss
from seed_paper import seed_paper_loss
from torch import nn

import pml_adversarial
from pml_adversarial import Adversarial, Batch, Plan
from pml_adversarial.attacks import Objective
from pml_adversarial.plugins.hookspecs import PROJECT, HookSpecs, hookimpl

HOOKS = {name: hook for name, hook in vars(HookSpecs).items() if name.startswith(f"{PROJECT}_")}
KINDS = {
    "wrapped": nn.Module,
    "batch": Batch,
    "plan": Plan,
    "objective": Objective,
    "adversarial": Adversarial,
    "ask": Callable,
}


def asks_for(name, arguments, note):
    """A plugin that answers one question with no opinion, and takes these of its arguments."""
    scope = {"note": note}
    exec(f"def {name}(self, {', '.join(arguments)}): note({name!r}, locals())", scope)
    return type("Plugin", (), {name: hookimpl(scope[name]), "has_opinions": False})()


def arguments_of(name):
    return [argument for argument in inspect.signature(HOOKS[name]).parameters if argument != "self"]


def test_there_are_five_hooks():
    assert len(HOOKS) == 5


def test_every_question_is_asked_in_the_order_in_which_a_batch_meets_it(model, images, labels):
    asked = []
    plugins = [asks_for(name, [], lambda name, given: asked.append(name)) for name in reversed(HOOKS)]
    seed_paper_loss(TripletMarginLoss(), model, plugins=plugins)(model(images), labels)
    assert list(dict.fromkeys(asked)) == list(HOOKS)  # in which they are written, too


@pytest.mark.parametrize("name", HOOKS)
def test_a_plugin_takes_the_arguments_that_it_needs_by_name(name, model, images, labels):
    names, seen = arguments_of(name), []
    choices = [names, names[::-1], *([argument] for argument in names), []]
    plugins = [asks_for(name, choice, lambda name, given: seen.append(given)) for choice in choices]
    seed_paper_loss(TripletMarginLoss(), model, plugins=plugins)(model(images), labels)
    assert [[*given][1:] for given in seen[: len(choices)]] == choices
    for given in seen:
        assert all(isinstance(given[argument], KINDS[argument]) for argument in given if argument != "self")


def test_the_first_answer_counts_but_every_record_does():
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    for answer in (None, 1, 2):
        manager.register(type("Answers", (), {name: hookimpl(lambda self, a=answer: a) for name in HOOKS})())
    found = {name: getattr(manager.hook, name)(**dict.fromkeys(arguments_of(name))) for name in HOOKS}
    last_registered = 2  # which pluggy asks first
    assert found.pop(f"{PROJECT}_record") == [2, 1]
    assert found == dict.fromkeys(found, last_registered)
    assert len(found) == 4


def test_the_mark_is_that_of_the_package():
    assert pml_adversarial.hookimpl is hookimpl
    assert hookimpl.project_name == PROJECT
