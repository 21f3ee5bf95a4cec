from functools import partial

import pytest
import torch
import torchattacks
from torch import nn

from pml_adversarial import AttackError
from pml_adversarial.attacks import SEED_PAPER, budget, build, check, check_warmup, run, unchanged
from pml_adversarial.isolation import random_stream
from pml_adversarial.objective import Objective

EPS, ALPHA, STEPS = 0.1, 0.03, 5


class Scene:
    """A smooth model and, for each row, the distance from a point of its own as the score."""

    def __init__(self, rows=6):
        generator = torch.Generator().manual_seed(3)
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh()).double()
        self.inputs = torch.rand(rows, 1, 6, 6, generator=generator, dtype=torch.float64)
        self.targets = torch.rand(rows, 5, generator=generator, dtype=torch.float64)
        self.asked = []

    def score(self, embeddings):
        return (embeddings - self.targets).square().sum(1)

    def score_of(self, inputs):
        with torch.no_grad():
            return self.score(self.model(inputs))

    def objective(self):
        def embed(inputs):
            self.asked.append(len(inputs))
            return self.model(inputs)

        with torch.no_grad():
            clean = self.model(self.inputs)
        return Objective(embed, self.score, clean, [self.model]).eval()

    def gradient(self, inputs):
        """Of the score, by hand."""
        inputs = inputs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.score(self.model(inputs)).sum(), inputs)
        return gradient

    def project(self, moved):
        return (self.inputs + (moved - self.inputs).clamp(-EPS, EPS)).clamp(0, 1)

    def attacked(self, factory, strength=1.0):
        with random_stream(0, 0):
            objective = self.objective()
            return run(build(factory, objective, strength), self.inputs, objective.labels)


@pytest.fixture
def scene():
    return Scene()


def uniform_start(scene):
    return (scene.inputs + torch.empty_like(scene.inputs).uniform_(-EPS, EPS)).clamp(0, 1)


def flat_norm(values):
    return values.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def fgsm(scene):
    return (scene.inputs + EPS * scene.gradient(scene.inputs).sign()).clamp(0, 1)


def pgd(scene, random_start):
    moved = uniform_start(scene) if random_start else scene.inputs
    for _ in range(STEPS):
        moved = scene.project(moved + ALPHA * scene.gradient(moved).sign())
    return moved


def pgd_l2(scene):
    start = torch.empty_like(scene.inputs).normal_()
    radius = torch.zeros(len(start), 1, 1, 1, dtype=start.dtype).uniform_(0, 1)
    moved = (scene.inputs + start * radius / flat_norm(start) * EPS).clamp(0, 1)
    for _ in range(STEPS):
        gradient = scene.gradient(moved)
        change = moved + ALPHA * gradient / flat_norm(gradient) - scene.inputs
        moved = (scene.inputs + change * (EPS / flat_norm(change)).clamp(max=1)).clamp(0, 1)
    return moved


def mifgsm(scene):
    moved, momentum = scene.inputs, 0
    for _ in range(STEPS):
        gradient = scene.gradient(moved)
        momentum = momentum + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        moved = scene.project(moved + ALPHA * momentum.sign())
    return moved


PGD = partial(torchattacks.PGD, eps=EPS, alpha=ALPHA, steps=STEPS)
BY_HAND = {
    "FGSM": (partial(torchattacks.FGSM, eps=EPS), fgsm),
    "PGD": (PGD, partial(pgd, random_start=True)),
    "PGD from the clean inputs": (partial(PGD, random_start=False), partial(pgd, random_start=False)),
    "PGDL2": (partial(torchattacks.PGDL2, eps=EPS, alpha=ALPHA, steps=STEPS), pgd_l2),
    "MIFGSM": (partial(torchattacks.MIFGSM, eps=EPS, alpha=ALPHA, steps=STEPS, decay=1.0), mifgsm),
}


class TestDoor:
    @pytest.mark.parametrize("name", BY_HAND)
    def test_equals_the_attack_on_the_score_by_hand(self, scene, name):
        factory, by_hand = BY_HAND[name]
        found = scene.attacked(factory)
        with random_stream(0, 0):
            expected = by_hand(scene)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert (scene.score_of(found) > scene.score_of(scene.inputs)).all()

    @pytest.mark.parametrize(
        "factory",
        [partial(torchattacks.APGD, eps=EPS, steps=8), partial(torchattacks.Square, eps=EPS, n_queries=60)],
        ids=["APGD", "Square"],
    )
    def test_attacks_that_return_misclassified_rows_only_are_never_silent(self, scene, factory):
        with pytest.raises(AttackError, match="changed none of 6 inputs"):
            scene.attacked(factory)

    def test_a_scalar_score_moves_all_rows(self, scene):
        per_row = scene.score
        scene.score = lambda embeddings: per_row(embeddings).sum()
        found = scene.attacked(PGD)
        assert ((found - scene.inputs).flatten(1).abs().amax(1) > EPS / 2).all()
        assert per_row(scene.model(found)).sum() > per_row(scene.model(scene.inputs)).sum()


