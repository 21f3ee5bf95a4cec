"""A model is evaluated in the modes in which its user runs it, and comes back as it was."""

import pytest
import torch
import torchattacks
from torch import nn

from pml_adversarial.evaluation.retrieval.embedder import Embedder
from pml_adversarial.evaluation.retrieval.modes import SteadyObjective, as_deployed, left_in_train_mode


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))


def modes(module):
    return [part.training for part in module.modules()]


class Switching(nn.Module):
    """In eval mode it gives features, and says so in an attribute of its own."""

    def __init__(self):
        super().__init__()
        self.features, self.head, self.gives = nn.Linear(4, 3), nn.Linear(3, 2), "logits"

    def train(self, mode=True):
        self.gives = "logits" if mode else "features"
        return super().train(mode)

    def forward(self, x):
        found = self.features(x)
        return self.head(found) if self.gives == "logits" else found


class Merging(nn.Module):
    """In eval mode a second weight is added to the first one in place, and one layer takes the place of another."""

    def __init__(self):
        super().__init__()
        self.weight, self.added = (nn.Parameter(torch.rand(3, 4)) for _ in range(2))
        self.merged, self.slow = False, nn.Linear(3, 3)

    def eval(self):
        if not self.merged:
            self.weight.data += self.added.data
            self.fast, self.merged = nn.Linear(3, 3), True
            self.fast.weight = nn.Parameter(2 * self.slow.weight.detach())
            del self.slow
        return super().eval()

    def forward(self, x):
        weight = self.weight if self.merged else self.weight + self.added
        return (self.fast if self.merged else self.slow)(x.flatten(1) @ weight.T)


class Refusing(nn.Sequential):
    def eval(self):
        raise NotImplementedError("exported")


def test_parts_of_a_model_in_eval_mode_stay_as_the_user_set_them():
    model = net().eval()
    model[1].train()
    with as_deployed(model):
        assert modes(model) == [False, False, True, False]
    assert modes(model) == [False, False, True, False]


def test_a_model_in_train_mode_is_in_eval_mode_and_comes_back():
    model = net().train()
    model[2].eval()
    with as_deployed(model):
        assert modes(model) == [False] * 4
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert modes(model) == [True, True, True, False]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_each_of_several_models_has_its_own_mode():
    model, other = net().eval(), net()
    model[1].train()
    with Embedder([model, other]).isolated():
        assert model[1].training
        assert modes(other) == [False] * 4
    assert model[1].training
    assert modes(other) == [True] * 4


def test_a_model_is_switched_by_its_own_method():
    model = Switching()
    with as_deployed(model):
        assert model.gives == "features"
        assert not model.head.training
    assert model.gives == "logits"
    assert modes(model) == [True] * 3


def test_what_the_method_did_to_weights_and_parts_is_undone():
    model, images = Merging(), torch.rand(5, 4)
    before, expected = {name: value.clone() for name, value in model.state_dict().items()}, model(images)
    slow = model.slow
    with as_deployed(model):
        assert model.merged
        assert not model.fast.weight.requires_grad
    assert not model.merged
    assert model.slow is slow
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(images), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_that_refuses_its_eval_is_switched_nevertheless():
    model = Refusing(nn.Linear(4, 4), nn.Dropout())
    with as_deployed(model):
        assert modes(model) == [False] * 3
    assert modes(model) == [True] * 3


def test_modes_come_back_after_an_error():
    model = Switching()
    with pytest.raises(OSError, match="lost"), as_deployed(model):
        raise OSError("lost")
    assert model.gives == "logits"
    assert modes(model) == [True] * 3


def test_the_parts_that_stay_in_train_mode_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Dropout()))
    assert left_in_train_mode(model.eval()) == []
    model[0].train()  # no code of it asks for the mode
    assert left_in_train_mode(model) == []
    model[1][1].train()
    assert left_in_train_mode(model, nn.Dropout()) == ["1.1 (Dropout)", "Dropout"]
    assert left_in_train_mode(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))) == []


def test_the_probe_finds_modules_of_a_function_with_their_own_methods():
    model = Switching()
    embed = Embedder(lambda images: model(images.flatten(1)))
    embed.probe(torch.rand(1, 1, 2, 2))
    assert embed.modules == (model,)
    with embed.isolated():
        assert embed(torch.rand(2, 1, 2, 2)).shape == (2, 3)
    assert model.gives == "logits"


def test_an_attack_of_torchattacks_leaves_the_modes():
    model = nn.Sequential(nn.Flatten(), net()).eval()
    model[1][1].train()
    seen, images = [], torch.rand(3, 1, 2, 2)

    def score(embeddings):
        seen.append(model[1][1].training)
        return embeddings.sum(1)

    with as_deployed(model):
        objective = SteadyObjective(model, score, model(images), [model])
        torchattacks.PGD(objective, steps=2)(images, objective.labels)
    assert len(seen) > 2
    assert all(seen)
