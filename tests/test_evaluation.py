import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from pml_adversarial.evaluation import Gallery, robust_recall
from pml_adversarial.evaluation.suites import QUERY_ATTACKS, momentum_pgd, num_runs
from pml_adversarial.objective import Objective


@pytest.fixture
def scene():
    """Twelve images of three classes, drawn around three patterns, and a random linear embedding."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(12) % 3
    patterns = torch.rand(3, 1, 4, 4, generator=generator) * 0.6 + 0.2
    images = (patterns[labels] + 0.1 * torch.randn(12, 1, 4, 4, generator=generator)).clamp(0, 1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Dropout(0.3)), images, labels


def clean(model, images):
    model.eval()
    with torch.no_grad():
        embeddings = model(images)
    model.train()
    return embeddings


def margin_by_loop(query, own, embeddings, labels):
    similarity = {
        j: float(normalize(query, dim=0) @ normalize(embeddings[j], dim=0)) for j in range(len(labels)) if j != own
    }
    wrong = max(value for j, value in similarity.items() if labels[j] != labels[own])
    right = max(value for j, value in similarity.items() if labels[j] == labels[own])
    return wrong - right


class TestGallery:
    def test_margin(self, scene):
        model, images, labels = scene
        embeddings = clean(model, images)
        queries, own = torch.randn(5, 6), torch.tensor([3, 0, 11, 7, 7])
        found = Gallery(embeddings, labels).margin(queries, own)
        expected = [margin_by_loop(q, o, embeddings, labels) for q, o in zip(queries, own.tolist(), strict=True)]
        torch.testing.assert_close(found, torch.tensor(expected))

    def test_never_finds_the_query_itself(self, scene):
        model, images, labels = scene
        embeddings = clean(model, images)
        own = torch.arange(12)
        nearest = Gallery(embeddings, labels).nearest(embeddings, own, 11)
        assert [sorted(row) for row in nearest.tolist()] == [[j for j in range(12) if j != i] for i in range(12)]

    def test_recall_is_the_share_of_negative_margins(self, scene):
        model, images, labels = scene
        gallery = Gallery(embeddings := clean(model, images), labels)
        share = (gallery.margin(embeddings, torch.arange(12)) < 0).float().mean().item()
        assert gallery.accuracy()["recall_at_1"] == pytest.approx(share)
        assert 0 < gallery.accuracy()["map_at_r"] <= 1

    def test_a_tie_is_a_failure(self):
        gallery = Gallery(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 1, 1]))
        assert (gallery.margin(gallery.embeddings, torch.arange(4)) >= 0).all()


class TestMomentumPGD:
    EPS, STEPS = 0.1, 7

    def objective(self, scene, sign=1):
        """Away from targets or, with the other sign, toward targets that are near enough to be overshot."""
        model, images, _ = scene
        embeddings = clean(model, images)
        noise = torch.randn(12, 6, generator=torch.Generator().manual_seed(5))
        targets = noise if sign > 0 else embeddings + 0.03 * noise
        model.eval()
        return Objective(
            model, lambda queries: sign * (queries - targets).square().sum(1), embeddings, [model]
        ), targets

    @pytest.mark.parametrize("sign", [1, -1])
    def test_equals_the_same_attack_by_hand(self, scene, sign):
        model, images, _ = scene
        objective, targets = self.objective(scene, sign)
        overshot = []
        torch.manual_seed(2)
        found = momentum_pgd(objective, self.EPS, self.STEPS)(images, objective.labels)
        torch.manual_seed(2)
        noise = torch.rand_like(images)
        for i in range(12):
            low, high = (images[i] - self.EPS).clamp(min=0), (images[i] + self.EPS).clamp(max=1)
            point, direction, path = low + (high - low) * noise[i], 0, []
            for step in range(self.STEPS + 1):
                point = point.detach().requires_grad_()
                score = sign * (model(point[None])[0] - targets[i]).square().sum()
                path.append((score.item(), point.detach()))
                (gradient,) = torch.autograd.grad(score, point)
                direction = 0.75 * direction + gradient / gradient.abs().mean()
                size = self.EPS * (1 + math.cos(math.pi * step / self.STEPS)) / 2
                point = (point + size * direction.sign()).clamp(low, high)
            best = max(path, key=lambda seen: seen[0])
            torch.testing.assert_close(found[i], best[1], rtol=0, atol=1e-6)
            overshot.append((best[1] - path[-1][1]).abs().max() > 1e-3)
        assert any(overshot) == (sign < 0)

    def test_stays_put_where_there_is_no_gradient(self, scene):
        _, images, _ = scene
        objective = Objective(lambda x: x.flatten(1) * 0, lambda queries: queries.sum(1), torch.zeros(12, 16))
        found = momentum_pgd(objective, self.EPS, 3)(images, objective.labels)
        assert found.isfinite().all()
        assert (found - images).abs().max() <= self.EPS + 1e-6


class TestRobustRecall:
    EPS = (0.02, 0.06, 0.3)

    def measured(self, scene, **changed):
        options = {"eps": self.EPS, "steps": 15, "restarts": 2, "chunk": 5, **changed}
        return robust_recall(*scene, **options)

    def test_worst_case_is_over_every_attack_of_every_query(self, scene):
        model, images, labels = scene
        embeddings = clean(model, images)
        results = self.measured(scene)
        recalls = [Gallery(embeddings, labels).accuracy()["recall_at_1"]]
        for eps, result in zip(self.EPS, results, strict=True):
            assert result.eps == eps
            assert set(result.by_attack) == set(QUERY_ATTACKS)
            assert result.worst_case <= min(result.by_attack.values())
            assert result.worst_case == pytest.approx((~result.broken).float().mean().item())
            wrong = [margin_by_loop(embeddings[i], i, embeddings, labels) >= 0 for i in range(12)]
            assert result.wrong.tolist() == wrong
            assert result.worst_case <= recalls[-1]
            recalls.append(result.worst_case)
        assert recalls[0] > recalls[-1]
        assert recalls[-1] == 0

    def test_what_broke_a_query_is_within_eps_and_breaks_it(self, scene):
        model, images, labels = scene
        embeddings = clean(model, images)
        for result in self.measured(scene):
            change = result.attacked - images
            assert change.abs().max() <= result.eps + 1e-6
            assert result.attacked.min() >= 0
            assert result.attacked.max() <= 1
            again = clean(model, result.attacked)
            margins = [margin_by_loop(again[i], i, embeddings, labels) for i in range(12)]
            assert [margin >= 0 for margin in margins] == result.broken.tolist()

    def test_is_as_strong_as_an_attack_by_hand(self, scene):
        model, images, labels = scene
        embeddings, eps = clean(model, images), 0.06
        (result,) = self.measured(scene, eps=(eps,), steps=40)
        model.eval()
        for i in range(12):
            moved = images[i : i + 1].clone()
            for _ in range(40):
                moved.requires_grad_()
                unit, gallery = normalize(model(moved)), normalize(embeddings)
                similarity = (unit @ gallery.T)[0]
                wrong = max(similarity[j] for j in range(12) if labels[j] != labels[i])
                right = max(similarity[j] for j in range(12) if labels[j] == labels[i] and j != i)
                (gradient,) = torch.autograd.grad(wrong - right, moved)
                moved = moved.detach() + 0.1 * eps * gradient.sign()
                moved = (images[i : i + 1] + (moved - images[i : i + 1]).clamp(-eps, eps)).clamp(0, 1)
            if margin_by_loop(model(moved)[0].detach(), i, embeddings, labels) >= 0:
                assert result.broken[i]

    def test_same_seed_same_answer_and_no_trace(self, scene):
        model, _, _ = scene
        state = torch.get_rng_state()
        first, again, other = self.measured(scene), self.measured(scene), self.measured(scene, seed=1)
        assert all(torch.equal(a.attacked, b.attacked) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0].attacked, other[0].attacked)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

    def test_reports_progress(self, scene):
        calls = []
        self.measured(scene, progress=lambda: calls.append(1))
        assert len(calls) == num_runs(12, len(self.EPS), restarts=2, chunk=5) == 3 * 2 * 2 * 3
