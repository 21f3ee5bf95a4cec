"""Signs of masked gradients: models that hide something are flagged, others are not."""

import pytest
import torch
from query_batches import all_norms
from some_pairs import task_of
from torch import nn
from torch.nn.functional import hardsigmoid

from pml_adversarial.evaluation import draw_pairs, evaluate_verification
from pml_adversarial.evaluation.verification.checks import PAIR_CHECKS, PairSample, run_pair_checks

EPS = {"Linf": (0.03, 0.08), "L2": (0.1, 0.3), "L1": (0.3, 1), "L0": (1, 2), "patch": (1, 2)}


class Front(nn.Module):
    """Something done to the pixels before an honest embedding, or to the embedding after it."""

    def __init__(self, change=lambda x: x, after=lambda e: e):
        super().__init__()
        torch.manual_seed(7)
        self.change, self.after, self.linear = change, after, nn.Linear(16, 6)

    def forward(self, images):
        return self.after(self.linear(self.change(images).flatten(1)))


def pictures():
    """80 images of four classes, drawn around four patterns, of 16 grey levels."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(80) % 4
    patterns = torch.rand(4, 1, 4, 4, generator=generator) * 0.6 + 0.2
    images = patterns[labels] + 0.07 * torch.randn(80, 1, 4, 4, generator=generator)
    return (images.clamp(0, 1) * 16).round() / 16, labels


def flags(model, norm="Linf", **options):
    options = {"eps": EPS[norm], "genuine": 60, "impostors": 60, "steps": 15, "restarts": 1, "square": 40, **options}
    return {check.name for check in evaluate_verification(model, pictures(), norm=norm, **options).flagged}


def network(kind, seed):
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
    if kind == "tanh":
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    convolution = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(128, 8))


class TestHonestModels:
    @pytest.mark.parametrize(("kind", "norm"), [("linear", "Linf"), ("tanh", "L2"), ("convolution", "Linf")])
    def test_none_is_flagged(self, kind, norm):
        assert flags(network(kind, 0), norm) == set()

    @pytest.mark.slow
    @all_norms
    @pytest.mark.parametrize("kind", ["linear", "tanh", "convolution"])
    @pytest.mark.parametrize("seed", range(2))
    def test_none_is_flagged_in_any_norm(self, kind, norm, seed):
        """Where few pixels change, random search finds some places that gradients do not show; that is said."""
        known = {"black box adds nothing"} if norm in ("L0", "patch") else set()
        assert flags(network(kind, seed), norm) <= known

    @pytest.mark.slow
    @pytest.mark.parametrize("distance", ["euclidean", "normalized_euclidean", "inner_product"])
    @pytest.mark.parametrize("kind", ["linear", "tanh", "convolution"])
    @pytest.mark.parametrize("seed", range(1, 4))
    def test_none_is_flagged_by_any_distance(self, kind, distance, seed):
        assert flags(network(kind, seed), distance=distance) == set()


def cut_off_the_grid(x):
    """No gradient reaches pixels that are not near one of 16 grey levels, as clean pixels are."""
    return torch.where((16 * x - (16 * x).round()).abs() > 0.2, x.detach(), x)


HIDING = {
    "steep": (Front(lambda x: hardsigmoid(3000 * (x - 0.5))), {"falls at a large eps", "gradients are there"}),
    "quantised": (Front(lambda x: (x * 8).round() / 8), {"attack beats noise", "gradients are there"}),
    "noisy": (Front(lambda x: x + 0.2 * torch.randn_like(x)), {"same answer twice"}),
    "saturated": (Front(after=lambda e: torch.tanh(200 * e)), {"falls at a large eps", "gradients are there"}),
    "reversed": (Front(lambda x: 2 * x.detach() - x), {"attack beats noise", "falls at a large eps"}),
    "detached": (Front(lambda x: x.detach()), {"gradients are there", "black box adds nothing"}),
    "batch": (Front(after=lambda e: e - e.mean(0)), {"same answer twice"}),
    "cut": (Front(cut_off_the_grid), {"iterating beats a single step"}),
    "rarely": (Front(lambda x: torch.where(torch.rand_like(x) < 0.97, x.detach(), x)), {"a longer run adds nothing"}),
}


@pytest.mark.parametrize("name", HIDING)
def test_models_that_hide_something_are_flagged(name):
    model, expected = HIDING[name]
    assert flags(model, **({"square": 0} if name == "rarely" else {})) >= expected


def test_each_check_flags_something():
    assert set().union(*(expected for _, expected in HIDING.values())) == set(PAIR_CHECKS)


def sample_of(reached, count=40):
    images, labels = pictures()
    indices = draw_pairs(labels, count // 2, count // 2)
    task = task_of(Front(), (images, labels), indices=indices)
    threshold = task.scores.roc().equal_error_rate.threshold
    return PairSample(task, torch.arange(count), threshold, reached(task), 0, 16), task, threshold


class TestSample:
    def test_pairs_that_are_right_without_attack(self):
        sample, task, threshold = sample_of(lambda task: {("a", False, 0.1): task.scores.similarities})
        wrong = (task.scores.similarities >= threshold) != task.same
        assert torch.equal(sample.right, ~wrong)
        assert sample.right[sample.chosen].all()
        assert len(sample) == int((~wrong).sum())

    def test_eps_at_which_half_of_them_are_broken(self):
        def reached(task):
            found = {eps: task.scores.similarities.clone() for eps in (0.1, 0.2, 0.3)}
            for eps, count in ((0.1, 2), (0.2, 16), (0.3, 40)):
                found[eps][:count] = torch.where(task.same, -2.0, 2.0)[:count].double()
            return {("a", False, eps): similarities for eps, similarities in found.items()}

        assert sample_of(reached)[0].eps == 0.2

    def test_attacks_of_one_kind(self):
        def reached(task):
            far = torch.where(task.same, -2.0, 2.0).double()
            return {("a", False, 0.1): task.scores.similarities, ("b", True, 0.1): far}

        sample = sample_of(reached)[0]
        assert sample.broken_by(0.1).all()
        assert sample.broken_by(0.1, True).all()
        assert torch.equal(sample.broken_by(0.1, False), ~sample.right)

    def test_too_few_pairs(self):
        sample, task, threshold = sample_of(lambda task: {("a", False, 0.1): task.scores.similarities}, 8)
        found = run_pair_checks(task, torch.arange(8), threshold, sample.reached, 0, 16)
        assert [check.name for check in found] == list(PAIR_CHECKS)
        assert {check.passed for check in found} == {None}
        assert "are right without attack; 10 are needed" in found[0].message

    def test_without_a_black_box(self):
        report = evaluate_verification(
            Front(), pictures(), eps=0.08, genuine=30, impostors=30, steps=5, restarts=1, square=0
        )
        (check,) = (check for check in report.checks if check.name == "black box adds nothing")
        assert (check.passed, check.message) == (None, "there is no black-box attack")
