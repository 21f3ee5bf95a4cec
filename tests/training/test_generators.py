"""A model may hold a random number generator: attacks leave it as it was, and embed with the numbers of the loop."""

import random

import numpy
import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn

from pml_adversarial import AdversarialLoss
from pml_adversarial.training.generators import begun_at, seed, set_state, state_of
from pml_adversarial.training.side_effects import Values, generators_of, undone, undone_with_values

DRAWS = {
    "torch": (torch.Generator, lambda g, n: torch.rand(n, generator=g)),
    "Generator of NumPy": (numpy.random.default_rng, lambda g, n: torch.from_numpy(g.random(n))),
    "bits of NumPy": (numpy.random.PCG64, lambda g, n: torch.from_numpy(numpy.random.Generator(g).random(n))),
    "RandomState of NumPy": (numpy.random.RandomState, lambda g, n: torch.from_numpy(g.rand(n))),
    "Python": (random.Random, lambda g, n: torch.tensor([g.random() for _ in range(n)])),
}
every_kind = pytest.mark.parametrize("kind", DRAWS)


class Noisy(nn.Module):
    """Adds noise to the pixels, in train mode or always."""

    def __init__(self, kind, always=False):
        super().__init__()
        make, self.draw = DRAWS[kind]
        self.always, self.linear, self.holder = always, nn.Linear(6, 4).double(), {"own": make()}
        seed(self.own, 5)

    @property
    def own(self):
        return self.holder["own"]

    def forward(self, batch):
        if self.training or self.always:
            batch = batch + 0.2 * self.draw(self.own, batch.numel()).to(batch).reshape(batch.shape)
        return self.linear(batch)


def drawn(module, count=3):
    return module.draw(module.own, count).tolist()


@every_kind
class TestState:
    def test_a_seed_begins_anew(self, kind):
        module = Noisy(kind)
        first = drawn(module)
        assert drawn(module) != first
        seed(module.own, 5)
        assert drawn(module) == first
        seed(module.own, 6)
        assert drawn(module) != first

    def test_is_read_and_set(self, kind):
        module = Noisy(kind)
        state = state_of(module.own)
        first, second = drawn(module), drawn(module)
        set_state(module.own, state)
        assert drawn(module) == first
        with begun_at([module.own], [state]):
            assert drawn(module) == first
        assert drawn(module) == second

    def test_is_put_back_with_values_alone(self, kind):
        module = Noisy(kind)
        state = state_of(module.own)
        first, second = drawn(module), drawn(module)
        set_state(module.own, state)
        for learns in (False, True):
            with undone_with_values(module.modules(), learns):
                assert drawn(module) == first
        with undone(module.modules()):
            assert drawn(module) == first
        assert drawn(module) == second  # as after any forward pass

    def test_is_known_from_before_a_call(self, kind):
        module = Noisy(kind)
        values = Values(list(module.modules()))
        first = drawn(module)
        for put_back in values.changed():
            put_back()
        assert drawn(module) == first


def test_what_has_no_state_is_left_out():
    module = nn.Linear(2, 2)
    module.own = [random.SystemRandom(), torch.rand, random]
    assert generators_of([module]) == []


@every_kind
class TestStep:
    def step(self, module, **options):
        images = torch.rand(12, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        loss_func = AdversarialLoss(MultiSimilarityLoss(), module, eps=0.1, seed=0, warmup=0, **options)
        loss = loss_func(module(images), torch.arange(12) // 3)
        loss.backward()
        return loss.item(), module.linear.weight.grad

    def test_rows_and_copies_draw_once_each(self, kind):
        module, other = Noisy(kind), Noisy(kind)
        self.step(module)
        for _ in range(2):  # the batch, and its copies
            other(torch.rand(12, 6, dtype=torch.double))
        assert drawn(module) == drawn(other)

    def test_a_model_that_always_draws_is_attacked(self, kind):
        loss, gradient = self.step(Noisy(kind, always=True))
        assert loss > 0
        assert gradient.abs().sum() > 0

    def test_chunks_draw_the_same_again(self, kind):
        torch.manual_seed(0)
        module = Noisy(kind)
        whole = self.step(module)
        torch.manual_seed(0)
        in_chunks = Noisy(kind)
        found = self.step(in_chunks, chunk=4)
        assert found[0] == pytest.approx(whole[0], rel=1e-9)
        torch.testing.assert_close(found[1], whole[1])
        assert drawn(in_chunks) == drawn(module)
