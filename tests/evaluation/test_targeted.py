"""Targeted attacks, recomputed from scratch: which queries find an item of the class that the attacker chose."""

import itertools
import json
import math

import by_loops
import pytest
import torch
from query_batches import RADIUS, Made, bench_of, both_norms, embedded, images_of, network
from torch import nn

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import TargetedReport, evaluate_targeted
from pml_adversarial.evaluation.reports.binomial import rate_interval
from pml_adversarial.evaluation.targeted import lead_score

TIE = 1e-6
EPS = 0.05


def evaluated(model=None, queries=None, gallery=None, **options):
    options = {"target": 2, "eps": EPS, "steps": 6, "restarts": 1, "square": 0, "k": 1, "batch_size": 7, **options}
    return evaluate_targeted(network() if model is None else model, queries or images_of(), gallery, **options)


def found_by_loops(query, target, embeddings, labels, k, never=()):
    """Whether an item of the target is among the first k, the target's before equal ones."""
    found = [(by_loops.cosine(query, embeddings[j]), j) for j in range(len(embeddings)) if j not in never]
    nearest = max(value for value, j in found if int(labels[j]) == target)
    ahead = [j for value, j in found if int(labels[j]) != target and value > nearest + TIE]
    return len(ahead) < k


def flags_by_loops(model, images, rows, targets, gallery, k, own=True):
    items, labels = embedded(model, gallery[0]), gallery[1]
    queries = embedded(model, images)
    return "".join(
        "01"[found_by_loops(queries[i], t, items, labels, k, (i,) if own else ())]
        for i, t in zip(rows, targets, strict=True)
    )


class TestWithoutAttack:
    @pytest.mark.parametrize("separate", [False, True])
    def test_by_loops(self, separate):
        model, (images, labels) = network(), images_of()
        gallery = images_of(30, seed=1) if separate else (images, labels)
        report = evaluated(model, gallery=gallery if separate else None, k=(1, 3, 5, 40))
        rows = [i for i in range(24) if labels[i] != 2]
        assert report.queries == tuple(rows)
        assert (report.num_queries, report.left_out, report.targets) == (18, 6, (2,) * 18)
        for k in (1, 3, 5, 40):
            expected = flags_by_loops(model, images, rows, report.targets, gallery, k, own=not separate)
            assert report.flags[0.0][k] == expected
            assert report.success(0.0, k) == expected.count("1") / 18
        assert 0 < report.success(k=5) < report.success(k=40) == 1

    def test_a_target_for_each_query_by_loops(self):
        model, (images, labels) = network(), images_of()
        target = (labels + 1 + torch.arange(24) % 3) % 4
        rows = [20, 3, 7, 11, 0]
        report = evaluated(model, target=target, subset=rows, k=(1, 6))
        assert report.targets == tuple(target[rows].tolist())
        for k in (1, 6):
            assert report.flags[0.0][k] == flags_by_loops(model, images, rows, report.targets, (images, labels), k)

    def test_a_tie_is_a_success(self):
        model = Made(lambda x: torch.ones(len(x), 3) + 0 * x.flatten(1).sum(1, keepdim=True))
        assert evaluated(model).success(0.0) == 1

    def test_ignored_items_are_not_found(self):
        model, (images, labels) = network(), images_of()
        ignore = torch.zeros(24, 24, dtype=torch.bool)
        ignore[:, ::3] = True
        report = evaluated(model, ignore=ignore, k=(1, 4))
        items = embedded(model, images)
        for k in (1, 4):
            expected = [found_by_loops(items[i], 2, items, labels, k, {i, *range(0, 24, 3)}) for i in report.queries]
            assert report.flags[0.0][k] == "".join("01"[hit] for hit in expected)

    def test_items_that_are_right_for_a_query_are_no_target_of_it(self):
        """Relevance is given; then labels do not say what is right, and other relevant items are ordinary ones."""
        model, (images, labels) = network(), images_of()
        relevant = (labels.unsqueeze(1) + 1) % 4 == labels  # a query of class 1 is to find items of class 2
        report = evaluated(model, relevant=relevant, k=(1, 4))
        rows = [i for i in range(24) if labels[i] != 1]
        assert report.queries == tuple(rows)
        for k in (1, 4):
            assert report.flags[0.0][k] == flags_by_loops(model, images, rows, [2] * 18, (images, labels), k)