def returning(perturb):
    return lambda inputs, labels: perturb(inputs)


def with_value(value):
    def perturb(inputs):
        perturbed = inputs + 0.01
        perturbed[1, 0, 0, 0] = value
        return perturbed

    return returning(perturb)


class TestContract:
    inputs = torch.full((3, 1, 2, 2), 0.5)
    labels = torch.zeros(3, dtype=torch.long)

    def run(self, attack):
        return run(attack, self.inputs, self.labels)

    def test_the_result_is_passed_on(self):
        found = self.run(returning(lambda inputs: inputs + 0.1))
        assert torch.equal(found, self.inputs + 0.1)

    def test_the_attack_gets_inputs_and_labels(self):
        given = []
        run(lambda *arguments: given.extend(arguments) or self.inputs + 0.1, self.inputs, self.labels)
        assert given[0].equal(self.inputs)
        assert given[1].equal(self.labels)

    def test_the_result_carries_no_gradient(self):
        offset = torch.tensor(0.1, requires_grad=True)
        assert not self.run(returning(lambda inputs: inputs + offset)).requires_grad

    def test_the_type_of_the_inputs_is_kept(self):
        assert self.run(returning(lambda inputs: inputs.double() + 0.1)).dtype == torch.float32

    def test_one_changed_value_is_enough(self):
        self.run(with_value(0.6))

    @pytest.mark.parametrize("value", [-1e-6, 1 + 1e-6])
    def test_rounding_is_clamped(self, value):
        found = self.run(with_value(value))
        assert found.min() >= 0
        assert found.max() <= 1

    @pytest.mark.parametrize(
        ("perturb", "found"),
        [
            (lambda inputs: None, "NoneType"),
            (lambda inputs: inputs.numpy(), "ndarray"),
            (lambda inputs: (inputs, inputs), "tuple"),
            (lambda inputs: inputs[:2], r"\(2, 1, 2, 2\)"),
            (lambda inputs: inputs.flatten(1), r"\(3, 4\)"),
        ],
        ids=["nothing", "numpy", "tuple", "subset", "flat"],
    )
    def test_another_type_or_shape(self, perturb, found):
        with pytest.raises(AttackError, match=rf"returned {found}; expected inputs of the shape \(3, 1, 2, 2\)"):
            self.run(returning(perturb))

    @pytest.mark.parametrize(
        ("value", "found"),
        [(float("nan"), "NaN"), (float("inf"), "inf"), (-float("inf"), "-inf"), (1.01, "1.01"), (-0.01, "-0.01")],
    )
    def test_values_outside(self, value, found):
        with pytest.raises(AttackError, match=f"{found}.*expected finite values in"):
            self.run(with_value(value))

    @pytest.mark.parametrize(
        ("perturb", "found"),
        [
            (lambda inputs: inputs.to_sparse(), "torch.sparse_coo, torch.float32"),
            (lambda inputs: inputs + 0.1j, "torch.strided, torch.complex64"),
        ],
        ids=["sparse", "complex"],
    )
    def test_no_dense_real_numbers(self, perturb, found):
        with pytest.raises(AttackError, match=f"{found}; expected dense real numbers"):
            self.run(returning(perturb))

    def test_a_change_in_place_is_a_change(self):
        before = self.inputs.clone()
        perturbed = self.run(returning(lambda inputs: inputs.mul_(0.5)))
        assert torch.equal(perturbed, before * 0.5)
        assert torch.equal(self.inputs, before)

    @pytest.mark.parametrize("same", [lambda inputs: inputs, lambda inputs: inputs.clone()])
    def test_nothing_changed(self, same):
        with pytest.raises(AttackError, match="changed none of 3 inputs"):
            self.run(returning(same))

    def test_unchanged_on_purpose(self):
        assert self.run(unchanged) is self.inputs

    def test_is_a_runtime_error(self):
        with pytest.raises(RuntimeError, match="changed none"):
            self.run(returning(torch.clone))


