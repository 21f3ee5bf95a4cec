import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import ContrastiveLoss
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import AttackError, attacks, hookimpl
from pml_adversarial.attacks.adapter import budget, build, check, check_warmup, run, unchanged
from pml_adversarial.attacks.objective import Objective
from pml_adversarial.attacks.presets import SEED_PAPER
from pml_adversarial.training.isolation import random_stream

EPS, ALPHA, STEPS = 0.1, 0.03, 5


class QueryBatch:
    """A smooth model and, for each row, the distance from a point of its own as the score."""

    def __init__(self, dtype=torch.float64, channels=1, rows=6):
        generator = torch.Generator().manual_seed(3)
        layers = nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh()
        self.model = nn.Sequential(*layers).to(dtype)
        self.inputs = torch.rand(rows, channels, 6, 6, generator=generator, dtype=dtype)
        self.targets = torch.rand(rows, 5, generator=generator, dtype=dtype)
        self.asked = []

    def score(self, embeddings):
        return (embeddings - self.targets).square().sum(1)

    def score_of(self, inputs):
        with torch.no_grad():
            return self.score(self.model(inputs))

    def objective(self):
        def embed(inputs):
            self.asked.append(inputs.detach().clone())
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
def batch():
    return QueryBatch()


def uniform_start(batch):
    return (batch.inputs + torch.empty_like(batch.inputs).uniform_(-EPS, EPS)).clamp(0, 1)


def flat_norm(values):
    return values.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def fgsm(batch):
    return (batch.inputs + EPS * batch.gradient(batch.inputs).sign()).clamp(0, 1)


def pgd(batch, random_start):
    moved = uniform_start(batch) if random_start else batch.inputs
    for _ in range(STEPS):
        moved = batch.project(moved + ALPHA * batch.gradient(moved).sign())
    return moved


def pgd_l2(batch):
    start = torch.empty_like(batch.inputs).normal_()
    radius = torch.zeros(len(start), 1, 1, 1, dtype=start.dtype).uniform_(0, 1)
    moved = (batch.inputs + start * radius / flat_norm(start) * EPS).clamp(0, 1)
    for _ in range(STEPS):
        gradient = batch.gradient(moved)
        change = moved + ALPHA * gradient / flat_norm(gradient) - batch.inputs
        moved = (batch.inputs + change * (EPS / flat_norm(change)).clamp(max=1)).clamp(0, 1)
    return moved


