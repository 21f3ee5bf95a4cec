"""Dodging and impersonation, against brute force and against an attack that is written by hand."""

import math
from functools import partial

import pytest
import torch
from pytorch_metric_learning import distances
from query_batches import RADIUS, Made, all_norms, images_of, length, network
from some_pairs import LISTED, SIMILARITIES, similarities_by_loops, task_of
from torch import nn

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.retrieval.distance import find_distance
from pml_adversarial.evaluation.verification.attacks import (
    REJECTED,
    PairAttack,
    from_enrolled,
    momentum,
    pair_attacks,
    plain,
    square,
)
from pml_adversarial.training.isolation import random_stream

by_name = pytest.mark.parametrize("distance", list(SIMILARITIES))


def batch_of(model=None, norm="Linf", distance="cosine", **options):
    task = task_of(model, norm=norm, distance=distance, **options)
    return task.batch(torch.arange(len(task.pairs)))


def worst_of(batch, eps, attacks):
    """The highest score of each pair, without attack and over all attacks and starts."""
    found = [batch.similarities(batch.images)]
    for attack in attacks:
        for restart in range(attack.restarts):
            with random_stream(0, restart):
                found.append(attack.run(batch, eps, restart)[1])
    return torch.stack([batch.toward_goal(similarities) for similarities in found]).amax(0)


class TestPairBatch:
    @by_name
    def test_similarities_and_scores_by_loops(self, distance):
        model = network()
        task = task_of(model, distance=distance)
        batch, images = task.batch(torch.arange(40)), images_of(40, seed=7)[0]
        with torch.no_grad():
            embeddings, enrolled = model(images).double(), model(images_of()[0][LISTED[:, 1]]).double()
        wanted = similarities_by_loops(embeddings, enrolled, distance)
        assert batch.similarities(images).tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        scores = [-s if genuine else s for s, genuine in zip(wanted, batch.same.tolist(), strict=True)]
        assert batch.score(embeddings.float()).tolist() == pytest.approx(scores, rel=1e-4, abs=1e-4)

    def test_a_distance_of_pml(self):
        batch = batch_of(distance=distances.LpDistance(normalize_embeddings=False, p=1))
        with torch.no_grad():
            apart = (batch.embed(batch.images) - batch.enrolled).abs().sum(1)
        assert batch.similarities(batch.images).tolist() == pytest.approx((-apart).tolist(), rel=1e-5)

    @by_name
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_an_embedding_that_is_not_finite_is_rejected(self, distance, value):
        """So a genuine pair is dodged, and an impostor pair is not impersonated."""
        model = Made(lambda x: torch.where(x[:, :1, 0, 0] > 0.999, value, x.flatten(1)))
        batch = batch_of(model, distance=distance)
        images = batch.images.clone()
        images[::2, :, 0, 0] = 1.0
        found = batch.similarities(images)
        assert (found[::2] == REJECTED).all()
        assert (found[1::2].abs() < 100).all()
        scores = batch.score(model(images))
        assert torch.equal(scores[::2], torch.where(batch.same, 1e30, -1e30)[::2])
        assert scores[1::2].isfinite().all()

    def test_some_of_the_pairs(self):
        batch, rows = batch_of(), torch.tensor([30, 2, 5])
        part = batch[rows]
        assert len(part) == 3
        assert torch.equal(part.similarities(part.images), batch.similarities(batch.images)[rows])
        assert torch.equal(part.enrolled_images, batch.enrolled_images[rows])

    def test_the_gradient_reaches_the_pixels(self):
        batch = batch_of()
        points = batch.images.clone().requires_grad_()
        batch.score(batch.embed(points)).sum().backward()
        assert points.grad.flatten(1).any(1).all()