class TestBudget:
    @pytest.mark.parametrize(
        ("factory", "expected"),
        [
            (SEED_PAPER, {"eps": 0.01, "alpha": 0.004}),
            (partial(torchattacks.PGD, eps=0.5), {"eps": 0.5, "alpha": 2 / 255}),
            (torchattacks.FGSM, {"eps": 8 / 255}),
            (partial(torchattacks.PGDL2, eps=2), {"eps": 2.0, "alpha": 0.2}),
            (partial(torchattacks.FGSM, eps=None), {}),
            (torchattacks.CW, {}),
            (lambda objective, eps: unchanged, {}),
            (lambda objective: unchanged, {}),
        ],
    )
    def test_numbers_of_the_factory(self, factory, expected):
        assert budget(factory) == expected

    @pytest.mark.parametrize("factory", [SEED_PAPER, torchattacks.FGSM, partial(torchattacks.PGD, eps=0)])
    def test_warmup_is_fine_with_an_eps(self, factory):
        check_warmup(factory)

    @pytest.mark.parametrize("factory", [torchattacks.CW, lambda objective: unchanged])
    def test_warmup_is_refused_without(self, factory):
        with pytest.raises(AttackError, match=r"has no eps .* warmup=0"):
            check_warmup(factory)


class TestCheck:
    @pytest.mark.parametrize(
        "factory", [SEED_PAPER, torchattacks.FGSM, torchattacks.CW, partial(PGD, eps=0.0), lambda objective: unchanged]
    )
    def test_lets_factories_pass(self, factory, caplog):
        check(factory)
        assert not caplog.records

    @pytest.mark.parametrize(
        ("factory", "message"),
        [
            ("PGD", "attack='PGD' is no factory"),
            (None, "attack=None is no factory"),
            (torchattacks.PGD(nn.Linear(1, 2)), r"attack=PGD\(.* is no factory"),
            (partial(torchattacks.PGD, epsilon=0.1), "incorrect arguments. Check its name and its options"),
            (partial(torchattacks.PGD, eps=-0.1), r"'eps': -0.1.* expected numbers from 0 on"),
            (partial(torchattacks.PGD, alpha=-0.1), "'alpha': -0.1"),
        ],
    )
    def test_refuses_what_cannot_be_one(self, factory, message):
        with pytest.raises(AttackError, match=message):
            check(factory)

    def test_warns_of_an_eps_in_levels(self, caplog):
        check(partial(torchattacks.PGD, eps=8))
        assert "eps=8/255" in caplog.text


class TestBuild:
    @pytest.mark.parametrize(
        ("strength", "eps", "alpha"), [(1.0, 0.1, 0.03), (0.5, 0.05, 0.015), (0.25, 0.025, 0.0075)]
    )
    def test_scales_eps_and_alpha(self, scene, strength, eps, alpha):
        attack = build(PGD, scene.objective(), strength)
        assert isinstance(attack, torchattacks.PGD)
        assert (attack.eps, attack.alpha) == pytest.approx((eps, alpha))
        assert attack.steps == STEPS

    def test_scales_defaults_too(self, scene):
        attack = build(torchattacks.PGD, scene.objective(), 0.5)
        assert (attack.eps, attack.alpha) == pytest.approx((4 / 255, 1 / 255))

    def test_the_perturbation_shrinks_with_it(self, scene):
        found = scene.attacked(PGD, strength=0.5)
        assert (found - scene.inputs).abs().max().item() == pytest.approx(EPS / 2)

    @pytest.mark.parametrize(
        ("factory", "strength"), [(PGD, 0.0), (partial(PGD, eps=0), 1.0), (partial(PGD, eps=0.0), 0.5)]
    )
    def test_no_strength_is_unchanged(self, scene, factory, strength):
        assert build(factory, scene.objective(), strength) is unchanged

    def test_a_factory_without_budget_is_called_as_it_is(self, scene):
        given = []
        attack = build(lambda objective: given.append(objective) or torch.add, scene.objective(), 0.5)
        assert attack is torch.add
        assert isinstance(given[0], Objective)

    @pytest.mark.parametrize("returned", [None, 3, torch.zeros(2)])
    def test_what_cannot_be_called_is_refused(self, scene, returned):
        with pytest.raises(AttackError, match=f"returned {type(returned).__name__}; expected a callable"):
            build(lambda objective: returned, scene.objective())

    def test_attacks_that_seed_themselves_get_another_seed_each_time(self, scene):
        def seed(step):
            attack = torchattacks.APGD(scene.objective())
            with random_stream(0, step):
                build(lambda objective: attack, scene.objective())
            return attack.seed

        assert seed(0) == seed(0)
        assert len({seed(step) for step in range(20)}) == 20
