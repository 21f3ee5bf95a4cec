"""Projected gradient ascent, against plain loops and against torchattacks."""

import math

import pytest
import torch
import torchattacks
from query_batches import RADIUS, all_norms, both_norms, length
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pml_adversarial import AttackError
from pml_adversarial.attacks import NFGSM, PGD, FriendlyPGD, MomentumPGD, Objective
from pml_adversarial.attacks.adapter import build, run, unchanged
from pml_adversarial.attacks.pgd import ascent, uniform_noise

ROWS = 8


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 16), nn.Tanh(), nn.Linear(16, 4)).double()


@pytest.fixture
def images():
    return torch.rand(ROWS, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def distance_score(embeddings):
    """Squared distance from a corner, one per row."""
    return (embeddings - 1).square().sum(1)


def objective_of(model, images, score=distance_score):
    with torch.no_grad():
        return Objective(lambda inputs, rows=None: model(inputs), score, model(images), [model])


def one_gradient(model, image, score=distance_score):
    image = image.clone()[None].requires_grad_()
    score(model(image)).sum().backward()
    return image.grad[0]


def by_loops(model, images, starts, eps, alpha, steps, norm="Linf", score=distance_score):
    """Image by image, and for l-inf pixel by pixel."""
    found = []
    for image, start in zip(images, starts, strict=True):
        point = start.clone()
        for _ in range(steps):
            gradient = one_gradient(model, point, score)
            if norm == "L2":
                change = point + alpha * gradient / gradient.norm() - image
                change = change * min(1, eps / change.norm().item())
                point = (image + change).clamp(0, 1)
                continue
            for at in torch.cartesian_prod(*map(torch.arange, image.shape)):
                pixel, clean = tuple(at.tolist()), image[tuple(at.tolist())].item()
                sign = math.copysign(1, gradient[pixel].item()) if gradient[pixel] else 0
                value = point[pixel].item() + alpha * sign
                point[pixel] = min(max(value, clean - eps, 0), clean + eps, 1)
        found.append(point)
    return torch.stack(found)


class TestPGD:
    @both_norms
    @pytest.mark.parametrize(("alpha", "steps"), [(0.02, 1), (0.02, 5), (None, 4)])
    def test_is_the_plain_loop_from_the_clean_images(self, norm, alpha, steps, model, images):
        eps = RADIUS[norm]
        attack = PGD(objective_of(model, images), eps, alpha, steps, random_start=False, norm=norm)
        length_of_step = 2.5 * eps / steps if alpha is None else alpha
        expected = by_loops(model, images, images, eps, length_of_step, steps, norm)
        torch.testing.assert_close(attack(images), expected, rtol=0, atol=1e-9)

    @both_norms
    def test_starts_in_the_ball_and_goes_on_from_there(self, norm, model, images):
        attack = PGD(objective_of(model, images), RADIUS[norm], 0.01, 3, norm=norm)
        torch.manual_seed(3)
        start = attack.start(images)
        torch.manual_seed(3)
        found = attack(images)
        assert 0.5 * RADIUS[norm] < length(start - images, norm).max() <= RADIUS[norm] + 1e-9
        assert 0 <= start.min() <= start.max() <= 1
        expected = by_loops(model, images, start, RADIUS[norm], 0.01, 3, norm)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("random_start", [True, False])
    def test_finds_the_points_of_torchattacks(self, random_start, model, images):
        """From the same random numbers, though that one sees two logits, and this one the score."""
        options = {"eps": 0.1, "alpha": 0.03, "steps": 6, "random_start": random_start}
        found = []
        for kind in (PGD, torchattacks.PGD):
            objective = objective_of(model, images)
            torch.manual_seed(5)
            found.append(kind(objective, **options)(images, objective.labels))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
        assert (found[0] != images).flatten(1).any(1).all()

    @pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 3), (ROWS, 1, 2, 2), (ROWS, 2, 2, 2, 2)])
    def test_inputs_of_any_shape(self, shape):
        inputs = torch.full(shape, 0.5)
        objective = Objective(lambda x: x.reshape(ROWS, -1), lambda e: e.sum(1), inputs.reshape(ROWS, -1))
        found = PGD(objective, 0.1, 0.2, 2, random_start=False)(inputs)
        torch.testing.assert_close(found, inputs + 0.1)
        assert not objective.zero_gradient.any()

    @all_norms
    @pytest.mark.parametrize("kind", [PGD, MomentumPGD])
    @pytest.mark.parametrize("random_start", [True, False])
    def test_raises_the_score_within_the_ball(self, norm, kind, random_start, model, images):
        before, seen = distance_score(model(images)), []

        class Watched(kind):
            def gradient(self, points):
                seen.append(points)
                return super().gradient(points)

        attack = Watched(objective_of(model, images), RADIUS[norm], steps=12, norm=norm, random_start=random_start)
        found = attack(images)
        assert (distance_score(model(found)) > before).all()
        assert len(seen) == 12
        for points in (*seen, found):
            assert (length(points - images, norm) <= RADIUS[norm] + 1e-9).all()
            assert 0 <= points.min() <= points.max() <= 1

    @pytest.mark.parametrize(("norm", "eps"), [("L1", 2.0), ("L0", 3), ("patch", 2)])
    def test_momentum_finds_the_best_point_of_a_sum(self, norm, eps):
        """The score is a weighted sum of pixels: by loops, the changes that weigh most are the best."""
        weights = torch.randn(1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        images = torch.rand(8, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        objective = Objective(lambda x: x.flatten(1), lambda e: e @ weights.flatten(), images.flatten(1))
        found = MomentumPGD(objective, eps, 50, norm)(images)
        for image, end in zip(images, found, strict=True):
            gains = {
                (y, x): (abs(w := weights[0, y, x].item()), w * ((w > 0) - image[0, y, x].item()))
                for y in range(5)
                for x in range(5)
            }
            if norm == "L1":
                left, best = eps, 0.0
                for weight, gain in sorted(gains.values(), reverse=True):
                    best += weight * min(left, gain / weight)
                    left -= min(left, gain / weight)
            elif norm == "L0":
                best = sum(sorted((gain for _, gain in gains.values()), reverse=True)[:eps])
            else:
                corners = [(y, x) for y in range(4) for x in range(4)]
                best = max(sum(gains[y + i, x + j][1] for i in (0, 1) for j in (0, 1)) for y, x in corners)
            risen = (weights * (end - image)).sum().item()
            assert 0.97 * best < risen <= best + 1e-9

    def test_leaves_its_inputs_alone(self, model, images):
        before = images.clone()
        for attack in (PGD, FriendlyPGD, NFGSM):
            attack(objective_of(model, images), 0.1)(images)
        MomentumPGD(objective_of(model, images), 0.1, 3)(images)
        assert torch.equal(images, before)
        assert not images.requires_grad

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eps": 0}, "eps=0; expected a number above 0 and up to 1"),
            ({"eps": 8}, r"eps=8; .*eps=8/255"),
            ({"steps": 0}, "steps=0; expected a whole number from 1 on"),
            ({"alpha": -0.1}, "alpha=-0.1; expected a number from 0 on"),
            ({"norm": "l2"}, "norm='l2'; expected 'Linf', 'L2', 'L1', 'L0' or 'patch'"),
            ({"eps": 0.5, "norm": "L0"}, "eps=0.5; expected a whole number from 1 on, of pixels, in norm='L0'"),
            ({"eps": 0, "norm": "patch"}, "eps=0; expected a whole number from 1 on, of pixels, in norm='patch'"),
        ],
    )
    def test_options(self, options, message, model, images):
        with pytest.raises(AttackError, match=message):
            PGD(objective_of(model, images), **options)