class TestAttacks:
    @all_norms
    @pytest.mark.parametrize("attack", pair_attacks(20, 1, 40), ids=lambda attack: attack.name)
    def test_within_the_budget_and_on_the_way_to_the_goal(self, attack, norm):
        batch = batch_of(norm=norm)
        with random_stream(0, 0):
            images, found = attack.run(batch, RADIUS[norm], 0)
        assert length(images - batch.images, norm).max() <= RADIUS[norm] + 1e-5
        assert 0 <= images.min() <= images.max() <= 1
        assert torch.equal(found, batch.similarities(images))
        rise = batch.toward_goal(found) - batch.toward_goal(batch.similarities(batch.images))
        assert (rise > 0).float().mean() > 0.8
        for kind in (True, False):
            assert rise[batch.same == kind].mean() > 0.01

    def test_an_attack_of_ones_own_is_held_to_the_budget(self):
        batch = batch_of()
        images, _ = PairAttack("far", lambda batch, eps, restart: batch.images + 1).run(batch, 0.05, 0)
        assert torch.allclose(images, (batch.images + 0.05).clamp(max=1))

    def test_also_where_it_changes_the_images_in_place(self):
        batch = batch_of()
        clean = batch.images.clone()
        attack = PairAttack("far", lambda batch, eps, restart: batch.images.add_(1))
        for _ in range(2):
            images, _ = attack.run(batch, 0.05, 0)
            assert torch.equal(batch.images, clean)
            assert torch.allclose(images, (clean + 0.05).clamp(max=1))

    @pytest.mark.parametrize(
        ("made", "shown"),
        [
            (lambda x: x[:1], r"\(1, "),
            (lambda x: None, "NoneType"),
            (lambda x: x * torch.nan, "NaN or infinite pixels"),
        ],
    )
    def test_what_are_no_images_is_refused(self, made, shown):
        with pytest.raises(InputError, match=f"attack odd returned {shown}"):
            PairAttack("odd", lambda batch, eps, restart: made(batch.images)).run(batch_of(), 0.05, 0)

    def test_a_restart_starts_elsewhere(self):
        batch = batch_of()
        for attack in (momentum, plain):
            runs = [attack(batch, 0.05, restart, steps=1) for restart in range(2)]
            assert not torch.equal(*runs)
        fixed = [momentum(batch, 0.05, restart, steps=1, random_start=False) for restart in range(2)]
        assert torch.equal(*fixed)

    def test_square_asks_for_no_gradient(self):
        seen = []

        def embed(images):
            seen.append(images.requires_grad)
            return images.flatten(1) @ torch.linspace(-1, 1, 36 * 3).reshape(36, 3)

        batch = batch_of(Made(embed))
        seen.clear()
        square(batch, 0.05, 0, queries=5)
        assert seen == [False] * 5

    def test_names_and_what_is_left_out(self):
        assert [attack.name for attack in pair_attacks()] == ["momentum", "enrolled", "pgd", "square"]
        assert [attack.name for attack in pair_attacks(queries=0)] == ["momentum", "enrolled", "pgd"]
        assert [attack.black_box for attack in pair_attacks()] == [False, False, False, True]


class TestFromEnrolled:
    @all_norms
    def test_impersonation_succeeds_with_any_model_where_the_enrolled_image_is_in_reach(self, norm):
        """Without gradient too: the first image becomes the enrolled one."""
        model = Made(
            lambda x: torch.stack([(37 * x).round().flatten(1).sin().sum(1), x.flatten(1).amax(1)], 1).detach()
        )
        batch = batch_of(model, norm)
        eps = {"Linf": 1, "L2": 6, "L1": 36, "L0": 36, "patch": 6}[norm]
        with random_stream(0, 0):
            _, found = PairAttack("enrolled", partial(from_enrolled, steps=1)).run(batch, eps, 0)
        assert found[~batch.same].tolist() == pytest.approx([1.0] * 20, abs=1e-6)

    def test_starts_at_the_point_in_reach_that_is_nearest(self):
        """Where there is no gradient, this is the point that is returned."""
        batch = batch_of(Made(lambda x: torch.ones(len(x), 2)))
        found = from_enrolled(batch, 0.05, 0, steps=2)
        wanted = batch.images + (batch.enrolled_images - batch.images).clamp(-0.05, 0.05)
        assert torch.allclose(found[~batch.same], wanted[~batch.same], atol=1e-6)

    def test_images_of_two_sizes_start_at_random(self):
        model = Made(lambda x: x.flatten(2).mean(2) + x.amax((1, 2, 3)).unsqueeze(1) * torch.tensor([1.0, 2.0]))
        pairs = images_of(6)[0], images_of(6, size=4)[0], torch.arange(6) % 2 == 0
        batch = batch_of(model, pairs=pairs, indices=None)
        assert from_enrolled(batch, 0.05, 0, steps=2).shape == batch.images.shape


# Against brute force.


