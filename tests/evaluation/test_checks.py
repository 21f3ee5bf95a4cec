from dataclasses import replace
from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import MultiSimilarityLoss
from query_batches import all_norms, images_of, length
from query_batches import bench_of as ready_task
from seed_paper import seed_paper_loss
from torch import nn
from torch.nn.functional import hardsigmoid, normalize

from pml_adversarial.cli.images import digits
from pml_adversarial.evaluation import checks, evaluate_robustness
from pml_adversarial.evaluation.attacks.gradients import classifier_attack
from pml_adversarial.evaluation.attacks.kinds import QueryAttack
from pml_adversarial.evaluation.checks import CHECKS, SAMPLE, QuerySample, run_checks
from pml_adversarial.evaluation.reports.report import Report
from pml_adversarial.evaluation.reports.results import AttackResult, decode_flags
from pml_adversarial.evaluation.retrieval.embedder import Embedder
from pml_adversarial.evaluation.retrieval.task import RetrievalTask
from pml_adversarial.evaluation.suites import quick

EPS = 0.08


class Front(nn.Module):
    """Something done to the pixels before an honest embedding."""

    def __init__(self, change=lambda x: x, after=lambda e: e, width=16):
        super().__init__()
        torch.manual_seed(7)
        self.change, self.after, self.linear = change, after, nn.Linear(width, 6)

    def forward(self, images):
        return self.after(self.linear(self.change(images).flatten(1)))


def cut_where(is_cut):
    """No gradient reaches the pixels of which ``is_cut(x)`` is true."""
    return lambda x: torch.where(is_cut(x), x.detach(), x)


def off_grid(width):
    return lambda x: (16 * x - (16 * x).round()).abs() > 16 * width


def reverse(x):
    """The same values, the opposite gradient."""
    return 2 * x.detach() - x


