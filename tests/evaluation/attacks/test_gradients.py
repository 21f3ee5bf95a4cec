"""Attacks that know retrieval: what they may change, what they raise, whom they aim at."""

import math
from dataclasses import replace

import by_loops
import pytest
import torch
from query_batches import RADIUS, all_norms, bench_of, both_norms, embedded, images_of, length, network

from pml_adversarial.attacks.objective import Objective
from pml_adversarial.attacks.pgd import MomentumPGD
from pml_adversarial.evaluation.attacks.gradients import (
    demotion,
    margin_score,
    nearest_right,
    nearest_wrong,
    promotion,
    shift_score,
    targeted_score,
)


@pytest.fixture
def batch():
    return bench_of(network(), images_of()).batch(torch.arange(24))


class TestMomentumPGD:
    STEPS = 7

    def objective(self, sign=1):
        """Away from targets or, with the other sign, toward targets that are near enough to be overshot."""
        model, (images, _) = network().eval(), images_of(12)
        embeddings = embedded(model, images)
        model.eval()
        noise = torch.randn(12, 6, generator=torch.Generator().manual_seed(5))
        targets = noise if sign > 0 else embeddings + 0.03 * noise
        score = lambda queries: sign * (queries - targets).square().sum(1)  # noqa: E731
        return Objective(model, score, embeddings, [model]), images, lambda x: score(model(x))

    @both_norms
    @pytest.mark.parametrize("sign", [1, -1])
    def test_equals_the_same_attack_by_hand(self, sign, norm):
        objective, images, score = self.objective(sign)
        eps, overshot = RADIUS[norm], []
        torch.manual_seed(2)
        found = MomentumPGD(objective, eps, self.STEPS, norm)(images, objective.labels)
        torch.manual_seed(2)
        if norm == "Linf":
            start = (images + eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
        else:
            noise = torch.randn_like(images)
            reach = torch.rand(12) ** (1 / 36) / noise.flatten(1).norm(dim=1)
            start = (images + eps * noise * reach.reshape(12, 1, 1, 1)).clamp(0, 1)

        def held(x):
            change = x - images
            if norm == "Linf":
                return (images + change.clamp(-eps, eps)).clamp(0, 1)
            lengths = change.flatten(1).norm(dim=1).clamp(min=eps).reshape(12, 1, 1, 1)
            return (images + change * eps / lengths).clamp(0, 1)

        def sized(gradient):
            flat = gradient.flatten(1)
            return (flat.abs().mean(1) if norm == "Linf" else flat.norm(dim=1)).reshape(12, 1, 1, 1)

        point, direction, path = start, 0, []
        for step in range(self.STEPS + 1):
            point = point.detach().requires_grad_()
            value = score(point)
            path.append((value.detach(), point.detach()))
            (gradient,) = torch.autograd.grad(value.sum(), point)
            direction = 0.75 * direction + gradient / sized(gradient)
            step_taken = direction.sign() if norm == "Linf" else direction / sized(direction)
            point = held(point + eps * (1 + math.cos(math.pi * step / self.STEPS)) / 2 * step_taken)
        for i in range(12):
            best = max(path, key=lambda seen: seen[0][i])
            torch.testing.assert_close(found[i], best[1][i], rtol=0, atol=1e-5)
            overshot.append((best[1][i] - path[-1][1][i]).abs().max() > 1e-3)
        assert any(overshot) == (sign < 0)

    @all_norms
    def test_stays_in_the_ball_and_raises_the_score(self, norm):
        objective, images, score = self.objective()
        found = MomentumPGD(objective, RADIUS[norm], self.STEPS, norm)(images, objective.labels)
        assert (length(found - images, norm) <= RADIUS[norm] + 1e-6).all()
        assert 0 <= found.min() <= found.max() <= 1
        assert (score(found) > score(images)).all()

    @pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
    def test_a_seed_fixes_it_and_another_start_is_another(self, norm):
        objective, images, _ = self.objective()
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(MomentumPGD(objective, RADIUS[norm], 2, norm)(images, objective.labels))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    @both_norms
    def test_starts_are_anywhere_in_the_ball(self, norm):
        images = torch.full((400, 1, 1, 3), 0.5)
        blind = Objective(lambda x: x.flatten(1) * 0, lambda queries: queries.sum(1), torch.zeros(400, 3))
        found = length(MomentumPGD(blind, 0.2, 1, norm).start(images) - images, norm)
        inner = (found <= 0.2 * 0.5 ** (1 / 3)).float().mean()  # half of the volume
        assert 0.4 < inner < 0.6
        assert found.max() <= 0.2 + 1e-6

    def test_without_random_start_begins_at_the_inputs(self):
        objective, images, _ = self.objective()
        assert torch.equal(MomentumPGD(objective, 0.1, 1, random_start=False).start(images), images)

    @all_norms
    def test_stays_put_where_there_is_no_gradient(self, norm):
        _, images, _ = self.objective()
        blind = Objective(lambda x: x.flatten(1) * 0, lambda queries: queries.sum(1), torch.zeros(12, 36))
        found = MomentumPGD(blind, RADIUS[norm], 3, norm)(images, blind.labels)
        assert found.isfinite().all()
        assert (length(found - images, norm) <= RADIUS[norm] + 1e-6).all()

    def test_survives_gradients_that_are_not_finite(self):
        images = torch.full((3, 1, 1, 2), 0.5)
        images[1] = 0.0
        root = Objective(lambda x: x.flatten(1).sqrt(), lambda queries: -queries.sum(1), torch.ones(3, 2))
        found = MomentumPGD(root, 0.1, 3, random_start=False)(images, root.labels)
        assert found.isfinite().all()
        assert (found[0] < images[0]).all()


class TestScores:
    @pytest.mark.parametrize("score", [margin_score, shift_score, promotion, demotion])
    def test_gradient_by_differences(self, batch, score):
        part = replace(batch, clean=batch.clean.double())[torch.arange(5)]
        batch.gallery.embeddings = batch.gallery.embeddings.double()
        found = score(part) if score in (promotion, demotion) else score(part, 0)
        assert torch.autograd.gradcheck(found, torch.randn(5, 6, dtype=torch.double, requires_grad=True))

    def test_by_loops(self, batch):
        moved = torch.randn(24, 6)
        embeddings, labels = batch.gallery.embeddings, batch.gallery.labels
        wanted = {
            margin_score: [by_loops.margin(moved[i], labels[i], i, embeddings, labels) for i in range(24)],
            shift_score: [2 - 2 * by_loops.cosine(moved[i], batch.clean[i]) for i in range(24)],
            promotion: [by_loops.cosine(moved[i], batch.clean[i]) for i in range(24)],
            demotion: [-by_loops.cosine(moved[i], batch.clean[i]) for i in range(24)],
        }
        for score, values in wanted.items():
            found = score(batch) if score in (promotion, demotion) else score(batch, 0)
            assert found(moved).tolist() == pytest.approx(values, abs=3e-6)

    @all_norms
    @pytest.mark.parametrize("restart", [0, 1, 2, 7])
    def test_one_wrong_class_after_the_other_by_loops(self, norm, restart):
        batch = bench_of(network(), images_of(), norm=norm).batch(torch.arange(24))
        moved, embeddings, labels = torch.randn(24, 6), batch.gallery.embeddings, batch.gallery.labels.tolist()
        found = targeted_score(batch, restart)(moved)
        for i in range(24):
            clean = by_loops.similarities(batch.clean[i], i, embeddings)
            nearest = {c: max(v for j, v in clean.items() if labels[j] == c) for c in range(4) if c != labels[i]}
            aim = sorted(nearest, key=lambda c: -nearest[c])[min(restart, 2)]
            now = by_loops.similarities(moved[i], i, embeddings)
            wrong, right = (max(v for j, v in now.items() if labels[j] == c) for c in (aim, labels[i]))
            assert found[i].item() == pytest.approx(wrong - right, abs=3e-6)


class TestChoice:
    @pytest.mark.parametrize("restart", [0, 1, 3, 99])
    @pytest.mark.parametrize(("choose", "right"), [(nearest_wrong, False), (nearest_right, True)])
    def test_one_item_after_the_other_by_loops(self, batch, choose, right, restart):
        found, labels = choose(batch, restart), batch.gallery.labels
        for i in range(24):
            near = by_loops.similarities(batch.clean[i], i, batch.gallery.embeddings)
            listed = sorted((j for j in near if (labels[j] == labels[i]) == right), key=lambda j: -near[j])
            assert int(found[i]) == listed[min(restart, len(listed) - 1)]