def of_two_pixels(seed):
    """24 images of two pixels, and a network that is far from linear on them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, (torch.rand(24, 1, 1, 2), torch.arange(24) % 4)


def best_on_a_grid(batch, eps):
    """The highest score of each pair over 61 x 61 perturbations."""
    steps = torch.linspace(-eps, eps, 61)
    grid = torch.cartesian_prod(steps, steps)
    grid = grid if batch.norm == "Linf" else grid[grid.norm(dim=1) <= eps]
    best = []
    for row in range(len(batch)):
        copies = batch[torch.full((len(grid),), row)]
        images = (copies.images + grid.reshape(-1, 1, 1, 2)).clamp(0, 1)
        best.append(copies.toward_goal(copies.similarities(images)).amax())
    return torch.stack(best)


NEIGHBOURS = [(i, (i + 4) % 24) for i in range(24)] + [(i, (i + 5) % 24) for i in range(24)]


@pytest.mark.parametrize(
    ("distance", "norm", "eps"),
    [
        ("cosine", "Linf", 0.1),
        ("inner_product", "L2", 0.12),
        pytest.param("cosine", "L2", 0.12, marks=pytest.mark.slow),
        pytest.param("inner_product", "Linf", 0.1, marks=pytest.mark.slow),
        *(
            pytest.param(distance, norm, eps, marks=pytest.mark.slow)
            for distance in ("euclidean", "normalized_euclidean")
            for norm, eps in (("Linf", 0.1), ("L2", 0.12))
        ),
    ],
)
def test_nothing_is_missed_that_a_grid_finds(distance, norm, eps):
    """Up to a hundredth of the spread of the similarities, since steps end at a thousandth of eps. Ten starts are made.

    Of three starts, about one in a hundred pairs with two pixels keeps a better point.
    """
    model, images = of_two_pixels(0)
    task = task_of(model, images, norm, distance, NEIGHBOURS)
    batch, allowance = task.batch(torch.arange(48)), 0.01 * float(task.scores.similarities.std())
    grid, found = best_on_a_grid(batch, eps), worst_of(batch, eps, pair_attacks(50, 10, 0))
    assert (found >= grid - allowance).all()
    for kind in (True, False):  # the grid finds something, in both directions
        assert (grid - batch.toward_goal(batch.similarities(batch.images)))[batch.same == kind].mean() > 10 * allowance
    threshold = task.scores.roc().equal_error_rate.threshold
    goal = torch.where(batch.same, -threshold, threshold)
    assert (grid > goal).sum() > (batch.toward_goal(task.scores.similarities) > goal).sum()
    assert (found >= goal - allowance)[grid >= goal].all()


# Against an attack that knows nothing of ours.


def by_hand(model, image, enrolled, genuine, eps, similarity, start, steps=40):
    """Steps along the sign of the gradient, for one pair; the best similarity on the way."""
    point, best = (image + start).clamp(0, 1), None
    for _ in range(steps + 1):
        point = point.detach().requires_grad_()
        found = similarity(model(point.unsqueeze(0))[0], enrolled)
        value = found.item()
        best = value if best is None else (min if genuine else max)(best, value)
        (gradient,) = torch.autograd.grad(found, point)
        step = eps / 10 * gradient.sign() * (-1 if genuine else 1)
        point = torch.minimum(torch.maximum(point + step, image - eps), image + eps).clamp(0, 1)
    return best


ONE_PAIR = {
    "cosine": lambda a, b: torch.dot(a, b) / (a.norm() * b.norm()),
    "euclidean": lambda a, b: -((a - b) ** 2).sum().sqrt(),
    "normalized_euclidean": lambda a, b: -((a / a.norm() - b / b.norm()) ** 2).sum().sqrt(),
    "inner_product": torch.dot,
}


@pytest.mark.parametrize(
    "distance",
    ["euclidean", *(pytest.param(name, marks=pytest.mark.slow) for name in SIMILARITIES if name != "euclidean")],
)
def test_an_attack_by_hand_is_never_stronger(distance):
    model, (images, _) = network(), images_of()
    task = task_of(model, distance=distance)
    batch, allowance = task.batch(torch.arange(40)), 0.001 * float(task.scores.similarities.std())
    found = worst_of(batch, 0.05, pair_attacks(40, 3, 0))
    starts = torch.empty(40, 1, 6, 6).uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(0))
    stronger = 0
    for row in range(0, 40, 3):
        first, second = LISTED[row].tolist()
        genuine = bool(batch.same[row])
        with torch.no_grad():
            enrolled = model(images[[second]])[0]
        for start in (torch.zeros(1, 6, 6), starts[row]):
            value = by_hand(model, images[first], enrolled, genuine, 0.05, ONE_PAIR[distance], start)
            stronger += (-value if genuine else value) > found[row] + allowance
    assert stronger == 0


def test_distances_are_those_of_the_reference():
    assert {find_distance(name).name for name in SIMILARITIES} == set(ONE_PAIR)
