"""Tests that every plugin should have."""

import copy
from functools import partial

import pytest
import torch
import torchattacks
from embedding_shift import EmbeddingShift
from pytorch_metric_learning.losses import TripletMarginLoss

from pml_adversarial import AdversarialLoss, PluginError

IMAGES, LABELS = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) // 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def wrapped(model, plugin, eps=0.1):
    attack = partial(torchattacks.PGD, eps=eps, alpha=eps / 3, steps=5)
    return AdversarialLoss(TripletMarginLoss(), model, attack=attack, plugins=[plugin], warmup=0, seed=0)


def test_at_eps_0_it_is_the_wrapped_loss(model):
    found = wrapped(model, EmbeddingShift, eps=0.0)(model(IMAGES), LABELS)
    assert found == TripletMarginLoss()(model(IMAGES), LABELS)


@pytest.mark.parametrize("plugin", [EmbeddingShift(), EmbeddingShift, "embedding_shift"])
def test_every_embedding_moves_away_from_its_clean_one(model, plugin):
    loss_func = wrapped(model, plugin)
    loss_func(model(IMAGES), LABELS).backward()
    assert loss_func.num_perturbed == len(IMAGES)
    assert loss_func.share_score_rose == 1
    assert loss_func.score_gain > 0


def test_the_model_is_unchanged(model):
    before = copy.deepcopy(model.state_dict())
    wrapped(model, EmbeddingShift)(model(IMAGES), LABELS)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_misspelt_name_is_refused(model):
    with pytest.raises(PluginError, match=r"No plugin named 'embeding_shift'.*Did you mean 'embedding_shift'"):
        wrapped(model, "embeding_shift")
