"""Models that seed the global random number generators: they are found, and do not decide what attacks draw."""

import random

import numpy
import pytest
import torch

from pml_adversarial.evaluation.retrieval.embedder import Embedder
from pml_adversarial.evaluation.retrieval.seeds import generators_kept, seeded, states_of_generators
from pml_adversarial.training.isolation import seed_all


def fork_and_seed():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)


CALLS = {
    "nothing": (lambda: None, []),
    "draws": (lambda: (torch.rand(2), numpy.random.rand(2), random.random()), []),  # noqa: NPY002
    "seeds and restores": (fork_and_seed, []),
    "torch": (lambda: torch.manual_seed(0), ["torch"]),
    "draws, then seeds": (lambda: (torch.rand(2), torch.manual_seed(0)), ["torch"]),
    "numpy": (lambda: numpy.random.seed(0), ["numpy"]),  # noqa: NPY002
    "random": (lambda: random.seed(0), ["random"]),
    "a state": (lambda: random.setstate(random.Random(3).getstate()), ["random"]),
    "all": (lambda: (torch.manual_seed(1), numpy.random.seed(2), random.seed(3)), ["torch", "numpy", "random"]),  # noqa: NPY002
}


@pytest.mark.parametrize("name", CALLS)
def test_the_generators_that_a_call_seeds_are_found(name):
    call, expected = CALLS[name]
    after = []
    for seed in (3, 4):
        seed_all(seed)
        call()
        after.append(states_of_generators())
    assert [found for found in seeded(*after) if found != "cuda"] == expected


def test_only_the_generators_that_are_named_come_back():
    torch.manual_seed(0)
    random.seed(0)
    drawn = torch.rand(1), random.random()
    torch.manual_seed(0)
    random.seed(0)
    with generators_kept(["torch"]):
        torch.manual_seed(5)
        random.random()
    assert torch.equal(torch.rand(1), drawn[0])
    assert random.random() != drawn[1]


class TestEmbedder:
    def seeding(self, images):
        torch.manual_seed(0)
        return images.flatten(1) + torch.rand(3)

    def test_a_model_that_seeds_leaves_the_random_numbers_of_others_alone(self):
        embed, pixels = Embedder(self.seeding), torch.rand(2, 1, 1, 3)
        torch.manual_seed(7)
        expected = torch.rand(4)
        torch.manual_seed(7)
        embed.probe(pixels[:1])
        found = embed(pixels)
        assert torch.equal(torch.rand(4), expected)
        assert torch.equal(embed(pixels), found)
        assert ["seeds the global random numbers of torch" in note for note in embed.notes] == [True]

    def test_a_second_probe_does_not_forget(self):
        embed = Embedder(self.seeding)
        for _ in range(2):
            embed.probe(torch.rand(1, 1, 1, 3))
        assert embed.seeds == ("torch",)

    def test_what_it_draws_from_another_generator_stays_random(self):
        def model(images):
            torch.manual_seed(0)
            return images.flatten(1) + random.random()

        embed, pixels = Embedder(model), torch.rand(2, 1, 1, 3)
        embed.probe(pixels[:1])
        embed.probe_randomness(pixels)
        assert embed.seeds == ("torch",)
        assert embed.is_random

    def test_others_are_not_noted(self):
        embed = Embedder(lambda images: images.flatten(1) + torch.rand(3))
        embed.probe(torch.rand(1, 1, 1, 3))
        assert embed.seeds == embed.notes == ()