class TestAttack:
    @both_norms
    @pytest.mark.parametrize("k", [1, 4])
    def test_score_is_the_lead_by_loops_and_has_its_gradient(self, norm, k):
        batch = bench_of(network(), images_of(), norm=norm).batch(torch.arange(24))
        moved = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
        found = lead_score(batch, 0, k=k)(moved)
        items, labels = batch.gallery.embeddings, batch.gallery.labels
        for i in range(24):
            near = by_loops.similarities(moved[i], i, items)
            right = max(value for j, value in near.items() if labels[j] == labels[i])
            others = sorted((value for j, value in near.items() if labels[j] != labels[i]), reverse=True)
            assert found[i].item() == pytest.approx(right - others[k - 1] + TIE, abs=3e-6)
        batch.gallery.embeddings = items.double()
        assert torch.autograd.gradcheck(lead_score(batch, 0, k=k), moved.double().requires_grad_())

    @both_norms
    def test_reaches_more_with_a_larger_radius_and_more_items(self, norm):
        radii = tuple(RADIUS[norm] * factor for factor in (0.5, 1, 3))
        report = evaluated(eps=radii, norm=norm, k=(1, 3, 5), steps=10)
        shares = [[report.success(eps, k) for k in (1, 3, 5)] for eps in (0.0, *radii)]
        for now in shares:
            assert now == sorted(now)
        for before, now in itertools.pairwise(shares):
            assert all(a <= b for a, b in zip(before, now, strict=True))
        assert shares[0][0] < shares[2][0] < shares[3][0]

    @both_norms
    def test_what_succeeds_does_so_by_loops_within_the_radius(self, norm):
        """The images that the model was given last are those that are ranked."""
        model, (images, labels) = network().eval(), images_of()
        seen, eps = [], RADIUS[norm]

        def watched(x):
            seen.append(x.detach().clone())
            return model(x)

        report = evaluated(watched, norm=norm, eps=eps, k=3, steps=8, batch_size=24)
        attacked = seen[-1]
        left = [n for n, hit in enumerate(report.flags[0.0][3]) if hit == "0"]
        assert len(attacked) == len(left) > 5
        items = embedded(model, images)
        reached = embedded(model, attacked)
        for image, embedding, number in zip(attacked, reached, left, strict=True):
            change = (image - images[report.queries[number]]).flatten()
            assert (change.abs().max() if norm == "Linf" else change.norm()) <= eps + 1e-6
            hit = found_by_loops(embedding, 2, items, labels, 3, (report.queries[number],))
            assert report.flags[eps][3][number] == "01"[hit]
        assert "1" in {report.flags[eps][3][number] for number in left}

    def test_restarts_add_up(self):
        once, thrice = (evaluated(steps=2, restarts=restarts, eps=0.08) for restarts in (1, 3))
        pairs = list(zip(once.flags[0.08][1], thrice.flags[0.08][1], strict=True))
        assert all(a <= b for a, b in pairs)
        assert any(a < b for a, b in pairs)

    def test_square_reaches_what_gradients_do_not_and_says_so(self):
        model = network().eval()
        masked = Made(lambda x: model(x.detach()) + 0 * x.flatten(1).sum(1, keepdim=True))
        without, with_square = (evaluated(masked, square=square, eps=0.1) for square in (0, 150))
        assert without.success(0.1) < with_square.success(0.1)
        assert without.notes == ()
        alone = round(18 * (with_square.success(0.1) - without.success(0.1)))
        assert f"{alone} of 18 queries reach their target (top 1, eps 0.1) only by Square" in with_square.notes[0]
        assert evaluated(square=150, eps=0.1).notes == ()

    def test_a_model_without_gradient(self):
        model = network().eval()
        report = evaluated(lambda x: torch.from_numpy(model(x).detach().numpy()), square=150, eps=0.1)
        assert report.success(0.1) > report.success(0.0)

    def test_batches_do_not_matter_without_attack_and_a_seed_fixes_the_attack(self):
        first, again, other = (evaluated(seed=seed, k=(1, 5)) for seed in (0, 0, 1))
        for report in (first, again):
            del report.provenance["time"]
        assert first.to_dict() == again.to_dict()
        assert first.flags[0.0] == other.flags[0.0] == evaluated(batch_size=100, k=(1, 5)).flags[0.0]

    def test_model_and_random_numbers_are_left_alone(self):
        model, state = network(), torch.get_rng_state()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        evaluated(model)
        assert model.training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TestBruteForce:
    """Images of three pixels: all points of a fine grid of the ball are tried."""

    @pytest.mark.parametrize("seed", range(3))
    def test_reaches_what_can_be_reached(self, seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
        generator = torch.Generator().manual_seed(seed)
        images, labels = torch.rand(20, 1, 1, 3, generator=generator) * 0.8 + 0.1, torch.arange(20) % 4
        gallery = torch.rand(12, 1, 1, 3, generator=generator), torch.arange(12) % 4
        eps, ks = 0.15, (1, 3)
        report = evaluate_targeted(
            model, (images, labels), gallery, target=(labels + 1) % 4, eps=eps, k=ks, steps=30, restarts=3
        )
        axis = torch.linspace(-eps, eps, 21)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 1, 1, 3)
        with torch.no_grad():
            items = nn.functional.normalize(model(gallery[0]))
            for i in range(20):
                near = nn.functional.normalize(model((images[i] + grid).clamp(0, 1))) @ items.T
                is_target = gallery[1] == (labels[i] + 1) % 4
                nearest = near[:, is_target].amax(1)
                for k in ks:
                    other = near[:, ~is_target].topk(k).values[:, -1]
                    lead = float((nearest - other).max())
                    if abs(lead) > 2e-3:  # else a point between those of the grid may decide
                        assert report.flags[eps][k][i] == "01"[lead > 0]
        assert report.success(0.0, 1) < report.success(eps, 1) > report.success(0.0, 3) > 0