def mifgsm(batch):
    moved, momentum = batch.inputs, 0
    for _ in range(STEPS):
        gradient = batch.gradient(moved)
        momentum = momentum + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        moved = batch.project(moved + ALPHA * momentum.sign())
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
    def test_equals_the_attack_on_the_score_by_hand(self, batch, name):
        factory, by_hand = BY_HAND[name]
        found = batch.attacked(factory)
        with random_stream(0, 0):
            expected = by_hand(batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert (batch.score_of(found) > batch.score_of(batch.inputs)).all()

    def test_a_scalar_score_moves_all_rows(self, batch):
        per_row = batch.score
        batch.score = lambda embeddings: per_row(embeddings).sum()
        found = batch.attacked(PGD)
        assert ((found - batch.inputs).flatten(1).abs().amax(1) > EPS / 2).all()
        assert per_row(batch.model(found)).sum() > per_row(batch.model(batch.inputs)).sum()


def returning(perturb):
    return lambda inputs, labels: perturb(inputs)


def with_value(value):
    def perturb(inputs):
        perturbed = inputs + 0.01
        perturbed[1, 0, 0, 0] = value
        return perturbed

    return returning(perturb)


# Every attack that torchattacks exports, in one of three places. Budgets: the norm and what it may reach.
IN_TRAINING = {
    "FGSM": ({"eps": EPS}, "linf", EPS),
    "BIM": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "RFGSM": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "PGD": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "EOTPGD": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "FFGSM": ({"eps": EPS, "alpha": EPS}, "linf", EPS),
    "MIFGSM": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "UPGD": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "APGD": ({"eps": EPS, "steps": STEPS}, "linf", EPS),
    "DIFGSM": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "TIFGSM": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS, "len_kernel": 3}, "linf", EPS),
    "NIFGSM": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "SINIFGSM": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "VMIFGSM": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "VNIFGSM": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "PIFGSM": ({"max_epsilon": EPS, "num_iter_set": STEPS}, "linf", EPS),
    "PIFGSMPP": ({"max_epsilon": EPS, "num_iter_set": STEPS}, "linf", EPS),
    "Square": ({"eps": EPS, "n_queries": 60}, "linf", EPS),
    "PGDL2": ({"eps": 0.5, "alpha": 0.2, "steps": STEPS}, "l2", 0.5),
    "CW": ({"c": 5, "steps": 20}, "l2", 2.0),  # no budget, but a price: c weighs the score against the squared norm
}
IN_EVALUATION = {
    "TPGD": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "Jitter": ({"eps": EPS, "alpha": ALPHA, "steps": STEPS}, "linf", EPS),
    "APGDT": ({"eps": EPS, "steps": STEPS, "n_classes": 10}, "linf", EPS),
    "PGDRS": (
        {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "noise_sd": 0.1, "noise_batch_size": 3, "batch_max": 30},
        "linf",
        EPS,
    ),
    "PGDRSL2": (
        {"eps": 0.5, "alpha": 0.2, "steps": STEPS, "noise_sd": 0.1, "noise_batch_size": 3, "batch_max": 30},
        "l2",
        0.5,
    ),
    "SPSA": ({"eps": EPS, "nb_iter": 3, "nb_sample": 16}, "linf", EPS),
    "JSMA": ({"theta": 1.0, "gamma": 0.1}, "l0", 0.1 * 3 * 36),
    "EADL1": ({"max_iterations": 10, "lr": 0.05}, "l2", 2.0),
    "EADEN": ({"max_iterations": 10, "lr": 0.05}, "l2", 2.0),
    "DeepFool": ({"steps": 20}, "l2", 2.0),
    "SparseFool": ({"steps": 10}, "l0", 3 * 36 / 2),
    "OnePixel": ({"pixels": 2, "steps": 3, "popsize": 20}, "l0", 2 * 3),
    "Pixle": ({"max_iterations": 10, "restarts": 2, "x_dimensions": 1, "y_dimensions": 1}, "l0", 2 * 3),
    "FAB": ({"eps": EPS, "steps": STEPS, "n_classes": 10}, "linf", EPS),
    "AutoAttack": ({"eps": EPS, "n_classes": 10}, "linf", EPS),
    "MultiAttack": (None, "linf", EPS),
}
USELESS = ["VANILA", "GN", "LGV"]
SINCE_3_4 = {"SPSA", "JSMA", "EADL1", "EADEN", "PIFGSM", "PIFGSMPP"}


def installed(names):
    """Those that the installed torchattacks has: releases from 3.4 on have six more."""
    return [name for name in names if name in torchattacks.__all__]


class Spy:
    @hookimpl
    def pml_adversarial_record(self, adversarial):
        self.adversarial = adversarial


def size_of(change, norm):
    change = change.flatten(1)
    if norm == "l0":
        return (change.abs() > 1e-9).sum(1).max()
    return change.abs().max() if norm == "linf" else change.norm(dim=1).max()


class Retrieval(nn.Module):
    """An embedding as a classifier: the logit of a class is the scaled similarity to its most similar gallery item."""

    def __init__(self, embed, gallery, labels):
        super().__init__()
        self.embed, self.labels = embed, labels
        self.unit = nn.functional.normalize(embed(gallery)).detach()

    def forward(self, images):
        similarities = 10 * nn.functional.normalize(self.embed(images)) @ self.unit.T
        return torch.stack([similarities[:, self.labels == label].amax(1) for label in range(10)], 1)


