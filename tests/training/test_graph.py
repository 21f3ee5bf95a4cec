"""What the graph of autograd tells of a tensor that is not followed."""

import logging

import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from written_loops import LABELS, images, net

from pml_adversarial import AdversarialLoss
from pml_adversarial.training.graph import is_made_of, is_of_data, nodes_of, own_function


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


WEIGHT = nn.Parameter(torch.rand(36, 8))
TABLE = nn.Parameter(torch.rand(5, 8))


def flat(x):
    return x.flatten(1)


class TestOwnFunction:
    def test_is_found_behind_others(self):
        assert own_function(Doubled.apply(TABLE).exp().sum(1)) == "Doubled"

    def test_is_none_where_there_is_none(self):
        assert own_function(TABLE.exp()) is None


class TestIsOfData:
    def test_of_flipped_images_that_need_gradient(self):
        assert is_of_data(images().requires_grad_().flip(-1))

    def test_not_of_what_parameters_gave(self):
        assert not is_of_data(flat(images()) @ WEIGHT)


class TestIsMadeOf:
    @pytest.mark.parametrize(
        "make",
        [
            lambda x: flat(x) @ WEIGHT,
            lambda x: functional.linear(flat(x), WEIGHT.T, WEIGHT[0]).tanh().sum(1, keepdim=True),
            lambda x: functional.conv2d(x, WEIGHT[:9, :1].T.reshape(1, 1, 3, 3)),
            lambda x: Doubled.apply(flat(x) @ WEIGHT),
            lambda x: x * WEIGHT[:6, 0],
        ],
        ids=["product", "linear", "convolution", "own function", "factor"],
    )
    def test_of_inputs_that_a_node_saved(self, make):
        x = images()
        assert is_made_of(make(x), [x], set()) is True

    def test_of_inputs_that_need_gradient(self):
        x = images().requires_grad_()
        assert is_made_of(x + 1, [x], set()) is True

    def test_of_what_the_embeddings_are_made_of(self):
        x = images()
        embeddings = ((x - 0.5) / 0.2).flatten(1) @ WEIGHT
        length = embeddings.norm(dim=1)
        assert is_made_of(length, [x], set(nodes_of(embeddings))) is True

    def test_perhaps_of_data_with_as_many_rows(self):
        x = images()
        assert is_made_of(((x - 0.5) / 0.2).flatten(1) @ WEIGHT, [x], set()) is None

    @pytest.mark.parametrize(
        "make",
        [
            lambda: TABLE.exp(),
            lambda: TABLE[LABELS],
            lambda: functional.normalize(TABLE)[LABELS],
            lambda: TABLE[:1].expand(8, 8),
            lambda: torch.rand(3, 5) @ TABLE,
            lambda: Doubled.apply(TABLE),
        ],
        ids=["function", "of labels", "normalised", "expanded", "other rows", "own function"],
    )
    def test_not_of_parameters_alone(self, make):
        x = images()
        assert is_made_of(make(), [x], set(nodes_of(flat(x) @ WEIGHT))) is False

    def test_not_seen_where_the_graph_was_freed(self):
        x = images()
        found = flat(x) @ WEIGHT
        found.sum().backward()
        assert is_made_of(found, [x], set()) is False


class TestNodesOf:
    def test_not_through_some(self):
        first = TABLE.exp()
        last = first.sum() + TABLE.tanh().sum()
        assert first.grad_fn in set(nodes_of(last))
        assert first.grad_fn not in set(nodes_of(last, {first.grad_fn}))


class TestBesideTheEmbeddings:
    def step(self, beside, model=None):
        model = model or net()
        loss_func = AdversarialLoss(ContrastiveLoss(), model, warmup=0)
        x = images()
        loss_func(torch.cat([model(x), beside(x)], 1), LABELS)
        return loss_func

    def test_what_may_be_made_of_the_inputs_is_told(self, caplog):
        with caplog.at_level(logging.WARNING, "pml_adversarial"):
            loss_func = self.step(lambda x: (x - 0.5).flatten(1) @ WEIGHT)
        assert loss_func.num_perturbed == 8
        assert "cat took a tensor (8, 8) that was computed with gradient" in caplog.text
        assert "It is held fixed" in caplog.text

    def test_parameters_are_not_told(self, caplog):
        with caplog.at_level(logging.WARNING, "pml_adversarial"):
            self.step(lambda x: functional.normalize(TABLE)[LABELS])
        assert not caplog.records

    def test_a_graph_of_checkpoints_is_told(self, caplog):
        with caplog.at_level(logging.WARNING, "pml_adversarial"):
            self.step(lambda x: checkpoint(lambda y: (y - 0.5).flatten(1) @ WEIGHT, x, use_reentrant=False))
        assert "It is held fixed" in caplog.text
