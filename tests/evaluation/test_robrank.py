import json
import math
from itertools import count, pairwise

import pytest
import torch
from notes import Notes
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import ConcatDataset, TensorDataset

from pml_adversarial.cli.images import digits
from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import robrank
from pml_adversarial.evaluation.robrank import SCORES, SHARES, RobRankScores, ers, normalised, robrank_scores
from pml_adversarial.training.isolation import random_stream

VERSIONS = ("published", "corrected")
LIFTED = {"CA+": 1, "CA-": -1, "QA+": 1, "QA-": -1, "GTT": -1}
ATTACK_OF = {name: attack for attack in robrank._ATTACKS for name in attack.measures}
RUNS = [next(iter(attack.measures)) for attack in robrank._ATTACKS]

# Zhou, Patel, arXiv 2203.01439, the table of the state of the art: the ten scores in the order of `SCORES`, and ERS.
PUBLISHED = {
    "CUB, no defence": ((0.0, 100.0, 0.0, 99.9, 0.883, 1.762, 0.0, 0.0, 14.1, 0.0), 3.8),
    "CUB, EST": ((2.7, 97.9, 0.4, 97.3, 0.848, 1.576, 1.4, 0.0, 4.0, 0.0), 5.3),
    "CUB, ACT": ((15.5, 37.7, 15.1, 32.2, 0.472, 0.821, 11.1, 9.4, 14.9, 1.0), 33.9),
    "CUB, HM & ICS": ((15.5, 37.7, 16.6, 30.9, 0.753, 0.506, 17.9, 16.7, 27.3, 2.9), 36.0),
    "CARS, HM": ((17.4, 28.2, 18.2, 28.8, 0.426, 0.613, 27.1, 30.7, 42.3, 7.9), 44.9),
    "CARS, HM & ICS": ((19.3, 25.9, 19.6, 25.7, 0.650, 0.446, 30.3, 36.7, 46.0, 8.8), 46.0),
    "SOP, HM": ((30.6, 4.7, 31.2, 3.5, 0.466, 0.266, 38.6, 40.3, 38.6, 44.3), 61.8),
    "SOP, HM & ICS": ((32.0, 4.2, 33.7, 3.0, 0.606, 0.207, 39.1, 39.8, 37.9, 45.6), 61.6),
}
ROUNDING = 0.05 + (2 * 2 * 0.05 + 2 * 0.05 + 100 * 0.0005 + 50 * 0.0005 + 4 * 0.05) / 10  # of ERS, and of its parts


# The ten attacks by loops. Embeddings are lists of numbers; the perturbed one is a tensor where a gradient is wanted.


def d(a, b):
    distance = math.dist(a.tolist() if isinstance(a, torch.Tensor) else a, b)
    if distance <= 1e-5:
        return 0.0
    return (a - a.new_tensor(b)).square().sum().sqrt() if isinstance(a, torch.Tensor) else distance


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def hinge(value):
    return value if value > 0 else 0 * value


def competitors(corrected, own, target, size):
    return [x for x in range(size) if not corrected or x not in (own, target)]