class TestEveryTorchattack:
    def test_has_its_place(self):
        placed = [*IN_TRAINING, *IN_EVALUATION, *USELESS]
        assert len(placed) == len(set(placed))
        newer = SINCE_3_4 if torchattacks.__version__ == "3.3.0" else set()
        assert set(torchattacks.__all__) == set(placed) - newer
        assert all(isinstance(getattr(torchattacks, name), type) for name in torchattacks.__all__)

    def test_is_documented_in_its_place(self):
        page = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text(encoding="utf-8")
        for place, names in (
            ("in training", IN_TRAINING),
            ("in evaluation only", IN_EVALUATION),
            ("refused", USELESS),
        ):
            (row,) = re.findall(rf"^\| {place} \| (.*) \|$", page, re.M)
            assert sorted(row.split(", ")) == sorted(names)

    @pytest.mark.parametrize("name", installed(IN_TRAINING))
    def test_in_training_raises_the_score_of_a_fixed_context_within_its_budget(self, name):
        options, norm, limit = IN_TRAINING[name]
        batch = QueryBatch(torch.float32, channels=3)  # some have kernels of three channels in single precision
        factory = partial(getattr(torchattacks, name), **options)
        check(factory)
        found = batch.attacked(factory)
        assert (batch.score_of(found) > batch.score_of(batch.inputs)).all()
        assert 0.05 * limit < size_of(found - batch.inputs, norm) <= limit + 1e-5

    @pytest.mark.parametrize("norm", ["Linf", "L2"])
    @pytest.mark.parametrize(
        ("name", "options", "passes"),
        [
            ("APGD", {"steps": 20}, 1 + 1 + 20),  # labels, start, steps
            ("APGD", {"steps": 7, "n_restarts": 3}, 1 + 3 * (1 + 7)),
            ("Square", {"n_queries": 80}, 1 + 1 + 80 + 1),  # labels, stripes, queries, result
            ("CW", {"steps": 30, "c": 100, "lr": 1e-3}, 30),
        ],
    )
    def test_gated_by_success_spends_all_and_returns_its_best(self, batch, name, options, passes, norm):
        if name != "CW":
            options = {**options, "norm": norm, "eps": EPS if norm == "Linf" else 0.5}
        found = batch.attacked(partial(getattr(torchattacks, name), **options))
        asked = torch.stack(batch.asked)
        assert len(asked) == passes
        scores = torch.stack([batch.score_of(inputs) for inputs in asked])
        torch.testing.assert_close(batch.score_of(found), scores.amax(0), rtol=1e-6, atol=0)
        assert (asked == found).flatten(2).all(2).any(0).all()
        assert (batch.score_of(found) > batch.score_of(batch.inputs)).all()

    def test_gated_by_success_is_about_as_strong_as_pgd(self, batch):
        clean = batch.score_of(batch.inputs)
        pgd = batch.score_of(batch.attacked(partial(PGD, steps=30))) - clean
        apgd = batch.score_of(batch.attacked(partial(torchattacks.APGD, eps=EPS, steps=30))) - clean
        assert (apgd > 0.97 * pgd).all()

    def test_best_tried_leaves_what_nothing_was_better_than(self, batch):
        downhill = batch.score
        batch.score = lambda embeddings: downhill(embeddings) * torch.tensor([1.0, 0, 0, 0, 0, 1])
        found = batch.attacked(partial(torchattacks.APGD, eps=EPS, steps=5))
        assert (found != batch.inputs).flatten(1).any(1).tolist() == [True, False, False, False, False, True]

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # SparseFool, with numpy 2
    @pytest.mark.parametrize("name", installed(IN_EVALUATION))
    def test_in_evaluation_only(self, name):
        kind = getattr(torchattacks, name)
        options, norm, limit = IN_EVALUATION[name]
        classes = torch.rand(10, 3, 6, 6)
        embed = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, 8)).eval()
        classifier = Retrieval(embed, classes.repeat(2, 1, 1, 1), torch.arange(10).repeat(2)).eval()
        queries, labels = (classes + 0.05 * torch.randn(10, 3, 6, 6)).clamp(0, 1)[:4], torch.arange(4)
        assert torch.equal(classifier(queries).argmax(1), labels)
        if options is None:
            attack = kind([torchattacks.PGD(classifier, eps=EPS), torchattacks.FGSM(classifier, eps=EPS)])
        else:
            attack = kind(classifier, **options)
        found = attack(queries, labels).detach()
        change = nn.functional.cross_entropy(classifier(found), labels) - nn.functional.cross_entropy(
            classifier(queries), labels
        )
        assert change > 0.01
        assert 0 < size_of(found - queries, norm) <= limit + 1e-5
        with pytest.raises(AttackError, match=f"{name} cannot be used in training: .*such as PGD, APGD or Square"):
            check(kind)

    @pytest.mark.parametrize("name", installed([*IN_EVALUATION, *USELESS]))
    def test_refused_in_training_when_a_factory_hides_it(self, batch, name):
        made = object.__new__(getattr(torchattacks, name))
        with pytest.raises(AttackError, match=f"{name} cannot be used in training"):
            build(lambda objective: made, batch.objective())

    @pytest.mark.parametrize("name", USELESS)
    def test_useless(self, name):
        kind = getattr(torchattacks, name)
        with pytest.raises(AttackError, match=f"{name} cannot be used in training"):
            check(partial(partial(kind), verbose=True))

    @pytest.mark.parametrize("name", installed(IN_TRAINING))
    def test_normalised_inputs_are_attacked_in_pixels(self, name):
        double = not name.startswith(
            ("TI", "PI")
        )  # those have kernels in single precision; signs of tiny sums may flip
        options, norm, limit = IN_TRAINING[name]
        batch = QueryBatch(torch.float64 if double else torch.float32, channels=3)
        mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
        shift, scale = (torch.tensor(values, dtype=batch.inputs.dtype).view(3, 1, 1) for values in (mean, std))

        class TakesPixels(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = batch.model

            def forward(self, pixels):
                return self.inner((pixels - shift) / scale)

        found, labels = [], torch.tensor([0, 0, 1, 1, 2, 2])
        for model, inputs, normalization in (
            (TakesPixels(), batch.inputs, None),
            (batch.model, (batch.inputs - shift) / scale, (mean, std)),
        ):
            spy = Spy()
            loss_func = seed_paper_loss(
                ContrastiveLoss(),
                model,
                attack=partial(getattr(torchattacks, name), **options),
                plugins=[spy],
                normalization=normalization,
                seed=0,
            )
            loss_func(model(inputs), labels)
            assert loss_func.share_score_rose == 1
            found.append(spy.adversarial.inputs)
        agree = (found[0] - found[1]).abs() < 1e-5
        assert agree.all() if double else agree.float().mean() > 0.99
        for inputs in found:
            assert 0.05 * limit < size_of(inputs - batch.inputs, norm) <= limit + 1e-5

    def test_a_subclass_is_refused_with_its_base(self):
        class Deeper(torchattacks.DeepFool):
            pass

        with pytest.raises(AttackError, match="Deeper cannot be used in training: it searches for the nearest"):
            check(Deeper)


class Rows:
    """What is no images: a table, and sounds."""

    def __init__(self, shape):
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.rand(6, *shape, generator=generator)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(self.inputs[0].numel(), 5), nn.Tanh())
        self.targets = torch.rand(6, 5, generator=generator)

    def score(self, embeddings):
        return (embeddings - self.targets).square().sum(1)

    def attacked(self, factory):
        with torch.no_grad():
            objective = Objective(self.model, self.score, self.model(self.inputs), [self.model])
        with random_stream(0, 0):
            return run(build(factory, objective), self.inputs, objective.labels, objective)