class TestSamples:
    """A model that answers at random: scores and gradients are means over several draws."""

    def noisy(self, model, noise=0.3):
        return lambda x: model(x + noise * torch.randn_like(x))

    @pytest.mark.parametrize("samples", [1, 2, 7])
    def test_score_and_gradient_are_means_by_loops(self, samples, model, images):
        noisy = self.noisy(model)
        torch.manual_seed(3)
        score, gradient = ascent(Objective(noisy, distance_score, model(images), samples=samples), images)
        torch.manual_seed(3)
        scores, gradients = [0.0] * ROWS, [torch.zeros_like(image) for image in images]
        for _ in range(samples):
            noise = 0.3 * torch.randn_like(images)
            for i in range(ROWS):
                point = images[i : i + 1].clone().requires_grad_()
                value = distance_score(model(point + noise[i : i + 1]))[0]
                value.backward()
                scores[i] += float(value.detach()) / samples
                gradients[i] = gradients[i] + point.grad[0] / samples
        assert score.tolist() == pytest.approx(scores)
        torch.testing.assert_close(gradient, torch.stack(gradients))

    def test_the_last_point_is_judged_by_as_many(self, model, images):
        calls = []

        def counted(x):
            calls.append(x.requires_grad)
            return model(x)

        MomentumPGD(Objective(counted, distance_score, model(images), samples=4), 0.1, 3)(images)
        assert calls == [True] * 12 + [False] * 4

    def test_more_draws_follow_the_mean_more_closely(self, model, images):
        """The gradient of the mean over very many draws is what all others are compared with."""

        def gradient(samples, seed):
            torch.manual_seed(seed)
            return ascent(Objective(self.noisy(model), distance_score, model(images), samples=samples), images)[1]

        truth = gradient(200, 0)
        errors = [sum(float((gradient(n, seed) - truth).norm()) for seed in range(1, 4)) for n in (1, 4, 16)]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 2 * errors[2]


