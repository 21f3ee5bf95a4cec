"""No option does nothing: with each plugin, each option changes the loss or is refused."""

from importlib.metadata import entry_points

import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses

from pml_adversarial import AdversarialLoss, PlanError, PluginError
from pml_adversarial.attacks import preset
from pml_adversarial.defenses import ATTA, FARE, HM, FreeAT, HardRows

PLUGINS = {
    "none": None,
    **{entry.name: entry.load for entry in entry_points(group="pml_adversarial")},
    "fare": FARE,
    "hm": lambda: HM("random", "softhard"),  # triplets of this batch are as hard as its default asks for
    "HardRows": lambda: HardRows(0.5),
    "ATTA": lambda: ATTA(0.05),
    "FreeAT": lambda: FreeAT(0.05),
}
OPTIONS = {
    "eps": {"eps": 0.1},
    "steps": {"steps": 1},
    "attack": {"attack": torchattacks.FGSM},
    "perturb": {"perturb": "positive"},
    "keep_clean": {"keep_clean": False},
    "tuples_per_anchor": {"tuples_per_anchor": 1},
    "clean_weight": {"clean_weight": 0.5},
    "warmup": {"warmup": 4},
    "warmup as a share": {"warmup": 0.5, "total_steps": 8},
    "normalization": {"normalization": ([0.05], [0.9])},
    "seed": {"seed": 2},
}


def train(plugin, model, images, labels, **options):
    """The losses of three steps."""
    named = [] if plugin is None else [plugin()]
    loss_func = AdversarialLoss(
        losses.TripletMarginLoss(margin=1.0), model, **{"warmup": 0, "seed": 1, "plugins": named, **options}
    )
    found, targets = [], model(images).detach()
    for _ in range(3):
        for held in loss_func.adversary.hooks.named:
            if isinstance(held, ATTA):
                held.next(torch.arange(8))
        torch.manual_seed(0)  # of plugins that draw triplets
        references = {"ref_emb": targets, "ref_labels": labels} if any(isinstance(p, FARE) for p in named) else {}
        loss = loss_func(model(images), labels, **references)
        loss.backward()
        model.zero_grad()
        found.append(loss.item())
    return found


def refusal_or(work):
    """What the work gives, or the message with which it is refused."""
    try:
        return work()
    except (PluginError, PlanError) as error:
        return str(error)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)
def test_an_option_counts_or_is_refused(plugin, options, model, images, labels):
    plain = train(plugin, model, images, labels)
    found = refusal_or(lambda: train(plugin, model, images, labels, **options))
    if isinstance(found, str):
        assert next(iter(options)) in found  # it names the option
    else:
        assert found != plain


def test_copies_count_or_are_refused(model, images, labels):
    wrapped = losses.TripletMarginLoss(margin=1.0)
    with pytest.raises(PlanError, match="copies='append' has no effect where every row is perturbed"):
        AdversarialLoss(wrapped, model, copies="append")
    plain, replaced = (train(None, model, images, labels, perturb="positive", **o) for o in ({}, {"copies": "replace"}))
    assert plain != replaced
    with pytest.raises(PluginError, match=r"HM answers pml_adversarial_plan itself, so perturb and copies"):
        train(PLUGINS["hm"], model, images, labels, perturb="positive", copies="replace")


def test_the_default_preset_may_be_said(model, images, labels):
    """A value that is the default is no other loss, and is refused where it would not count all the same."""
    assert train(None, model, images, labels, attack=preset(8 / 255)) == train(None, model, images, labels)
    with pytest.raises(PluginError, match="FreeAT answers"):
        train(PLUGINS["FreeAT"], model, images, labels, steps=3)