class TestReport:
    def test_interval_is_clopper_pearson(self):
        report = evaluated(k=(1, 5))
        for k in (1, 5):
            count = report.flags[EPS][k].count("1")
            assert report.interval(EPS, k) == rate_interval(count, 18)
            low, high = report.interval(EPS, k)
            tails = [
                sum(math.comb(18, j) * p**j * (1 - p) ** (18 - j) for j in counts)
                for p, counts in ((low, range(count, 19)), (high, range(count + 1)))
            ]
            assert all(
                tail == pytest.approx(0.025, abs=1e-6) or p in (0, 1)
                for tail, p in zip(tails, (low, high), strict=True)
            )

    def test_table_shows_all_shares(self):
        report = evaluated(eps=(0.02, 0.1), k=(1, 5))
        lines = str(report).splitlines()
        for line, eps in zip(lines[2:5], (0.0, 0.02, 0.1), strict=True):
            for k in (1, 5):
                assert f" {100 * report.success(eps, k):.1f} [" in line
        assert "18 queries (6 left out), 1 target(s), 24 items" in lines[6]

    def test_json(self, tmp_path):
        report = evaluated()
        report.save_json(tmp_path / "report.json")
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["flags"] == {str(eps): {"1": flags[1]} for eps, flags in report.flags.items()}
        assert found["settings"]["square"] == 0
        again = TargetedReport.load_json(tmp_path / "report.json")
        assert vars(again) == vars(report)
        assert str(again) == str(report)

    def test_passes_are_counted(self):
        report = evaluated(steps=4, restarts=2)
        left = report.flags[0.0][1].count("0")
        assert 9 * left + left < report.passes[EPS] <= 2 * (2 * 4 + 1 + 1) * left

    @pytest.mark.parametrize(("eps", "k"), [(EPS, 2), (0.3, 1)])
    def test_what_was_not_measured(self, eps, k):
        with pytest.raises(InputError, match=r"choose k of 1, eps of 0, 0.05"):
            evaluated().success(eps, k)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target": 9}, r"target holds \[9\], which are no labels of the gallery"),
            ({"target": [2, 1]}, "2 labels for 24 queries; expected one, or one for each query"),
            ({"target": 1.5}, "expected whole numbers|a label"),
            ({"target": "cat"}, "expected whole numbers|a label"),
            ({"target": True}, "expected whole numbers|a label"),
            ({"target": [2] * 24}, r"are right for the queries \[2, 6, 10, 14, 18, 22\]"),
            ({"subset": [2, 6]}, "None of 2 queries can be led to its target"),
            ({"k": 0}, "expected one or more whole numbers from 1 on"),
            ({"k": ()}, "expected one or more whole numbers from 1 on"),
            ({"k": 1.5}, "whole numbers"),
            ({"steps": 0}, "steps=0; expected"),
            ({"restarts": 0}, "restarts=0; expected"),
            ({"square": -1}, "square=-1; expected"),
            ({"eps": 0}, "eps=0; expected"),
            ({"norm": "L7"}, "norm='L7'; expected"),
            ({"batch_size": 0}, "batch_size=0; expected"),
        ],
    )
    def test_say_what_is_expected(self, options, message):
        with pytest.raises(InputError, match=message):
            evaluated(**options)

    def test_cures_are_true(self):
        assert evaluated(target=[2] * 24, subset=[0, 1, 3]).num_queries == 3

    def test_labels_for_several_labels_each(self):
        images, labels = images_of()
        with pytest.raises(InputError, match="several labels each"):
            evaluated(queries=(images, nn.functional.one_hot(labels)))