class TestUniformNoise:
    @all_norms
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_in_the_unit_ball(self, norm, dtype):
        points = uniform_noise(torch.zeros(400, 1, 2, 2, dtype=dtype), norm=norm)
        assert points.dtype == dtype
        assert points.shape == (400, 1, 2, 2)
        assert 0.9 < length(points, norm).max() <= 1 + 1e-6

    @pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
    def test_reaches_eps_and_no_further(self, norm):
        found = length(uniform_noise(torch.zeros(400, 1, 2, 2), 0.3, norm), norm)
        assert 0.27 < found.max() <= 0.3 + 1e-6

    @pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
    def test_fills_it_evenly(self, norm):
        found = length(uniform_noise(torch.zeros(20_000, 3), norm=norm), norm)
        for radius in (0.5, 0.8):  # the share of a ball that a smaller one holds, by its volume
            assert (found <= radius).float().mean() == pytest.approx(radius**3, abs=0.02)


class Hinge:
    """A score up to ``enough``, at which a row is satisfied."""

    def __init__(self, enough):
        self.enough = enough

    def __call__(self, embeddings):
        return distance_score(embeddings)

    def satisfied(self, values):
        return values >= self.enough


class TestSatisfied:
    """``score.satisfied``: rows rest from the moment at which they are."""

    def test_rows_rest_where_they_got_to(self, model, images):
        clean = distance_score(model(images)).detach()
        hinge = Hinge(clean.sort().values[3].item() + 0.05)
        found = PGD(objective_of(model, images, hinge), 0.3, 0.005, 20, random_start=False)(images)
        steps_taken = []
        for image, end in zip(images, found, strict=True):
            point, steps = image, 0
            while distance_score(model(point[None])).item() < hinge.enough and steps < 20:
                moved = point + 0.005 * one_gradient(model, point).sign()
                point, steps = (image + (moved - image).clamp(-0.3, 0.3)).clamp(0, 1), steps + 1
            torch.testing.assert_close(end, point, rtol=0, atol=1e-9)
            steps_taken.append(steps)
        assert 0 in steps_taken
        assert any(0 < steps < 20 for steps in steps_taken)

    @pytest.mark.parametrize("attack", [PGD, torchattacks.PGD, torchattacks.FGSM, torchattacks.APGD])
    def test_a_batch_that_is_satisfied_is_not_attacked(self, attack, model, images):
        objective = objective_of(model, images, Hinge(-math.inf))
        assert build(attack, objective) is unchanged

    def test_nor_by_an_attack_of_a_plugin(self, model, images):
        def fails(inputs, labels):
            raise AssertionError

        objective = objective_of(model, images, Hinge(-math.inf))
        assert run(fails, images, objective.labels, objective) is images

    def test_one_row_that_is_not_is_enough(self, model, images):
        highest = distance_score(model(images)).max().item()
        objective = objective_of(model, images, Hinge(highest + 1e-3))
        lowest = objective_of(model, images, Hinge(distance_score(model(images)).min().item() + 1e-3))
        assert not objective.is_satisfied
        assert not lowest.is_satisfied
        assert build(PGD, lowest) is not unchanged


