"""AWP against the paper's update of the weights, made by hand on a copy of the model."""

import copy
import math
from functools import partial

import pytest
import torch
from one_step import PEERS_PGD, Spy, step
from pytorch_metric_learning import losses
from pytorch_metric_learning.reducers import MeanReducer
from torch import nn
from torch.utils.checkpoint import checkpoint

from pml_adversarial import AdversarialLoss, InputError, PluginError
from pml_adversarial.defenses.awp import AWP
from pml_adversarial.defenses.ics import ICS
from pml_adversarial.defenses.trades import TRADES


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant=False):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, features):
        return checkpoint(self.inner, features, use_reentrant=self.use_reentrant)


TRIPLET = partial(losses.TripletMarginLoss, margin=0.2, reducer=MeanReducer())
ALL = {"perturb": "all", "tuples_per_anchor": None}


def worst(model, loss_of, gamma):
    """A copy of the model, with every matrix moved by gamma times its length along the gradient of the loss."""
    moved = copy.deepcopy(model)
    gradients = torch.autograd.grad(loss_of(moved), list(moved.parameters()))
    with torch.no_grad():
        for weight, gradient in zip(moved.parameters(), gradients, strict=True):
            if weight.ndim > 1:
                weight += gamma * weight.norm() * gradient / gradient.norm()
    return moved


