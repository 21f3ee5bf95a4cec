"""Models that answer at random: attacks average gradients over draws, and each query is measured in many draws."""

import math
from functools import partial

import by_loops
import pytest
import torch
from query_batches import RADIUS, Made, bench_of, both_norms, embedded, images_of, network
from torch import nn

from pml_adversarial.evaluation import (
    GalleryAttack,
    QueryAttack,
    checks,
    estimate_cost,
    evaluate_robustness,
    evaluate_targeted,
    fast,
    quick,
    standard,
)
from pml_adversarial.evaluation.attacks.gradients import classifier_attack, nearest_wrong, promotion
from pml_adversarial.evaluation.attacks.transfer import transfer_attack
from pml_adversarial.evaluation.retrieval.batch import ANSWERS, SAMPLES

STILL = QueryAttack("still", lambda batch, eps, restart: batch.images)
SHAKEN = QueryAttack("shaken", lambda batch, eps, restart: batch.images + eps)


class Noisy(nn.Module):
    """An honest model with noise in front."""

    def __init__(self, model, noise=0.2):
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, x):
        return self.model(x + self.noise * torch.randn_like(x))


class Fickle(nn.Module):
    """Two classes, by the first pixel; answers of class 1 are wrong by chance, which the last pixel decides."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x):
        first, last = x[:, 0, 0, 0] > 0.5, x[:, 0, 0, 1]
        wrong = torch.rand(len(x)) < torch.where(last > 0.5, self.high, self.low)
        side = torch.where(first & ~wrong, 1.0, -1.0)
        return torch.stack([side, torch.full_like(side, 0.01)], 1) + 0 * x.flatten(1).sum(1, keepdim=True)


def flagged_images(count=30):
    """Queries of class 1 alone, and a gallery of both classes that the model is never unsure about."""
    queries = torch.tensor([[[[0.9, 0.3]]]]).repeat(count, 1, 1, 1)
    return queries, torch.ones(count, dtype=torch.long)


def evaluated(model, attacks, queries=None, gallery=None, **options):
    options = {"eps": 0.05, "checks": False, **options}
    return evaluate_robustness(model, queries or images_of(), gallery, attacks=attacks, **options)


def fickle(low, high, attacks, **options):
    gallery = (None, torch.tensor([0, 1]))
    embeddings = torch.tensor([[-1.0, 0.01], [1.0, 0.01]])
    options = {"gallery_embeddings": embeddings, "eps": 0.3, **options}
    return evaluated(Fickle(low, high), attacks, flagged_images(), gallery, **options)


class TestWhatCounts:
    @pytest.mark.parametrize(("chance", "flag"), [(0.0, "1"), (0.3, "1"), (0.7, "0"), (1.0, "0")])
    def test_measures_are_means_over_draws_and_flags_the_majority(self, chance, flag):
        """A query fails with a known probability: the mean over all draws is that of a binomial."""
        report = fickle(chance, chance, [STILL, SHAKEN])
        spread = math.sqrt(chance * (1 - chance) / (ANSWERS * 30))
        assert abs(report.clean["recall_at_1"] - (1 - chance)) <= 4 * spread
        if 0 < chance < 1:
            assert report.clean_flags.count(flag) == 30
            assert report.clean["recall_at_1"] not in (0, 1)
            assert any("answers at random" in note for note in report.notes)
        for result in report.attacks:
            assert result.robust_flags == report.clean_flags
            lowest = 1 - chance - 6 * math.sqrt(chance * (1 - chance) / ANSWERS)  # luck of a hundred draws
            assert lowest <= result.measures["recall_at_1"] <= report.clean["recall_at_1"]

    def test_a_query_that_fails_more_often_under_attack(self):
        report = fickle(0.1, 0.8, [STILL, SHAKEN], keep_attacked=True)
        still, shaken = report.attacks
        assert still.robust_flags == report.clean_flags == "1" * 30
        assert shaken.robust_flags == report.worst[0].robust_flags == "0" * 30
        assert abs(shaken.measures["recall_at_1"] - 0.2) < 0.05
        assert report.worst[0].measures["recall_at_1"] == shaken.measures["recall_at_1"]
        torch.testing.assert_close(report.attacked[0.3], (flagged_images()[0] + 0.3).clamp(0, 1))
        assert {example.attack for example in report.examples} == {"shaken"}

    def test_the_worst_image_is_kept_over_eps_and_restarts(self):
        """At the larger eps the attack does harm no more: the image of the smaller one stays the worst."""

        def at_small_eps(batch, eps, restart):
            return batch.images + (0.3 if eps == 0.3 and restart == 1 else 0.0)

        report = fickle(0.1, 0.8, [QueryAttack("x", at_small_eps, 3)], eps=(0.1, 0.3, 0.4), keep_attacked=True)
        shares = [worst.measures["recall_at_1"] for worst in report.worst]
        assert shares[0] > 0.7
        assert 0.3 > shares[1] >= shares[2]
        lit = [(report.attacked[eps][..., 1] > 0.5).float().mean().item() for eps in (0.1, 0.3, 0.4)]
        assert lit == [0, 1, 1]

    def test_of_other_models_nothing_changes(self):
        asked = []
        model = network().eval()
        report = evaluated(lambda x: asked.append(len(x)) or model(x), [STILL], checks=False)
        assert sum(asked) == 3 + 2 * 16 + 24 + 24 + 8  # probes, gallery, attack, examples
        assert set(report.clean_flags) == {"0", "1"}
        assert report.clean["recall_at_1"] == report.clean_flags.count("1") / 24
        assert report.notes == ()

    def test_a_seed_fixes_it(self):
        first, again, other = (evaluated(Noisy(network()), quick(2, 1), seed=seed) for seed in (0, 0, 1))
        assert first.worst == again.worst != other.worst


class TestGradients:
    @both_norms
    @pytest.mark.parametrize("seed", range(3))
    def test_mean_gradients_break_clearly_more(self, norm, seed):
        """In trials, R@1 was 18.0, 18.9, 17.3 % by single draws, and 11.3, 12.2, 12.0 % by ten; l2 13.6 and 6.7."""
        single, mean = (
            evaluated(Noisy(network()), quick(10, 1, n)[:1], images_of(60), eps=2 * RADIUS[norm], norm=norm, seed=seed)
            for n in (1, None)
        )
        assert single.clean["recall_at_1"] > 0.4
        assert mean.worst[0].measures["recall_at_1"] < 0.8 * single.worst[0].measures["recall_at_1"]
        assert mean.worst[0].robust_flags.count("1") <= single.worst[0].robust_flags.count("1")

    @pytest.mark.parametrize(("samples", "draws"), [(None, SAMPLES), (1, 1), (3, 3)])
    def test_number_of_draws(self, samples, draws):
        report = evaluated(Noisy(network()), quick(4, 1, samples))
        for result in report.attacks:
            assert result.backward_passes == 24 * 4 * draws
            assert result.forward_passes == 24 * (5 * draws + ANSWERS)

    def test_of_other_models_there_is_one_if_none_are_asked_for(self):
        for samples, draws in ((None, 1), (3, 3)):
            for result in evaluated(network(), quick(4, 1, samples)).attacks:
                assert result.backward_passes == 24 * 4 * draws

    def test_of_attacks_on_the_gallery(self):
        for samples, draws in ((None, SAMPLES), (2, 2)):
            attack = GalleryAttack("promote", nearest_wrong, promotion, 3, samples=samples)
            (result,) = evaluated(Noisy(network()), [attack]).attacks
            assert result.backward_passes == 24 * 3 * draws
            assert result.forward_passes == 24 * (4 * draws + 1 + 2 * (ANSWERS - 1))

    @pytest.mark.parametrize(("samples", "random", "given"), [(None, True, SAMPLES), (None, False, 1), (4, True, 4)])
    def test_attacks_of_torchattacks_are_told(self, samples, random, given):
        told = []

        def make(model, eot_iter=0):
            told.append(eot_iter)
            return lambda images, labels: images

        model = Noisy(network()) if random else network()
        evaluated(model, [QueryAttack("x", classifier_attack(make, samples=samples))])
        assert set(told) == {given}

    def test_what_does_not_know_of_draws_is_not_told(self):
        evaluated(Noisy(network()), [QueryAttack("x", classifier_attack(lambda model, **rest: lambda x, y: x))])

    @pytest.mark.parametrize("suite", [partial(standard, 3, 1, 5, 2), partial(fast, 4, 5, 2), partial(quick, 3, 1)])
    def test_all_suites_take_the_number(self, suite):
        names = {True: [], False: []}
        counts = [
            {r.attack: r.backward_passes for r in evaluated(Noisy(network()), suite(samples=n), eps=1e-4).attacks}
            for n in (1, 2)
        ]
        for name, once in counts[0].items():
            names[counts[1][name] > 1.5 * once].append(name)
        assert set(names[False]) <= {"square", "fab-t"}
        assert {"margin"} <= set(names[True])

    def test_a_surrogate_that_answers_at_random(self):
        asked = []

        class Counted(Noisy):
            def forward(self, x):
                asked.append(x.requires_grad)
                return super().forward(x)

        evaluated(network(), [transfer_attack(Counted(network()), steps=3)])
        assert sum(asked) >= 3 * SAMPLES


class TestElsewhere:
    def test_outcomes_have_all_rankings_by_loops(self):
        task = bench_of(Noisy(network()), images_of())
        task.embed.is_random = True
        batch = task.batch(torch.arange(24))
        torch.manual_seed(4)
        outcome = STILL.run(batch, 0.1, 0, 3)
        margins = [ranking.margin for ranking in outcome.rankings]
        assert len(margins) == ANSWERS
        torch.manual_seed(4)
        items, labels = batch.gallery.embeddings, batch.gallery.labels
        for margin in margins[:3]:
            with torch.no_grad():
                queries = task.embed(batch.images)
            expected = [by_loops.margin(queries[i], labels[i], i, items, labels) for i in range(24)]
            assert margin.tolist() == pytest.approx(expected, abs=3e-6)

    def test_a_target_counts_if_half_of_the_draws_find_it(self):
        gallery, embeddings = (None, torch.tensor([0, 1])), torch.tensor([[-1.0, 0.01], [1.0, 0.01]])
        for chance, expected in ((0.3, 0), (0.7, 1)):
            report = evaluate_targeted(
                Fickle(chance, chance),
                flagged_images(),
                gallery,
                target=0,
                eps=1e-3,
                k=1,
                steps=1,
                restarts=1,
                square=0,
                gallery_embeddings=embeddings,
            )
            assert report.success(0.0) == report.success(1e-3) == expected
            assert any("answers at random" in note for note in report.notes)

    def test_cost_is_a_bound(self):
        model, images, suite = Noisy(network()), images_of(36, classes=6), standard(2, 1, 5, 2)
        cost = estimate_cost(model, images, eps=0.01, attacks=suite, checks=False)
        report = evaluated(model, suite, images, eps=0.01)
        taken = sum(result.forward_passes + result.backward_passes for result in report.attacks)
        assert cost.passes / 3 < taken + 36 * ANSWERS <= cost.passes

    def test_it_is_flagged_all_the_same(self, monkeypatch):
        monkeypatch.setattr(checks, "STEPS", 4)
        report = evaluated(Noisy(network()), quick(2, 1), checks=True)
        assert "same answer twice" in [check.name for check in report.flagged]

    def test_what_does_not_move_embeddings_is_not_random(self):
        model = network().eval()
        report = evaluated(Made(lambda x: model(x) * (1 + 1e-7 * torch.randn(len(x), 1))), [STILL])
        assert report.notes == ()
        assert report.clean["recall_at_1"] == report.clean_flags.count("1") / 24
        assert embedded(model, images_of()[0]).shape == (24, 6)


def test_dropout_that_the_user_left_on_is_part_of_the_model():
    images = images_of()
    model = nn.Sequential(network(), nn.Dropout(0.5)).eval()
    model[1].train()
    report = evaluated(model, quick(steps=1, restarts=1))
    notes = " ".join(report.notes)
    assert "parts of the model are in train mode, and are evaluated so: 1 (Dropout)" in notes
    assert "the model answers at random" in notes
    assert model[1].training
    model.train()
    report = evaluated(model, quick(steps=1, restarts=1))
    assert not any("random" in note or "train mode" in note for note in report.notes)
    assert model.training
    assert report.clean["recall_at_1"] == evaluated(model[0], quick(steps=1, restarts=1), images).clean["recall_at_1"]
