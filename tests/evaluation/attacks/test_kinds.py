"""Attacks on queries and on the gallery: what they may change, and what they report."""

import math

import by_loops
import pytest
import torch
from query_batches import RADIUS, bench_of, both_norms, embedded, images_of, length, network
from torch import nn

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.attacks.gradients import (
    demotion,
    gradient_attack,
    margin_score,
    nearest_right,
    nearest_wrong,
    promotion,
    shift_score,
)
from pml_adversarial.evaluation.attacks.kinds import GalleryAttack, QueryAttack
from pml_adversarial.evaluation.retrieval.gallery import unit_or_zero


@pytest.fixture
def batch():
    return bench_of(network(), images_of()).batch(torch.arange(24))


class TestQueryAttack:
    def test_its_function_is_given_the_batch_eps_and_restart(self, batch):
        given = []

        def perturb(*parts):
            given.append(parts)
            return batch.images

        outcome = QueryAttack("x", perturb).run(batch, 0.07, 3, 6)
        assert given == [(batch, 0.07, 3)]
        assert torch.equal(outcome.images, batch.images)
        assert outcome.shift.max() < 1e-5

    @both_norms
    @pytest.mark.parametrize("score", [margin_score, shift_score])
    def test_outcome_is_what_its_images_do(self, score, norm):
        batch = bench_of(network(), images_of(), norm=norm).batch(torch.arange(24))
        outcome = QueryAttack("x", gradient_attack(score, 10)).run(batch, RADIUS[norm], 0, 6)
        again = embedded(batch.embed.modules[0], outcome.images)
        embeddings, labels = batch.gallery.embeddings, batch.gallery.labels
        margins = [by_loops.margin(again[i], labels[i], i, embeddings, labels) for i in range(24)]
        assert outcome.ranking.margin.tolist() == pytest.approx(margins, abs=3e-6)
        shifts = (unit_or_zero(again) - unit_or_zero(batch.clean)).norm(dim=1)
        torch.testing.assert_close(outcome.shift, shifts, rtol=0, atol=1e-5)

    def test_what_an_attack_hands_back_is_held_to_the_budget(self, batch):
        outcome = QueryAttack("cheat", lambda batch, eps, restart: batch.images + 9).run(batch, 0.05, 0, 6)
        assert (outcome.images - batch.images).abs().max() <= 0.05 + 1e-6

    def test_also_where_it_changes_the_images_in_place(self, batch):
        clean = batch.images.clone()

        attack = QueryAttack("cheat", lambda batch, eps, restart: batch.images.add_(9))
        outcome = attack.run(batch, 0.05, 0, 6)
        assert torch.equal(batch.images, clean)
        assert (outcome.images - clean).abs().max() <= 0.05 + 1e-6

    @pytest.mark.parametrize(
        ("made", "shown"), [(lambda images: images[:3], r"\(3, 1, 6, 6\)"), (lambda images: None, "NoneType")]
    )
    def test_what_are_no_queries_is_refused(self, batch, made, shown):
        attack = QueryAttack("odd", lambda batch, eps, restart: made(batch.images))
        with pytest.raises(
            InputError, match=rf"attack odd returned {shown}; expected perturbed images \(24, 1, 6, 6\)"
        ):
            attack.run(batch, 0.05, 0, 6)

    def test_nan_embeddings_under_attack_are_broken(self):
        class Trapdoor(nn.Module):
            """NaN for images whose first pixel has moved, as a model may do to stop gradients."""

            def __init__(self, images):
                super().__init__()
                self.known = images[:, 0, 0, 0]

            def forward(self, x):
                moved = (x[:, 0, 0, 0].unsqueeze(1) != self.known).all(1, keepdim=True)
                return torch.where(moved, math.nan, x.flatten(1))

        images, labels = images_of(spread=0.05)
        batch = bench_of(Trapdoor(images), (images, labels)).batch(torch.arange(24))
        clean = batch.gallery.ranking(batch.clean, batch.targets, 6)
        assert (clean.margin < 0).all()
        for score in (margin_score, shift_score):
            outcome = QueryAttack("x", gradient_attack(score, 3)).run(batch, 0.01, 0, 6)
            assert (outcome.ranking.margin >= 0).all()


class TestGalleryAttacks:
    @both_norms
    @pytest.mark.parametrize("restart", [0, 1])
    def test_promote_by_loops(self, norm, restart):
        batch = bench_of(network(), images_of(), norm=norm).batch(torch.arange(24))
        self.check(GalleryAttack("promote", nearest_wrong, promotion, 10), batch, norm, restart, right=False)

    @both_norms
    @pytest.mark.parametrize("restart", [0, 1])
    def test_demote_by_loops(self, norm, restart):
        batch = bench_of(network(), images_of(), norm=norm).batch(torch.arange(24))
        self.check(GalleryAttack("demote", nearest_right, demotion, 10), batch, norm, restart, right=True)

    def check(self, attack, batch, norm, restart, right):
        """The item is the right one to choose, within eps of its clean pixels, and the outcome what it does."""
        outcome = attack.run(batch, RADIUS[norm], restart, 6)
        items = attack.choose(batch, restart)
        embeddings, labels = batch.gallery.embeddings, batch.gallery.labels
        pixels = batch.pixels_of(torch.arange(24))
        moved = embedded(batch.embed.modules[0], outcome.images)
        broken = 0
        for i in range(24):
            near = by_loops.similarities(batch.clean[i], i, embeddings)
            listed = sorted((j for j in near if (labels[j] == labels[i]) == right), key=lambda j: -near[j])
            assert int(items[i]) == listed[restart]
            change = (outcome.images[i] - pixels[items[i]]).unsqueeze(0)
            assert length(change, norm) <= RADIUS[norm] + 1e-6
            shift = math.sqrt(2 - 2 * by_loops.cosine(moved[i], embeddings[items[i]]))
            assert outcome.shift[i].item() == pytest.approx(shift, abs=1e-4)
            changed = embeddings.clone()
            changed[items[i]] = moved[i]
            margin = by_loops.margin(batch.clean[i], labels[i], i, changed, labels)
            assert outcome.ranking.margin[i].item() == pytest.approx(margin, abs=3e-6)
            broken += margin >= 0 > by_loops.margin(batch.clean[i], labels[i], i, embeddings, labels)
            if restart == 0:
                assert (by_loops.cosine(moved[i], batch.clean[i]) < near[int(items[i])]) == right
        assert broken > 0 or restart == 1
        assert outcome.images.min() >= 0
        assert outcome.images.max() <= 1