class TestWhatIsNoImage:
    @pytest.mark.parametrize("shape", [(7,), (1, 40), (4, 3, 5, 5)])
    @pytest.mark.parametrize("name", ["APGD", "CW", "FGSM", "FFGSM", "MIFGSM", "PGD", "PGDL2", "Square"])
    def test_is_attacked_too(self, name, shape):
        options, norm, limit = IN_TRAINING[name]
        batch = Rows(shape)
        found = batch.attacked(partial(getattr(torchattacks, name), **options))
        assert found.shape == batch.inputs.shape
        with torch.no_grad():
            rise = batch.score(batch.model(found)) - batch.score(batch.model(batch.inputs))
        assert (rise > 0).all()
        assert size_of(found - batch.inputs, norm) <= limit + 1e-5


class TestForeign:
    """An attack from elsewhere is any callable; this one knows nothing of torchattacks."""

    class CoordinateSearch:
        def __init__(self, objective, eps, rounds=30):
            self.objective, self.eps, self.rounds = objective, eps, rounds

        @torch.no_grad()
        def __call__(self, inputs, labels):
            best = inputs.clone()
            highest = self.loss(best, labels)
            for _ in range(self.rounds):
                tried = (inputs + self.eps * torch.empty_like(inputs).uniform_(-1, 1).sign()).clamp(0, 1)
                loss = self.loss(tried, labels)
                better = loss > highest
                best[better], highest[better] = tried[better], loss[better]
            return best

        def loss(self, inputs, labels):
            return nn.functional.cross_entropy(self.objective(inputs), labels, reduction="none")

    def test_raises_the_score(self, batch):
        found = batch.attacked(partial(self.CoordinateSearch, eps=EPS))
        assert (batch.score_of(found) > batch.score_of(batch.inputs)).all()
        assert (found - batch.inputs).abs().max() <= EPS + 1e-9
        assert len(batch.asked) == 31

    def test_warms_up(self, batch):
        check_warmup(factory := partial(self.CoordinateSearch, eps=EPS))
        found = batch.attacked(factory, strength=0.5)
        assert (found - batch.inputs).abs().max().item() == pytest.approx(EPS / 2)


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

    @pytest.mark.parametrize(
        "factory",
        [
            partial(torchattacks.PGDL2, eps=2.0),
            partial(torchattacks.APGD, norm="L2", eps=2.0),
            partial(attacks.PGD, eps=3.0, norm="L1", steps=2),
            partial(attacks.PGD, eps=5, norm="L0", steps=2),
            attacks.Autocast(partial(attacks.PGD, eps=2.0, norm="L2", steps=2)),
        ],
    )
    def test_does_not_warn_of_a_radius_in_another_norm(self, factory, caplog):
        check(factory)
        assert not caplog.text