class TestTheFormula:
    def test_the_loss_and_its_gradient_are_those_at_the_worst_weights(self, model, images, labels):
        awp = AWP(gamma=0.05)
        loss_func, spy = step(model, images, labels, awp, loss=TRIPLET(), **ALL)
        perturbed = spy.adversarial.inputs
        moved = worst(model, lambda network: TRIPLET()(network(perturbed), labels), 0.05)
        expected = TRIPLET()(moved(perturbed), labels)
        value = loss_func(model(images), labels)  # the second step draws the same numbers: no random start
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        found = torch.autograd.grad(value, list(model.parameters()))
        for one, other in zip(found, torch.autograd.grad(expected, list(moved.parameters())), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    def test_it_raises_the_loss(self, model, images, labels):
        plain, _ = step(model, images, labels, loss=TRIPLET(), **ALL)
        moved, _ = step(model, images, labels, AWP(gamma=0.05), loss=TRIPLET(), **ALL)
        assert moved.records.loss_after > plain.records.loss_after
        assert moved.records.loss_before == pytest.approx(plain.records.loss_before)

    def test_weights_and_gradients_are_as_they_were(self, model, images, labels):
        before = [(weight, weight.detach().clone()) for weight in model.parameters()]
        step(model, images, labels, AWP(gamma=0.5), loss=TRIPLET(), **ALL)
        for (held, value), now in zip(before, model.parameters(), strict=True):
            assert held is now
            assert torch.equal(value, now)
            assert now.grad is None

    def test_without_gamma_it_is_the_other_method(self, model, images, labels):
        plain, _ = step(model, images, labels, loss=TRIPLET(), **ALL)
        none, _ = step(model, images, labels, AWP(gamma=0), loss=TRIPLET(), **ALL)
        assert none.records.loss_after == plain.records.loss_after

    def test_gamma_grows_with_the_attack(self, model, images, labels):
        def reached(warmup):
            loss_func = AdversarialLoss(
                TRIPLET(), model, attack=PEERS_PGD, keep_clean=False, plugins=[AWP(0.05)], warmup=warmup, seed=0
            )
            loss_func(model(images), labels)
            return loss_func

        assert math.isfinite(reached(0).records.loss_after)
        first = reached(10)  # no strength in the first of ten steps
        assert first.records.loss_after == pytest.approx(TRIPLET()(model(images), labels).item())


class TestAround:
    def test_clean_rows_stay_where_they_are(self, model, images, labels):
        """With clean rows beside the copies, the gradient of the clean rows is theirs at w."""
        spy = Spy()
        loss_func = AdversarialLoss(
            losses.SupConLoss(), model, attack=PEERS_PGD, plugins=[AWP(0.05), spy], warmup=0, guard=False, seed=0
        )
        value = loss_func(model(images), labels)
        perturbed = spy.adversarial.inputs
        moved = worst(
            model,
            lambda network: losses.SupConLoss()(_both(model(images).detach(), network(perturbed)), _twice(labels)),
            0.05,
        )
        clean = model(images)
        expected = losses.SupConLoss()(_both(clean, moved(perturbed)), _twice(labels))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("order", [0, 1])
    def test_beside_other_plugins(self, order, model, images, labels):
        """TRADES and ICS are asked again at the worst weights."""
        plugins = [AWP(0.05), TRADES(weight=2.0)] if order else [TRADES(weight=2.0), AWP(0.05)]
        alone, _ = step(model, images, labels, TRADES(weight=2.0), loss=TRIPLET())
        both, _ = step(model, images, labels, *plugins, loss=TRIPLET())
        assert both.records.loss_after > alone.records.loss_after
        with_term, _ = step(model, images, labels, AWP(0.05), ICS(0.5), loss=TRIPLET(), perturb="anchor")
        assert math.isfinite(with_term.records.loss_after)

    def test_batchnorm_sees_the_rows_once(self, moody_model, images, labels):
        def statistics(*plugins):
            network = copy.deepcopy(moody_model)
            torch.manual_seed(0)
            step(network, images, labels, *plugins, loss=TRIPLET(), **ALL)[0]
            return network[1].running_mean, network[1].num_batches_tracked

        for one, other in zip(statistics(), statistics(AWP(0.05)), strict=True):
            assert torch.equal(one, other)

    def test_through_what_the_loop_did_and_through_shared_weights(self, images, labels):
        first = nn.Linear(36, 36)
        network = nn.Sequential(nn.Flatten(), first, nn.Tanh(), first, nn.Linear(36, 4))
        loss_func = AdversarialLoss(TRIPLET(), attack=PEERS_PGD, keep_clean=False, plugins=[AWP(0.05)], warmup=0)
        value = loss_func(nn.functional.normalize(network(images)), labels)
        value.backward()
        assert all(weight.grad is not None for weight in network.parameters())
        assert loss_func.records.loss_after > loss_func.records.loss_before

    def test_frozen_weights_are_not_moved(self, model, images, labels):
        model[1].weight.requires_grad_(False)
        loss_func, _ = step(model, images, labels, AWP(0.05), loss=TRIPLET(), **ALL)
        assert not model[1].weight.requires_grad
        assert math.isfinite(loss_func.records.loss_after)

    def test_of_a_compiled_module(self, model, images, labels):
        compiled = torch.compile(model, backend="eager")
        plain, _ = step(model, images, labels, AWP(0.05), loss=TRIPLET(), **ALL)
        found, _ = step(compiled, images, labels, AWP(0.05), loss=TRIPLET(), **ALL)
        assert found.records.loss_after == pytest.approx(plain.records.loss_after, rel=1e-5)

    @pytest.mark.parametrize("before", [[], ["est"]])
    def test_a_memory_meets_each_batch_once(self, before, model, images, labels):
        memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, memory_size=64)
        by_hand = copy.deepcopy(memory)
        options = {} if before else {"keep_clean": False}
        loss_func = AdversarialLoss(
            memory, model, attack=PEERS_PGD, plugins=[*before, AWP(0.05), spy := Spy()], warmup=0, **options
        )
        for _ in range(3):
            value = loss_func(model(images), labels)
            perturbed = spy.adversarial.inputs.detach()
            if not before:
                moved = worst(model, lambda network, x=perturbed: copy.deepcopy(by_hand)(network(x), labels), 0.05)
                torch.testing.assert_close(value, by_hand(moved(perturbed), labels), rtol=1e-4, atol=1e-6)
                assert memory.queue_idx == by_hand.queue_idx
        assert memory.queue_idx == 3 * len(images)

    @pytest.mark.parametrize("how", ["chunk", "checkpoint", "chunk and checkpoint"])
    def test_what_is_computed_again_is_computed_with_the_worst_weights(self, how, model, images, labels):
        def gradients(network, **options):
            for weight in model.parameters():
                weight.grad = None
            loss_func = AdversarialLoss(
                TRIPLET(), network, attack=PEERS_PGD, keep_clean=False, plugins=[AWP(0.5)], warmup=0, seed=0, **options
            )
            value = loss_func(network(images), labels)
            value.backward()
            return value.detach(), [weight.grad for weight in model.parameters()]

        expected = gradients(model)
        found = gradients(Checkpointed(model) if "checkpoint" in how else model, chunk=5 if "chunk" in how else None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    def test_reentrant_checkpoints_are_refused(self, model, images, labels):
        network = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), Checkpointed(nn.Linear(36, 4), use_reentrant=True))
        with pytest.raises(PluginError, match="use_reentrant=False"):
            step(network, images, labels, AWP(), loss=TRIPLET(), **ALL)

    def test_by_name(self, model, images, labels):
        loss_func, _ = step(model, images, labels, "awp", loss=TRIPLET())
        assert math.isfinite(loss_func.records.loss_after)

    @pytest.mark.parametrize("gamma", [-1, math.inf, math.nan, "1", None, True])
    def test_what_is_no_gamma(self, gamma):
        with pytest.raises(InputError, match=r"gamma=.*expected a number from 0 on"):
            AWP(gamma)


def _both(clean, copies):
    return torch.cat([clean, copies])


def _twice(labels):
    return torch.cat([labels, labels])