@pytest.fixture(scope="module")
def pictures():
    """80 images of four classes, drawn around four patterns, of 16 grey levels."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(80) % 4
    patterns = torch.rand(4, 1, 4, 4, generator=generator) * 0.6 + 0.2
    images = patterns[labels] + 0.07 * torch.randn(80, 1, 4, 4, generator=generator)
    return (images.clamp(0, 1) * 16).round() / 16, labels


def result(attack="margin", flags="", black_box=False, eps=EPS, shift=0.3, target="query"):
    return AttackResult(attack, target, black_box, eps, {"recall_at_1": 0.0}, shift, 1, 1, 0.0, flags)


def bench_of(model, images, norm="Linf", gallery=None):
    for parameter in model.eval().parameters():
        parameter.requires_grad_(False)
    task = RetrievalTask(Embedder(model), images, gallery, norm)
    task.embed.probe_gradient(task.queries[:1])
    with torch.no_grad():
        task.set_gallery(task.embed(task.items[:]))
        task.set_queries(task.rows(None), task.embed(task.queries[:]))
    return task


def clean_flags_of(task):
    """Which queries are right, by a plain loop."""
    with torch.no_grad():
        embeddings = normalize(task.embed(task.queries[:]).float())
    items, labels = task.gallery.embeddings, task.queries.labels
    flags = ""
    for i, query in enumerate(embeddings):
        others = [j for j in range(len(items)) if not (task.leaves_own_out and i == j)]
        nearest = max(others, key=lambda j: float(query @ items[j]))
        flags += "01"[int(task.items.labels[nearest] == labels[i])]
    return flags


def sample_of(model, images, results=None, seed=0, batch_size=128, **options):
    task = bench_of(model, images, **options)
    flags = clean_flags_of(task)
    results = [result(flags="0" * len(flags))] if results is None else results
    return QuerySample(task, torch.arange(len(flags)), decode_flags(flags), results, seed, batch_size)


def numbers(line):
    """The whole numbers of a line."""
    return [int(word) for word in line.replace(",", " ").replace(";", " ").split() if word.isdigit()]


BUDGETS = {"Linf": EPS, "L2": 0.3, "L1": 1.0, "L0": 2, "patch": 2}


def counted(model, images, norm):
    """A sample at a radius of the norm."""
    return sample_of(model, images, [result(flags="0" * 80, eps=BUDGETS[norm])], norm=norm)


class TestProbability:
    def test_ten_coins_alike_are_unlikely_and_nine_are_not(self):
        none, some = torch.zeros(12, dtype=torch.bool), torch.arange(12)
        assert checks.no_weaker(none, some < 9)
        assert not checks.no_weaker(none, some < 10)
        assert checks.no_weaker(some >= 10, some < 10)  # ten against two
        assert checks.no_weaker(some < 10, some < 10)


class TestQuerySample:
    def test_asks_queries_that_are_right(self, pictures):
        images, labels = pictures
        wrong_labels = labels.clone()
        wrong_labels[:20] = (labels[:20] + 1) % 4
        sample = sample_of(Front(), (images, wrong_labels))
        assert 0 < len(sample) <= SAMPLE
        flags = clean_flags_of(sample.task)
        assert "0" in flags
        assert all(flags[i] == "1" for i in sample.chosen.tolist())
        assert len(set(sample.chosen.tolist())) == len(sample)
        assert torch.equal(torch.cat([batch.images for batch in sample.batches]), images[sample.chosen])

    def test_sample_depends_on_the_seed_and_not_on_the_batch_size(self, pictures):
        first, same, other = (
            sample_of(Front(), pictures, seed=seed, batch_size=batch_size)
            for seed, batch_size in [(0, 128), (0, 7), (1, 7)]
        )
        assert torch.equal(first.chosen, same.chosen)
        assert not torch.equal(first.chosen, other.chosen)
        assert [len(batch) for batch in same.batches] == [7] * 9 + [1]

    def test_rows_are_those_that_were_evaluated(self, pictures):
        task = bench_of(Front(), pictures)
        rows = torch.arange(79, 59, -1)
        sample = QuerySample(task, rows, torch.ones(20, dtype=torch.bool), [result(flags="0" * 20)], 0, 128)
        assert torch.equal(sample.batches[0].images, pictures[0][rows])

    def test_eps_is_where_about_half_is_left(self, pictures):
        left = {0.01: 78, 0.02: 61, 0.03: 45, 0.04: 2}
        results = [result(flags="1" * n + "0" * (80 - n), eps=eps) for eps, n in left.items()]
        assert sample_of(Front(), pictures, results).eps == 0.03
        gallery = [replace(result, target="gallery") for result in results]
        assert sample_of(Front(), pictures, [*gallery, *results[:2]]).eps == 0.02

    @pytest.mark.parametrize(("flag", "expected"), [("1", 0.2), ("0", 0.1)])
    def test_of_radii_that_leave_as_many_it_is_the_one_nearer_to_half(self, pictures, flag, expected):
        results = [result(flags=flag * 80, eps=eps) for eps in (0.1, 0.2)]
        assert sample_of(Front(), pictures, results).eps == expected

    def test_robust_is_against_all_of_a_kind(self, pictures):
        results = [
            result("a", "1100" * 20),
            result("b", "1010" * 20),
            result("c", "0111" * 20, black_box=True),
            result("d", "0000" * 20, target="gallery"),
            result("a", "0000" * 20, eps=1.0),
        ]
        sample = sample_of(Front(), pictures, results)
        expected = {(): [False] * 4, (False,): [True, False, False, False], (True,): [False, True, True, True]}
        for kinds, flags in expected.items():
            assert sample.robust(EPS, *kinds)[:4].tolist() == flags


class TestStrength:
    """Is the attack as strong as it should be?"""

    def test_iterating(self, pictures):
        sample = sample_of(Front(), pictures)
        passed, line = checks.beats_a_single_step(sample)
        assert passed
        iterated, total, single, alone = numbers(line)[1:]
        assert total == len(sample)
        assert 10 < single <= iterated < total
        assert alone == 0

    def test_iterating_where_gradients_are_cut_off_the_grey_levels(self, pictures):
        passed, line = checks.beats_a_single_step(sample_of(Front(cut_where(off_grid(1e-6))), pictures))
        assert passed is False
        assert numbers(line)[-1] >= 10

    def test_one_step_is_the_fast_gradient_sign(self, pictures):
        sample = sample_of(Front(), pictures)
        batch = sample.batches[0]
        pixels = batch.images.clone().requires_grad_()
        batch.gallery.margin(batch.embed(pixels), batch.targets).sum().backward()
        expected = (batch.images + EPS * pixels.grad.sign()).clamp(0, 1)
        torch.testing.assert_close(checks.margin_attack(batch, EPS, 1, random_start=False), expected)

    @pytest.mark.parametrize(
        "check",
        [
            "iterating beats a single step",
            "attack beats noise",
            "more steps are no weaker",
            "larger eps is no weaker",
            "a longer run adds nothing",
            "black box adds nothing",
        ],
    )
    def test_where_nothing_is_broken_there_is_no_evidence(self, pictures, check):
        found = evaluate_robustness(Front(), pictures, eps=1e-5, attacks=quick(2, 1))
        assert found.worst_case(1e-5) == found.clean["recall_at_1"]
        (one,) = (made for made in found.checks if made.name == check)
        assert one.passed is None

    def test_noise(self, pictures):
        assert checks.beats_noise(sample_of(Front(), pictures)).passed
        results = [result(flags="0" * 80, eps=0.2)]
        passed, line = checks.beats_noise(sample_of(Front(torch.detach), pictures, results))
        assert passed is False
        assert numbers(line)[-1] >= 10

    @all_norms
    def test_noise_goes_to_the_border(self, pictures, norm):
        batch = sample_of(Front(), (pictures[0] * 0.6 + 0.2, pictures[1]), norm=norm).batches[0]
        eps = 2 if norm in ("L0", "patch") else 0.1
        step = checks.at_the_border(batch, eps) - batch.images
        assert length(step, norm).tolist() == pytest.approx([eps] * len(step), rel=1e-4)
        if norm in ("L1", "L0", "patch"):
            return
        if norm == "Linf":
            torch.testing.assert_close(step.abs(), torch.full_like(step, 0.1))
        else:
            assert step.abs().std() > 0.01

    def test_more_steps(self, pictures):
        sample = sample_of(Front(), pictures)
        assert checks.gains_by_steps(sample).passed
        sample.attacked = torch.zeros(len(sample), dtype=torch.bool)
        passed, line = checks.gains_by_steps(sample)
        assert passed is False
        assert numbers(line)[-1] == numbers(line)[-2] >= 10

    def test_larger_eps(self, pictures):
        passed, line = checks.gains_by_eps(sample_of(Front(), pictures))
        assert passed
        small, middle, large = (int(part.split()[-4]) for part in line.split(","))
        assert small < middle < large

    @pytest.mark.parametrize(("broken", "expected"), [((9, 0, 9), True), ((10, 0, 0), False), ((20, 30, 19), False)])
    def test_larger_eps_that_is_weaker(self, pictures, broken, expected, monkeypatch):
        sample = sample_of(Front(), pictures)
        runs = {eps: torch.arange(64) < count for eps, count in zip((EPS / 2, EPS, 2 * EPS), broken, strict=True)}
        monkeypatch.setattr(QuerySample, "broken", lambda self, eps, steps, stream: runs[eps])
        assert checks.gains_by_eps(sample).passed is expected

    def test_longer_run(self, pictures):
        task = bench_of(Front(), pictures)
        flags = clean_flags_of(task)
        sample = sample_of(Front(), pictures)
        broken = set(sample.chosen[sample.broken(EPS, 40, "by hand")].tolist())
        suite = "".join("0" if i in broken else mark for i, mark in enumerate(flags))
        passed, line = checks.has_converged(sample_of(Front(), pictures, [result(flags=suite)]))
        assert passed
        assert f"the suite: {len(broken)} of" in line
        passed, line = checks.has_converged(sample_of(Front(), pictures, [result(flags=flags)]))
        assert passed is False
        assert "the suite: 0 of" in line

    def test_chance(self, pictures):
        assert checks.falls_to_chance(sample_of(Front(), pictures)).passed
        passed, line = checks.falls_to_chance(sample_of(Front(torch.detach), pictures))
        assert passed is False
        assert "at eps 0.5; chance is 15.4" in line  # 19 of 79 others, 64 queries

    @pytest.mark.parametrize(("norm", "large"), [("L2", 2), ("L1", 8), ("L0", 16), ("patch", 4)])
    def test_chance_at_what_can_make_all_alike(self, pictures, norm, large):
        passed, line = checks.falls_to_chance(counted(Front(), pictures, norm))
        assert passed
        assert f"at eps {large};" in line
        assert checks.falls_to_chance(counted(Front(torch.detach), pictures, norm)).passed is False

    @pytest.mark.parametrize(
        ("norm", "eps", "expected"),
        [
            ("Linf", 0.08, (0.04, 0.08, 0.16)),
            ("Linf", 0.8, (0.4, 0.8, 1)),
            ("L2", 3.0, (1.5, 3, 4)),
            ("L1", 3.0, (1.5, 3, 6)),
            ("L0", 1, (1, 1, 2)),
            ("L0", 5, (2, 5, 10)),
            ("L0", 9, (4, 9, 16)),
            ("patch", 3, (1, 3, 4)),
        ],
    )
    def test_radii_around(self, pictures, norm, eps, expected):
        sample = sample_of(Front(), pictures, [result(flags="0" * 80, eps=eps)], norm=norm)
        assert sample.radii_around == expected
        assert checks.gains_by_eps(sample).passed

    def test_planted(self, pictures):
        sample = sample_of(Front(), pictures)
        passed, line = checks.finds_what_is_planted(sample)
        assert passed
        assert line.startswith(f"{len(sample)} of {len(sample)} ")
        assert checks.finds_what_is_planted(sample_of(Front(torch.detach), pictures)).passed is False

    def test_nothing_can_be_planted_where_the_model_is_flat(self, pictures):
        passed, line = checks.finds_what_is_planted(
            sample_of(Front(lambda x: (4 * x + 0.1).floor()), pictures, [result(flags="0" * 80, eps=0.01)])
        )
        assert passed is None
        assert line.startswith("only 0 of 64")

    def test_planted_items_are_there(self, pictures, monkeypatch):
        """The planted point itself, handed over as what the attack found, counts as a break of every query."""
        sample = sample_of(Front(), pictures)
        planted = []
        monkeypatch.setattr(
            checks, "at_the_border", lambda batch, eps: planted.append(batch.images + 0.01) or planted[-1]
        )
        monkeypatch.setattr(checks, "margin_attack", lambda batch, eps, steps: planted[-1])
        assert (checks._planted(sample.batches[0], EPS) == 1).all()
        monkeypatch.setattr(checks, "margin_attack", lambda batch, eps, steps: batch.images)
        assert (checks._planted(sample.batches[0], EPS) == 0).all()

    def test_directions_end_at_the_border_of_the_unit_ball(self):
        direction = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]])
        assert checks._directed(direction, "Linf").tolist() == [[[1, -1]], [[0, 0]]]
        torch.testing.assert_close(checks._directed(direction, "L2"), direction / 5)


class TestBlackBox:
    def ask(self, pictures, white, black):
        results = [result(flags=white), result("square", black, black_box=True)]
        return checks.black_box_adds_nothing(sample_of(Front(), pictures, results))

    def test_breaks_what_gradients_do_not(self, pictures):
        passed, line = self.ask(pictures, "1" * 70 + "0" * 10, "0" * 8 + "1" * 72)
        assert passed is False
        assert line.startswith("8 of 80 queries")

    def test_may_be_lucky_once(self, pictures):
        assert self.ask(pictures, "1" * 80, "0" + "1" * 79).passed

    def test_breaks_what_gradients_break(self, pictures):
        assert self.ask(pictures, "0" * 40 + "1" * 40, "0" * 40 + "1" * 40).passed

    def test_breaks_the_few_that_are_left(self, pictures):
        assert self.ask(pictures, "1" * 3 + "0" * 77, "0" * 80).passed

    def test_worst_radius_counts(self, pictures):
        results = [
            result(flags="1" * 80),
            result("square", "0" * 20 + "1" * 60, black_box=True),
            result(flags="0" * 80, eps=0.2),
            result("square", "0" * 80, black_box=True, eps=0.2),
        ]
        passed, line = checks.black_box_adds_nothing(sample_of(Front(), pictures, results))
        assert passed is False
        assert "20 of 80" in line
        assert "0.08" in line

    def test_other_attacks_are_not_asked(self, pictures):
        results = [result(flags="0" * 80, black_box=True), result("promote", "0" * 80, target="gallery")]
        passed, line = checks.black_box_adds_nothing(sample_of(Front(), pictures, results))
        assert passed is None
        assert "white-box" in line


class TestNoBlackBox:
    """A suite without a black-box attack: the check makes one, on queries of the sample that the suite left."""

    @pytest.fixture
    def pictures(self):
        return images_of(80, spread=0.1)

    def ask(self, front, pictures, flags, norm="Linf", eps=0.1):
        model = Front(front, width=36).eval().requires_grad_(False)
        task = ready_task(model, pictures, norm=norm)
        sample = QuerySample(task, torch.arange(80), decode_flags("1" * 80), [result(flags=flags, eps=eps)], 0, 23)
        before = task.embed.forward_passes, task.embed.backward_passes
        verdict = checks.black_box_adds_nothing(sample)
        left = sum(flags[row] == "1" for row in sample.chosen.tolist())
        assert task.embed.backward_passes == before[1]
        assert task.embed.forward_passes - before[0] <= left * (checks.SEARCH + 1)
        return verdict, left

    @pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5)])
    def test_finds_what_the_suite_left(self, pictures, norm, eps):
        (passed, line), left = self.ask(torch.detach, pictures, "1" * 60 + "0" * 20, norm, eps)
        assert passed is False
        assert 5 < numbers(line)[0] <= left < 64 == numbers(line)[1]
        assert "Square with 200 passes" in line

    def test_what_the_suite_broke_is_not_asked_again(self, pictures):
        assert self.ask(torch.detach, pictures, "0" * 80)[0].passed
        assert self.ask(torch.detach, pictures, "1" * 3 + "0" * 77)[0].passed

    def test_honest(self, pictures):
        model = Front(width=36).eval().requires_grad_(False)
        batch = ready_task(model, pictures).batch(torch.arange(80))
        flags = "".join("10"[int(hit)] for hit in checks.is_adversarial(batch, checks.margin_attack(batch, 0.02, 40)))
        (passed, line), left = self.ask(lambda x: x, pictures, flags, eps=0.02)
        assert passed
        assert left > 20
        assert numbers(line)[0] <= 2


class TestGradients:
    @all_norms
    def test_honest(self, pictures, norm):
        sample = counted(Front(), pictures, norm)
        passed, line = checks.has_gradients(sample)
        assert passed
        assert line.startswith("0 of 64 queries have no gradient; 0 are blind")
        assert line.endswith("0 % of pixels have no gradient")
        passed, line = checks.gradients_are_true(sample)
        assert passed
        assert line.endswith("64 of 64 queries")

    @pytest.mark.parametrize(
        "front",
        [
            torch.detach,
            lambda x: (16 * x).round() / 16,
            lambda x: x + 0 * (0 * x).sqrt(),
            lambda x: (1e4 * x).tanh() * x.detach(),
        ],
        ids=["detached", "rounded", "nan", "saturated"],
    )
    def test_none(self, pictures, front):
        passed, line = checks.has_gradients(sample_of(Front(front), (pictures[0].clamp(0.1, 0.9), pictures[1])))
        assert passed is False
        assert line.startswith("64 of 64 queries have no gradient")

    @pytest.mark.parametrize(("count", "expected"), [(4, True), (5, False)])
    def test_none_of_some_queries(self, pictures, count, expected):
        sample = sample_of(Front(), pictures)
        marked = sample.batches[0].images[:count]

        def near_flagged(x):
            return (x - marked.unsqueeze(1)).abs().amax((2, 3, 4)).amin(0).reshape(-1, 1, 1, 1) < 1.01 * EPS

        passed, line = checks.has_gradients(sample_of(Front(cut_where(near_flagged)), pictures))
        assert passed is expected
        assert line.startswith(f"{count} of 64 queries have no gradient")

    def test_blind_to_most_pixels(self, pictures):
        passed, line = checks.has_gradients(
            sample_of(Front(cut_where(lambda x: torch.arange(16).view(4, 4) % 4 > 0)), pictures)
        )
        assert passed is False
        assert line.startswith("0 of 64 queries have no gradient")
        assert line.endswith("75 % of pixels have no gradient")

    @pytest.mark.parametrize(("cut", "expected"), [(6, True), (10, False)])
    def test_blind_means_to_more_than_half(self, pictures, cut, expected):
        front = Front(cut_where(lambda x: torch.arange(16).view(4, 4) < cut))
        front.linear = nn.Identity()  # all pixels matter alike
        passed, line = checks.has_gradients(sample_of(front, pictures))
        near, far = int(line.split("; ")[1].split()[0]), int(line.split(", ")[1].split()[0])
        assert passed is expected
        assert (near < 4 and far < 20) if expected else (near > 60 and far > 44)

    def test_pixels_that_do_not_matter_need_none(self, pictures):
        passed, line = checks.has_gradients(
            sample_of(Front(lambda x: x * (torch.arange(16).view(4, 4) % 4 > 1)), pictures)
        )
        assert passed
        assert line.endswith("50 % of pixels have no gradient")

    def test_blind_only_to_large_noise(self, pictures):
        steep = Front(lambda x: hardsigmoid(30 * (x - 0.5)))
        passed, line = checks.has_gradients(sample_of(steep, pictures, [result(flags="0" * 80, eps=0.01)]))
        assert passed is False
        assert "0 of 64 queries have no gradient; 0 are blind to noise of eps 0.01" in line

    def test_blind_only_to_small_noise(self, pictures):
        """Every other pixel matters by its small and cut-off distance from a grey level, the others by their value."""
        every_other = torch.arange(16).view(4, 4) % 2 > 0
        front = Front(lambda x: torch.where(every_other, 8 * (x - (16 * x).round() / 16).detach(), x))
        task = bench_of(front, pictures)
        sample = QuerySample(task, torch.arange(80), decode_flags("1" * 80), [result(flags="0" * 80, eps=0.01)], 0, 128)
        passed, line = checks.has_gradients(sample)
        assert passed is False
        assert ", 0 to noise of 0.5; 50 % of pixels have no gradient" in line

    def test_opposite(self, pictures):
        passed, line = checks.gradients_are_true(sample_of(Front(reverse), pictures))
        assert passed is False
        assert line.endswith(" 0 of 64 queries")

    def test_opposite_off_the_grey_levels(self, pictures):
        front = Front(lambda x: torch.where(off_grid(1e-6)(x), reverse(x), x))
        assert checks.gradients_are_true(sample_of(front, pictures)).passed is False

    @pytest.mark.parametrize(
        ("norm", "eps", "height", "waves"),
        [
            ("Linf", 0.08, 0.01, 1000),
            ("L2", 0.3, 0.005, 600),
            ("L1", 1.0, 0.01, 1000),
            ("L0", 2, 0.01, 1000),
            ("patch", 2, 0.01, 1000),
        ],
    )
    def test_of_ripples(self, pictures, norm, eps, height, waves):
        """In l2, a step along the gradient itself would be made of the few pixels in which it is steep and true."""
        rippled = Front(lambda x: x + height * torch.sin(waves * x))
        results = [result(flags="0" * 80, eps=eps)]
        assert checks.gradients_are_true(sample_of(rippled, pictures, results, norm=norm)).passed is False

    def test_that_are_true_of_large_steps_alone(self, pictures):
        """A rising staircase whose stairs fall, with the gradient of a ramp."""
        stairs = Front(lambda x: x + 2 * ((50 * x).round() / 50 - x).detach())
        passed, line = checks.gradients_are_true(sample_of(stairs, pictures))
        assert passed is False
        assert line.startswith("a step of 0.0013 ")

    def test_not_asked_where_steps_change_nothing(self, pictures):
        passed, line = checks.gradients_are_true(sample_of(Front(torch.detach), pictures))
        assert passed is None
        assert "change nothing" in line

    def test_of_a_straight_through_rounding_are_true(self, pictures):
        straight = Front(lambda x: x + ((255 * x).round() / 255 - x).detach())
        assert checks.gradients_are_true(sample_of(straight, pictures)).passed

    def test_of_a_random_model_are_those_of_one_draw(self, pictures):
        noisy = Front(lambda x: x + 0.1 * torch.randn_like(x))
        sample = sample_of(noisy, pictures)
        assert checks.gradients_are_true(sample).passed
        assert checks.has_gradients(sample).passed


class TestAnswers:
    def test_honest(self, pictures):
        passed, line = checks.answers_alike(sample_of(Front(), pictures))
        assert passed
        assert line.startswith("embeddings differ by up to 0 in a second call")

    def test_random(self, pictures):
        sample = sample_of(Front(lambda x: x + 0.02 * torch.randn_like(x)), pictures)
        assert checks.answers_alike(sample).passed is False

    def test_random_in_large_batches(self, pictures):
        sample = sample_of(Front(after=lambda e: e + 0.1 * (len(e) > 40) * torch.randn_like(e)), pictures)
        assert checks.answers_alike(sample).passed is False

    def test_rounding_is_not_random(self, pictures):
        sample = sample_of(Front(after=lambda e: e + 1e-6 * torch.randn_like(e)), pictures)
        passed, line = checks.answers_alike(sample)
        assert passed
        assert "up to 0 when" not in line

    def test_depends_on_the_batch(self, pictures):
        sample = sample_of(Front(after=lambda e: e - e.mean(0)), pictures)
        passed, line = checks.answers_alike(sample)
        assert passed is False
        assert "up to 0 in a second call" in line

    def test_coarse_types_round(self, pictures):
        model = Front(after=lambda e: (e * (1 + 1e-4 * torch.rand(len(e), 1))).bfloat16())
        assert checks.answers_alike(sample_of(model, pictures)).passed

    def test_near_one_another_is_not_collapsed(self, pictures):
        near = Front(after=lambda e: e + 30 * torch.ones(6))
        sample = sample_of(near, pictures)
        similarity = sample.task.gallery.embeddings @ sample.task.gallery.embeddings.T
        assert similarity.min() > 0.99
        passed, line = checks.is_not_collapsed(sample)
        assert passed
        assert line.startswith("rounding may decide 0 of 64")

    @pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4])
    def test_collapsed(self, pictures, scale):
        """Among them margins above 0, but below the rounding of cosines."""
        sample = sample_of(Front(after=lambda e: scale * e + torch.ones(6)), pictures)
        assert checks.is_not_collapsed(sample).passed is False

    @pytest.mark.parametrize(("offset", "expected"), [(0, True), (80, False)])
    def test_collapsed_by_a_coarse_type(self, pictures, offset, expected):
        """Margins are above the rounding of cosines, but below that of embeddings."""
        sample = sample_of(Front(after=lambda e: (e + offset).bfloat16()), pictures)
        passed, line = checks.is_not_collapsed(sample)
        assert passed is expected
        assert float(line.split()[-1]) > 2e-6

    def test_attacks_that_do_nothing(self, pictures):
        results = [
            result(flags="0" * 80, shift=0.0),
            result("b", "0" * 80, shift=1e-3),
            result(flags="0" * 80, eps=0.01),
        ]
        assert checks.moves_embeddings(sample_of(Front(), pictures, results)).passed
        assert checks.moves_embeddings(sample_of(Front(), pictures, [results[0], results[2]])).passed is False


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(checks, "STEPS", 12)


class TestAll:
    def run(self, model, pictures, seed=0, batch_size=128, results=None, **options):
        task = bench_of(model, pictures, **options)
        flags = clean_flags_of(task)
        results = [result(flags="0" * len(flags))] if results is None else results
        return run_checks(task, torch.arange(len(flags)), decode_flags(flags), results, seed, batch_size), task

    @all_norms
    def test_honest_model_is_not_flagged(self, pictures, norm):
        found, _ = self.run(Front(), pictures, norm=norm, results=[result(flags="0" * 80, eps=BUDGETS[norm])])
        assert [check.name for check in found] == list(CHECKS)
        assert [check.name for check in found if check.passed is False] == []
        assert all(check.passed for check in found)

    def test_lines_are_single_and_tell_numbers(self, pictures, few_steps):
        for front in (lambda x: x, torch.detach):
            for check in self.run(Front(front), pictures)[0]:
                assert check.message
                assert "\n" not in check.message
                assert len(check.message) < 160
                assert any(sign.isdigit() for sign in check.message) or check.passed is None

    def test_same_seed_same_answers(self, pictures, few_steps):
        first, again, other = (self.run(Front(), pictures, seed=seed)[0] for seed in (0, 0, 5))
        assert first == again
        assert first != other

    def test_global_random_numbers_are_left_alone(self, pictures, few_steps):
        task = bench_of(Front(), pictures)
        flags, state = clean_flags_of(task), torch.get_rng_state()
        run_checks(task, torch.arange(80), decode_flags(flags), [result(flags="0" * 80)], 0, 128)
        assert torch.equal(torch.get_rng_state(), state)

    def test_cost_is_bounded(self, pictures):
        images, labels = (part.repeat(5, *[1] * (part.ndim - 1)) for part in pictures)
        task = bench_of(Front(), (images + 0.01 * torch.rand_like(images) * (images < 0.9), labels))
        before = task.embed.forward_passes, task.embed.backward_passes
        run_checks(task, torch.arange(400), decode_flags("1" * 400), [result(flags="0" * 400)], 0, 128)
        assert task.embed.forward_passes - before[0] <= 310 * SAMPLE
        assert task.embed.backward_passes - before[1] <= 260 * SAMPLE

    def test_small_batches(self, pictures, few_steps):
        found, _ = self.run(Front(), pictures, batch_size=23)
        assert [check.name for check in found if check.passed is False] == []

    def test_separate_gallery(self, pictures, few_steps):
        images, labels = pictures
        found, _ = self.run(Front(), (images[:40], labels[:40]), gallery=(images[40:], labels[40:]))
        assert [check.name for check in found if check.passed is False] == []
        assert "chance is 10.0" in next(
            check.message for check in found if check.name.startswith("falls")
        )  # a quarter of 40

    def test_too_few_queries(self, pictures):
        task = bench_of(Front(), pictures)
        found = run_checks(task, torch.arange(80), decode_flags("1" * 9 + "0" * 71), [result(flags="0" * 80)], 0, 128)
        skipped = [check for check in found if check.passed is None]
        assert {check.message for check in skipped} == {"only 9 queries are right without attack; 10 are needed"}
        of_any = ["same answer twice", "not collapsed", "attacks move embeddings", "no copies in the gallery"]
        assert [check.name for check in found if check.passed is not None] == of_any

    def test_no_results(self, pictures):
        assert run_checks(bench_of(Front(), pictures), torch.arange(80), decode_flags("1" * 80), [], 0, 128) == ()

    def test_in_a_report(self, pictures, few_steps, tmp_path):
        options = {"eps": (0.04, EPS), "attacks": quick(steps=10, restarts=1)}
        report = evaluate_robustness(Front(torch.detach), pictures, **options)
        assert len(report.checks) == len(CHECKS)
        assert "gradients are there" in [check.name for check in report.flagged]
        assert "[FLAG] gradients are there: 64 of 64 queries have no gradient" in str(report)
        assert "[FLAG] black box adds nothing" in str(report)
        report.save_json(tmp_path / "report.json")
        assert Report.load_json(tmp_path / "report.json").checks == report.checks
        assert evaluate_robustness(Front(), pictures, checks=False, **options).checks == ()


# Trained models.


def conv(batchnorm=False):
    layers = [[nn.Conv2d(1, 16, 3, padding=1)], [nn.Conv2d(16, 32, 3, padding=1, stride=2)]]
    norms = [[nn.BatchNorm2d(16)], [nn.BatchNorm2d(32)]] if batchnorm else [[], []]
    return nn.Sequential(
        *layers[0], *norms[0], nn.ReLU(), *layers[1], *norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(512, 64)
    )


def smooth():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.Tanh(),
        nn.Linear(64, 16),
    )


def train(model, adversarial=False, steps=200):
    data, loss = digits(), MultiSimilarityLoss(alpha=2, beta=40, base=0.5)
    if adversarial:
        attack = partial(torchattacks.PGD, eps=0.2, alpha=0.1, steps=4)
        loss = seed_paper_loss(loss, model, attack=attack, perturb="all", warmup=steps // 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randperm(len(data.train_images))[:112]
        value = loss(model(data.train_images[rows]), data.train_labels[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(1)
    return train(conv())


class Masked(nn.Module):
    """A trained model with something before or after it that hides its gradients."""

    def __init__(self, model, before=lambda x: x, after=lambda e: e):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images):
        return self.after(self.model(self.before(images)))


MASKS = {
    "hard sigmoid": ({"before": lambda x: hardsigmoid(50 * (x - 0.5))}, "gradients are there"),
    "noise": ({"before": lambda x: x + 0.05 * torch.randn_like(x)}, "same answer twice"),
    "quantiser": ({"before": lambda x: (3 * x).round() / 3}, "black box adds nothing"),
    "saturated": ({"after": lambda e: torch.tanh(1e6 * e)}, "planted examples are found"),
    "ripples": ({"before": lambda x: x + 0.02 * torch.sin(500 * x)}, "gradients are true"),
    "half detached": ({"before": cut_where(lambda x: torch.arange(8) % 2 > 0)}, "gradients are there"),
    "detached": ({"before": torch.detach}, "falls to chance at a large eps"),
}
"""What hides gradients, and a check that says so."""

HONEST = {
    "adversarial": (conv, True),
    "batchnorm": (partial(conv, batchnorm=True), False),
    "smooth": (smooth, False),
}


TRAINED = {"L2": 0.5, "L1": 1.0, "L0": 2, "patch": 2}


def report_in(model, norm):
    data = digits()
    queries = data.test_images[:120], data.test_labels[:120]
    return evaluate_robustness(model, queries, eps=TRAINED[norm], norm=norm, attacks=quick(20, 2))


def report_of(model, seed=0):
    data = digits()
    square = QueryAttack(
        "square", classifier_attack(partial(torchattacks.Square, n_queries=200)), black_box=True, only_robust=True
    )
    queries = data.test_images[:120], data.test_labels[:120]
    return evaluate_robustness(model, queries, eps=(0.06, 0.1), attacks=(*quick(20, 2), square), seed=seed)


@pytest.mark.slow
class TestTrained:
    @pytest.mark.parametrize("mask", MASKS)
    def test_masked_model_is_flagged(self, plain, mask):
        how, expected = MASKS[mask]
        report = report_of(Masked(plain, **how))
        assert report.clean["recall_at_1"] > 0.5
        assert expected in [check.name for check in report.flagged]

    @pytest.mark.parametrize("seed", range(2))
    def test_plain_model_is_not_flagged(self, plain, seed):
        report = report_of(plain, seed)
        assert report.flagged == ()
        assert all(check.passed for check in report.checks)

    @pytest.mark.parametrize("kind", HONEST)
    def test_other_honest_model_is_not_flagged(self, kind):
        make, adversarial = HONEST[kind]
        torch.manual_seed(2)
        report = report_of(train(make(), adversarial))
        assert report.flagged == ()
        assert report.worst_case(0.06) > (0.4 if adversarial else 0)

    @pytest.mark.parametrize("norm", TRAINED)
    @pytest.mark.parametrize("mask", ["detached", "saturated", "ripples", "noise", "half detached"])
    def test_masked_model_is_flagged_in_every_norm(self, plain, mask, norm):
        how, expected = MASKS[mask]
        assert expected in [check.name for check in report_in(Masked(plain, **how), norm).flagged]

    @pytest.mark.parametrize("norm", TRAINED)
    def test_plain_model_is_not_flagged_in_any_norm(self, plain, norm):
        assert report_in(plain, norm).flagged == ()