class Flat:
    """A score without gradient."""

    def __init__(self, may_be_flat, height=0.0):
        self.may_be_flat, self.height = may_be_flat, height

    def __call__(self, embeddings):
        return 0 * embeddings.sum() + self.height


class TestFlat:
    """``score.may_be_flat``: an attack may find nothing."""

    @pytest.mark.parametrize("height", [0.0, 2.0])
    @pytest.mark.parametrize("attack", [PGD, torchattacks.PGD])
    def test_all_may_stay(self, attack, height, model, images):
        objective = objective_of(model, images, Flat(True, height))
        made = build(lambda objective: attack(objective, random_start=False), objective)
        assert run(made, images, objective.labels, objective) is images
        assert objective.zero_gradient.all()

    def test_a_random_start_moves_them(self, model, images):
        objective = objective_of(model, images, Flat(True))
        assert (run(build(PGD, objective), images, objective.labels, objective) != images).any()

    def test_without_its_word_it_is_an_error(self, model, images):
        objective = objective_of(model, images, Flat(False))
        with pytest.raises(AttackError, match="changed none"):
            run(PGD(objective, random_start=False), images, objective.labels, objective)

    def test_an_attack_that_stays_where_there_is_a_gradient_failed(self, model, images):
        class Steep(Flat):
            def __call__(self, embeddings):
                return distance_score(embeddings)

        objective = objective_of(model, images, Steep(True))
        PGD(objective)(images)
        with pytest.raises(AttackError, match="changed none"):
            run(lambda inputs, labels: inputs, images, objective.labels, objective)


class TestFriendly:
    @pytest.mark.parametrize("enough", [-math.inf, 2.0, 5.0, math.inf])
    def test_a_row_takes_steps_until_its_score_is_above_enough(self, enough, model, images):
        attack = FriendlyPGD(objective_of(model, images), 0.3, 0.03, 8, enough)
        torch.manual_seed(2)
        starts = attack.start(images)
        torch.manual_seed(2)
        found = attack(images)
        for image, start, end in zip(images, starts, found, strict=True):
            point = start
            for _ in range(8):
                if distance_score(model(point[None])).item() > enough:
                    break
                moved = point + 0.03 * one_gradient(model, point).sign()
                point = (image + (moved - image).clamp(-0.3, 0.3)).clamp(0, 1)
            torch.testing.assert_close(end, point, rtol=0, atol=1e-9)


class Operations(TorchDispatchMode):
    """Counts what is dispatched, and refuses what makes an accelerator's host wait."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(waits in name for waits in self.WAITS), name
        self.count += 1
        return func(*args, **(kwargs or {}))


class TestOperations:
    def by_hand(self, model, images, steps, eps=0.1, alpha=0.05):
        point = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(distance_score(model(point)).sum(), point)
            moved = point.detach() + alpha * gradient.sign()
            point = (images + (moved - images).clamp(-eps, eps)).clamp(0, 1)
        return point

    def count(self, attack, *arguments):
        with Operations() as operations:
            attack(*arguments)
        return operations.count

    def test_a_step_takes_no_more_than_one_by_hand_and_nobody_waits(self, model, images):
        """Ten steps alone: the difference between 11 steps and 1."""
        model.requires_grad_(False)
        attacks = [PGD(objective_of(model, images), 0.1, 0.05, steps) for steps in (1, 11)]
        ours = [self.count(attack, images) for attack in attacks]
        theirs = [self.count(self.by_hand, model, images, steps) for steps in (1, 11)]
        assert ours[1] - ours[0] <= theirs[1] - theirs[0]

    @pytest.mark.parametrize("kind", [NFGSM, PGD])
    def test_the_clean_score_is_not_asked_for(self, kind, model, images):
        asked = []

        def score(embeddings):
            asked.append(torch.is_grad_enabled())
            return distance_score(embeddings)

        kind(objective_of(model, images, score), 0.1)(images)
        assert asked == [True] * (1 if kind is NFGSM else 3)