def aim_by_loop(name, corrected, own, lot, gallery, labels):
    size = len(labels)
    others = sorted((x for x in range(size) if x != own), key=lambda x: d(gallery[own], gallery[x]))
    if name in ("CA+", "QA+", "TMA"):
        allowed = [x for x in range(size) if x != own] if corrected else range(size)
        return allowed[int(lot * len(allowed))]
    if name in ("CA-", "QA-"):
        return others[int(lot * max(1, size // 100))]
    if name == "GTT":
        return others[0]
    if name == "GTM" and corrected:
        return next(x for x in others if labels[x] != labels[own])
    if name == "GTM":
        unmatching = [x for x in range(size) if labels[x] != labels[others[0]]]
        return unmatching.index(next(x for x in others if x in unmatching))
    return own


def gaps_by_loop(name, f, target, gallery, items):
    if name in ("CA+", "CA-"):
        return {x: d(f, gallery[target]) - d(gallery[x], gallery[target]) for x in items}
    return {x: d(f, gallery[target]) - d(f, gallery[x]) for x in items}


def loss_by_loop(name, corrected, own, target, f, gallery, labels):
    size = len(labels)
    if name in LIFTED:
        items = competitors(corrected, own, target, size)
        return mean(hinge(LIFTED[name] * gap) for gap in gaps_by_loop(name, f, target, gallery, items).values())
    if name == "TMA":
        return 1 - sum(x * y for x, y in zip(f, gallery[target], strict=True))
    if name.startswith("ES"):
        nudged = [x + 1e-6 - y for x, y in zip(f, gallery[own], strict=True)]
        return -(sum(x * x for x in nudged) ** 0.5)
    if name == "LTM":
        right = min(d(f, gallery[x]) for x in range(size) if labels[x] == labels[own] and not (corrected and x == own))
        wrong = [d(f, gallery[x]) for x in range(size) if labels[x] != labels[own]]
        return hinge((min(wrong) if corrected else max(wrong)) - right)
    return d(f, gallery[target])


def recalled_by_loop(own, f, gallery, labels):
    others = [x for x in range(len(labels)) if x != own]
    nearest = min(others, key=lambda x: d(f, gallery[x]))
    return labels[nearest] == labels[own]


def measure_by_loop(name, corrected, own, target, f, gallery, labels):
    size = len(labels)
    if name == "GTT":
        others = sorted((x for x in range(size) if x != own), key=lambda x: d(f, gallery[x]))
        return target in others[:4]
    if name in LIFTED:
        items = competitors(corrected, own, target, size)
        return 100 * mean(gap > 0 for gap in gaps_by_loop(name, f, target, gallery, items).values())
    if name == "TMA":
        return sum(x * y for x, y in zip(f, gallery[target], strict=True))
    if name == "ES:D":
        shift = d(f, gallery[own])
        if not corrected:
            return shift
        return min(2.0, 2**0.5 * shift / mean(d(gallery[own], gallery[x]) for x in range(size) if x != own))
    return recalled_by_loop(own, f, gallery, labels)


def unit_rows(count, dimension, seed):
    return normalize(torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(params=VERSIONS)
def corrected(request):
    return request.param == "corrected"


@pytest.fixture
def crowd(corrected):
    """250 items on a sphere, its six sectors as classes, seven of them displaced; the nearest 1 % are two."""
    own = torch.tensor([0, 249, 17, 100, 101, 3, 42])
    gallery = unit_rows(250, 3, 3)
    labels = ((torch.atan2(gallery[:, 0], gallery[:, 1]) / math.pi + 1) * 3).long()
    moved = normalize(gallery[own] + 0.2 * unit_rows(7, 3, 4))
    return robrank._QueryBatch(gallery, labels, own, corrected), moved


@pytest.fixture
def retrieval():
    """Fourteen images of three classes around three patterns, and a small network in double precision with Dropout."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    patterns = torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(14, 1, 4, 4, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    return model, (patterns[labels] + 0.15 * noise).clamp(0, 1), labels


SMALL = {"eps": 0.07, "alpha": 0.03, "steps": 3}


def scores_of(retrieval, **options):
    model, *data = retrieval
    return robrank_scores(model, tuple(data), **{**SMALL, **options})


class TestERS:
    @pytest.mark.parametrize(("row", "published"), PUBLISHED.values(), ids=PUBLISHED)
    def test_equals_the_published_value(self, row, published):
        assert abs(ers(dict(zip(SCORES, row, strict=True))) - published) <= ROUNDING

    def test_the_published_best_on_cub_to_the_printed_digit(self):
        row, published = PUBLISHED["CUB, HM & ICS"]
        assert round(ers(dict(zip(SCORES, row, strict=True))), 1) == published == 36.0

    def test_is_the_mean_of_normalised_scores(self):
        row = dict(zip(SCORES, (1.0, 2.0, 3.0, 4.0, 0.5, 0.6, 7.0, 8.0, 9.0, 10.0), strict=True))
        parts = normalised(row)
        assert parts == pytest.approx(
            dict(zip(SCORES, (2.0, 98.0, 6.0, 96.0, 50.0, 70.0, 7.0, 8.0, 9.0, 10.0), strict=True))
        )
        assert ers(row) == pytest.approx(mean(parts.values()))

    @pytest.mark.parametrize("name", SCORES)
    def test_grows_with_robustness(self, name):
        row = dict(zip(SCORES, PUBLISHED["CUB, HM & ICS"][0], strict=True))
        larger = ers({**row, name: row[name] + 0.1}) > ers(row)
        assert larger == (name not in ("CA-", "QA-", "TMA", "ES:D"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"CA+": 101.0}, "CA"), ({"TMA": 75.3}, "TMA"), ({"ES:D": math.nan}, "ES:D"), ({"ARS": 1.0}, "ARS")],
    )
    def test_refuses_what_is_no_score(self, change, message):
        row = dict(zip(SCORES, PUBLISHED["CUB, HM & ICS"][0], strict=True))
        with pytest.raises(InputError, match=message):
            ers({**row, **change})

    def test_refuses_less_than_ten(self):
        with pytest.raises(InputError, match="GTT"):
            ers({"CA+": 1.0})


class TestEachAttack:
    @pytest.mark.parametrize("name", RUNS)
    @pytest.mark.parametrize("lot", [0.0, 0.3, 0.5, 0.9999])
    def test_aims_at(self, crowd, name, lot):
        batch, _ = crowd
        found = ATTACK_OF[name].choose(batch, torch.full((7,), lot, dtype=torch.float64)).tolist()
        gallery, labels = batch.gallery.tolist(), batch.labels.tolist()
        assert found == [aim_by_loop(name, batch.corrected, own, lot, gallery, labels) for own in batch.own.tolist()]

    @pytest.mark.parametrize("name", RUNS)
    def test_lowers(self, crowd, name):
        batch, moved = crowd
        target = ATTACK_OF[name].choose(batch, torch.linspace(0, 0.99, 7, dtype=torch.float64))
        found = ATTACK_OF[name].loss(batch, target)(moved)
        gallery, labels = batch.gallery.tolist(), batch.labels.tolist()
        expected = [
            loss_by_loop(name, batch.corrected, own, goal, f, gallery, labels)
            for own, goal, f in zip(batch.own.tolist(), target.tolist(), moved.tolist(), strict=True)
        ]
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
        assert len({round(value, 9) for value in expected}) > 1

    @pytest.mark.parametrize("name", SCORES)
    def test_is_scored_by(self, crowd, name):
        batch, moved = crowd
        target = ATTACK_OF[name].choose(batch, torch.linspace(0, 0.99, 7, dtype=torch.float64))
        found = ATTACK_OF[name].measures[name](batch, target, moved)
        gallery, labels = batch.gallery.tolist(), batch.labels.tolist()
        expected = [
            measure_by_loop(name, batch.corrected, own, goal, f, gallery, labels)
            for own, goal, f in zip(batch.own.tolist(), target.tolist(), moved.tolist(), strict=True)
        ]
        assert found.tolist() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("name", RUNS)
    @pytest.mark.parametrize("at", ["clean", "target", "one point"])
    def test_has_finite_gradients(self, crowd, name, at):
        batch, _ = crowd
        if at == "one point":
            gallery = batch.gallery[:1].expand(250, 3).contiguous()
            batch = robrank._QueryBatch(gallery, batch.labels, batch.own, batch.corrected)
        target = ATTACK_OF[name].choose(batch, torch.linspace(0, 0.99, 7, dtype=torch.float64))
        point = (batch.gallery[target] if at == "target" else batch.clean).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ATTACK_OF[name].loss(batch, target)(point).sum(), point)
        assert gradient.isfinite().all()
        assert name != "ES:D" or gradient.abs().amin(1).min() > 0.1  # it has to leave its own place

    def test_random_item_is_any_item(self, crowd):
        batch, _ = crowd
        size = 250 - batch.corrected
        lots = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        one = robrank._QueryBatch(batch.gallery, batch.labels, torch.full((size,), 17), batch.corrected)
        everyone = [x for x in range(250) if x != 17 or not batch.corrected]
        assert robrank._random_item(one, lots).tolist() == everyone

    def test_published_gtm_aims_elsewhere(self):
        gallery = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.2], [1.0, 0.9], [-1.0, 0.0]]))
        labels, own = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0])
        published, corrected = (robrank._QueryBatch(gallery, labels, own, version) for version in (False, True))
        assert robrank._nearest_unmatching(corrected, torch.zeros(1)).tolist() == [3]
        assert robrank._nearest_unmatching(published, torch.zeros(1)).tolist() == [
            0
        ]  # the first unmatching one: itself


class TestDistances:
    def test_of_close_embeddings_are_exact(self):
        rows = unit_rows(40, 64, 5).float()
        near = (rows + 1e-4 * unit_rows(40, 64, 6)).float()
        found = robrank._distances(near, rows).tolist()
        expected = [[math.dist(a, b) for b in rows.tolist()] for a in near.tolist()]
        assert found == [pytest.approx(row, rel=1e-4) for row in expected]
        assert robrank._pairs(near, rows).tolist() == [found[i][i] for i in range(40)]

    def test_under_rounding_are_none(self):
        rows = unit_rows(3, 8, 5)
        for size, equal in ((9e-6, True), (1.1e-5, False)):
            near = (rows + size * unit_rows(3, 8, 6)).requires_grad_()
            distances = robrank._pairs(near, rows)
            (gradient,) = torch.autograd.grad(distances.sum(), near)
            assert (distances == 0).tolist() == [equal] * 3
            assert (gradient == 0).all(1).tolist() == [equal] * 3


class TestTies:
    """Gallery items 1 and 2 coincide; the query 0 is right with 1."""

    def batch(self, corrected, labels):
        gallery = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 0.5], [0.0, 1.0]]))
        return robrank._QueryBatch(gallery, torch.tensor(labels), torch.tensor([0]), corrected)

    @pytest.mark.parametrize(("labels", "published"), [([0, 0, 1, 1], True), ([0, 1, 0, 1], False)])
    def test_of_a_right_and_a_wrong_item(self, labels, published):
        for corrected, expected in ((False, published), (True, False)):
            batch = self.batch(corrected, labels)
            assert robrank._nearest_is_right(batch, batch.own, batch.clean).tolist() == [expected]

    @pytest.mark.parametrize("target", [1, 2])
    @pytest.mark.parametrize("name", ["QA+", "QA-", "CA+", "CA-"])
    def test_in_a_list(self, name, target):
        for corrected in (False, True):
            batch = self.batch(corrected, [0, 0, 1, 1])
            goal = torch.tensor([target if name[0] == "Q" else 3])
            moved = batch.clean if name[0] == "Q" else batch.gallery[target].unsqueeze(0)
            found = ATTACK_OF[name].measures[name](batch, goal, moved).item()
            if corrected:  # competitors of a query's list: 3 and the twin; of the candidate's: both twins
                twins = 1 if name[0] == "Q" else 2
                assert found == 100 * (twins if name[-1] == "-" else 0) / 2
            else:  # before it: the query itself in its own list, and the twin if it comes first
                assert found == 100 * ((1 + (target == 2)) if name[0] == "Q" else 1) / 4


class TestWholeRun:
    QUERIES = (0, 3, 4, 7, 9, 12, 13)

    def expected(self, retrieval, corrected, seed):
        """What is measured of every query, each attacked alone, by hand."""
        model, images, labels = retrieval
        model.eval()
        with torch.no_grad():
            gallery = normalize(model(images)).tolist()
        with random_stream(seed, -1):
            lots = torch.rand(len(self.QUERIES), 9, dtype=torch.float64).tolist()
        classes = labels.tolist()
        found = {name: [] for name in SCORES}
        for own, lot in zip(self.QUERIES, lots, strict=True):
            for run, name in enumerate(RUNS):
                target = aim_by_loop(name, corrected, own, lot[run], gallery, classes)
                point = images[own]
                for _ in range(SMALL["steps"]):
                    point = point.detach().requires_grad_()
                    f = normalize(model(point[None]))[0]
                    loss = loss_by_loop(name, corrected, own, target, f, gallery, classes)
                    gradient = torch.zeros_like(point)
                    if isinstance(loss, torch.Tensor) and loss.requires_grad:
                        (gradient,) = torch.autograd.grad(loss, point)
                    change = point.detach() - SMALL["alpha"] * gradient.sign() - images[own]
                    point = (images[own] + change.clamp(-SMALL["eps"], SMALL["eps"])).clamp(0, 1)
                f = normalize(model(point[None]))[0].tolist()
                for score in ATTACK_OF[name].measures:
                    found[score].append(measure_by_loop(score, corrected, own, target, f, gallery, classes))
        model.train()
        return found

    def test_equals_attacks_by_hand(self, retrieval, corrected):
        version = "corrected" if corrected else "published"
        found = scores_of(retrieval, version=version, seed=3, batch_size=5, subset=self.QUERIES)
        expected = self.expected(retrieval, corrected, 3)
        assert {name: found.robust_flags[name].tolist() for name in SHARES} == {name: expected[name] for name in SHARES}
        means = {name: mean(values) * (100 if name in SHARES else 1) for name, values in expected.items()}
        assert found.scores == pytest.approx(means, abs=1e-9)
        assert found.ers == pytest.approx(ers(means))
        gallery = normalize(retrieval[0].eval()(retrieval[1])).tolist()
        clean = [recalled_by_loop(own, gallery[own], gallery, retrieval[2].tolist()) for own in self.QUERIES]
        assert found.clean_flags.tolist() == clean
        assert found.queries.tolist() == list(self.QUERIES)
        assert 0 < found.scores["LTM"] + found.scores["GTM"] < 200  # a batch in which something is at stake

    @pytest.mark.parametrize("version", VERSIONS)
    def test_does_not_depend_on_the_batch_size(self, retrieval, version):
        small, whole = (scores_of(retrieval, version=version, batch_size=size) for size in (3, 128))
        assert small.scores == pytest.approx(whole.scores)

    def test_attacks_work(self, retrieval):
        calm = scores_of(retrieval, eps=0.0, alpha=3 / 255, steps=32).scores
        harmed = scores_of(retrieval, eps=0.3, alpha=3 / 255, steps=32).scores
        better = {name for name in SCORES if normalised(harmed)[name] >= normalised(calm)[name]}
        assert better == set()

    def test_corrected_top_1_attacks_are_stronger(self):
        data = digits()
        images, labels = data.test_images[:400], data.test_labels[:400]
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        published, corrected = (
            robrank_scores(model, (images, labels), eps=0.05, version=version, subset=60).scores for version in VERSIONS
        )
        assert corrected["GTM"] < published["GTM"] - 20
        assert corrected["LTM"] < published["LTM"] - 20

    def test_never_leaves_the_ball_or_the_pixels(self, retrieval):
        model, images, labels = retrieval
        notes = Notes()
        model.register_forward_pre_hook(lambda module, inputs: notes.append(inputs[0].detach()))
        robrank_scores(model, (images, labels), **SMALL)
        seen = notes.taken()
        assert [len(seen.pop(0)) for _ in range(3)] == [1, 1, 1]  # whether the model runs, seeds, and has a gradient
        assert len(seen) == 1 + 9 * (SMALL["steps"] + 1)
        farthest = [(points - images).abs().max().item() for points in seen]
        assert max(farthest) == pytest.approx(SMALL["eps"])
        assert all(points.min() >= 0 and points.max() <= 1 for points in seen)
        assert farthest[0] == farthest[1] == 0  # no random start

    def test_normalisation_happens_within_the_model(self, retrieval):
        model, images, labels = retrieval
        mean_, std = (0.4,), (0.3,)
        pixels_in = nn.Sequential(Affine(1 / 0.3, -0.4 / 0.3), model)
        plain = robrank_scores(pixels_in, (images, labels), **SMALL)
        told = robrank_scores(model, (images, labels), **SMALL, normalization=(mean_, std))
        assert told.scores == pytest.approx(plain.scores)

    def test_same_seed_same_scores(self, retrieval):
        first, again, other = (scores_of(retrieval, subset=6, seed=seed) for seed in (0, 0, 1))
        assert first.scores == again.scores
        assert first.queries.tolist() == again.queries.tolist() != other.queries.tolist()
        assert first.scores["TMA"] != other.scores["TMA"]

    @pytest.mark.parametrize("fails", [False, True])
    def test_leaves_no_trace(self, retrieval, fails):
        model, images, labels = retrieval
        model[0].eval()
        model[1].weight.requires_grad_(False)
        model[4].bias.grad = torch.ones(4, dtype=torch.float64)
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()

        if fails:
            calls = count(1)
            model.register_forward_hook(lambda *_: 1 / 0 if next(calls) == 5 else None)
            with pytest.raises(ZeroDivisionError):
                robrank_scores(model, (images, labels), **SMALL)
        else:
            robrank_scores(model, (images, labels), **SMALL)
        assert [module.training for module in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
        assert [p.grad is None for p in model.parameters()] == [True, True, True, False]
        assert torch.equal(torch.get_rng_state(), state)
        assert not images.requires_grad

    def test_shows_progress(self, retrieval, capsys):
        quiet = scores_of(retrieval, batch_size=5)
        assert capsys.readouterr().err == ""
        assert scores_of(retrieval, batch_size=5, progress=True).scores == quiet.scores
        assert f"{9 * 14}/{9 * 14}" in capsys.readouterr().err

    def test_takes_a_data_set(self, retrieval):
        model, images, labels = retrieval
        pairs = ConcatDataset([TensorDataset(images, labels)])
        assert robrank_scores(model, pairs, **SMALL).scores == scores_of(retrieval).scores


class Affine(nn.Module):
    def __init__(self, scale, offset):
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, images):
        return self.scale * images + self.offset


class Contracted(nn.Module):
    """A model whose embeddings gather around one point, the closer the smaller ``size`` is."""

    def __init__(self, model, size):
        super().__init__()
        self.model, self.size = model, size
        self.point = torch.tensor([3.0, -1.0, 2.0, 1.0], dtype=torch.float64)

    def forward(self, images):
        return self.point + self.size * self.model(images)


class TestCollapse:
    def test_coinciding_embeddings_are_rewarded_as_published_only(self, retrieval):
        model, images, labels = retrieval
        published, corrected = (
            robrank_scores(Contracted(model, 0.0), (images, labels), **SMALL, version=version) for version in VERSIONS
        )
        assert normalised(published.scores)["ES:D"] == 100
        assert normalised(published.scores)["CA-"] == 100
        assert published.ers > 36.0  # above the best published model on CUB
        assert normalised(corrected.scores) == pytest.approx(dict.fromkeys(SCORES, 0.0), abs=1e-6)

    def test_contraction_raises_the_published_shift_score_only(self, retrieval):
        model, images, labels = retrieval
        for version, tolerance in (("published", None), ("corrected", 0.02)):
            shifts = [
                robrank_scores(Contracted(model, size), (images, labels), **SMALL, version=version).scores["ES:D"]
                for size in (0.1, 0.01, 0.001)
            ]
            if version == "published":
                assert all(later < earlier / 5 for earlier, later in pairwise(shifts))
            else:
                assert shifts[1:] == pytest.approx([shifts[0]] * 2, rel=tolerance)


class TestResult:
    def test_to_dict_is_json(self, retrieval):
        found = scores_of(retrieval, eps=77 / 255, subset=4, version="corrected", seed=7)
        told = json.loads(json.dumps(found.to_dict()))
        assert (told["eps"], told["alpha"], told["steps"]) == (77 / 255, 0.03, 3)
        assert (told["version"], told["seed"], told["num_queries"], told["left_out"]) == ("corrected", 7, 4, 0)
        assert told["scores"] == found.scores
        assert told["ers"] == pytest.approx(mean(told["normalised"].values())) == found.ers
        assert told["recall_at_1"] == pytest.approx(100 * mean(found.clean_flags.tolist()))

    def test_is_frozen(self, retrieval):
        found = scores_of(retrieval, subset=2)
        assert isinstance(found, RobRankScores)
        with pytest.raises(AttributeError):
            found.seed = 1

    def test_chosen_queries(self, retrieval):
        everyone = scores_of(retrieval)
        some = scores_of(retrieval, subset=[11, 2, 5])
        assert some.queries.tolist() == [11, 2, 5]
        for name in ("ES:R", "LTM", "GTM", "GTT"):  # nothing is drawn for these
            assert some.robust_flags[name].tolist() == everyone.robust_flags[name][[11, 2, 5]].tolist()

    def test_leaves_out_and_counts_queries_without_right_item(self, retrieval):
        model, images, labels = retrieval
        labels = labels.clone()
        labels[3] = 9
        found = robrank_scores(model, (images, labels), **SMALL, subset=[2, 3, 4])
        assert found.queries.tolist() == [2, 4]
        assert found.left_out == 1
        assert robrank_scores(model, (images, labels), **SMALL).left_out == 1


class TestNonsense:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            *(({"eps": eps}, f"eps={eps}; expected a number from 0 to 1") for eps in (8, -0.1, math.nan)),
            *(({"alpha": alpha}, f"alpha={alpha}; expected") for alpha in (0, 3)),
            *(({"steps": steps}, f"steps={steps}; expected a whole number from 1 on") for steps in (0, 1.5)),
            ({"version": "fixed"}, "version='fixed'"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"subset": 0}, "subset=0"),
            ({"subset": 15}, "1 to 14"),
            ({"subset": [14]}, "below 14"),
            ({"subset": [-1]}, "below 14"),
            ({"subset": []}, "one at least"),
            ({"subset": [0.5]}, "whole numbers"),
            ({"subset": "all"}, "subset='all'"),
        ],
    )
    def test_options(self, retrieval, change, message):
        with pytest.raises(InputError, match=message):
            scores_of(retrieval, **change)

    def test_images(self, retrieval):
        model, images, labels = retrieval
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            robrank_scores(model, (images * 255, labels), **SMALL)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.arange(13), "one whole number per image"),
            (torch.zeros(14).long(), "two or more"),
            (torch.arange(14), "another image"),
        ],
    )
    def test_labels(self, retrieval, labels, message):
        with pytest.raises(InputError, match=message):
            robrank_scores(retrieval[0], (retrieval[1], labels), **SMALL)

    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (lambda embeddings: embeddings / 0, "NaN"),
            (lambda embeddings: embeddings.unsqueeze(1), r"expected embeddings \(1, D\)"),
            (lambda embeddings: embeddings.detach(), "no gradient"),
        ],
    )
    def test_embeddings(self, retrieval, head, message):
        model, images, labels = retrieval
        with pytest.raises(InputError, match=message):
            robrank_scores(Headed(model, head), (images, labels), **SMALL)


class Headed(nn.Module):
    def __init__(self, model, head):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, images):
        return self.head(self.model(images))