class TestBuild:
    @pytest.mark.parametrize(
        ("strength", "eps", "alpha"), [(1.0, 0.1, 0.03), (0.5, 0.05, 0.015), (0.25, 0.025, 0.0075)]
    )
    def test_scales_eps_and_alpha(self, batch, strength, eps, alpha):
        attack = build(PGD, batch.objective(), strength)
        assert isinstance(attack, torchattacks.PGD)
        assert (attack.eps, attack.alpha) == pytest.approx((eps, alpha))
        assert attack.steps == STEPS

    def test_scales_defaults_too(self, batch):
        attack = build(torchattacks.PGD, batch.objective(), 0.5)
        assert (attack.eps, attack.alpha) == pytest.approx((4 / 255, 1 / 255))

    @pytest.mark.parametrize("norm", ["L0", "patch"])
    def test_counts_of_pixels_stay_whole(self, norm, batch):
        factory = partial(attacks.PGD, eps=4, norm=norm, steps=2)
        found = [build(factory, batch.objective(), strength).eps for strength in (0.01, 0.3, 0.5, 0.9, 1.0)]
        assert found == [1, 1, 2, 4, 4]

    def test_the_perturbation_shrinks_with_it(self, batch):
        found = batch.attacked(PGD, strength=0.5)
        assert (found - batch.inputs).abs().max().item() == pytest.approx(EPS / 2)

    @pytest.mark.parametrize(
        ("factory", "strength"), [(PGD, 0.0), (partial(PGD, eps=0), 1.0), (partial(PGD, eps=0.0), 0.5)]
    )
    def test_no_strength_is_unchanged(self, batch, factory, strength):
        assert build(factory, batch.objective(), strength) is unchanged

    def test_a_factory_without_budget_is_called_as_it_is(self, batch):
        given = []
        attack = build(lambda objective: given.append(objective) or torch.add, batch.objective(), 0.5)
        assert attack is torch.add
        assert isinstance(given[0], Objective)

    @pytest.mark.parametrize("returned", [None, 3, torch.zeros(2)])
    def test_what_cannot_be_called_is_refused(self, batch, returned):
        with pytest.raises(AttackError, match=f"returned {type(returned).__name__}; expected a callable"):
            build(lambda objective: returned, batch.objective())

    def test_attacks_that_seed_themselves_get_another_seed_each_time(self, batch):
        def seed(step):
            attack = torchattacks.APGD(batch.objective())
            with random_stream(0, step):
                build(lambda objective: attack, batch.objective())
            return attack.seed

        assert seed(0) == seed(0)
        assert len({seed(step) for step in range(20)}) == 20
