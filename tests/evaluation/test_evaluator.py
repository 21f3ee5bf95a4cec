import pytest
import torch
from notes import Notes
from query_batches import images_of, network
from torch.nn.functional import normalize

from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.attacks.gradients import (
    gradient_attack,
    margin_score,
    nearest_wrong,
    promotion,
    shift_score,
)
from pml_adversarial.evaluation.attacks.kinds import GalleryAttack, QueryAttack
from pml_adversarial.evaluation.evaluator import choose_queries
from pml_adversarial.evaluation.suites import quick


@pytest.mark.parametrize(
    ("labels", "preferred", "count", "chosen"),
    [
        ([5, 5, 6, 6, 7], [0, 1, 0, 0, 1], 3, [1, 4, 2]),
        ([5, 5, 6, 6, 7], [0, 1, 0, 0, 1], 9, [1, 4, 2, 0, 3]),
        ([5, 5, 5], [0, 0, 1], 2, [2, 0]),
        ([5, 6, 5, 6], [1, 0, 1, 0], 2, [0, 1]),
        ([], [], 5, []),
    ],
)
def test_one_query_of_each_class_first_and_preferred_ones_before_others(labels, preferred, count, chosen):
    found = choose_queries(torch.tensor(labels, dtype=torch.long), torch.tensor(preferred, dtype=torch.bool), count)
    assert found.tolist() == chosen


class TestFollows:
    """An attack that follows others is given what these left robust, and its measures count theirs."""

    FIRST = QueryAttack("first", gradient_attack(margin_score, 4))
    ITEMS = GalleryAttack("items", nearest_wrong, promotion, 12)

    def noted(self, given, **options):
        """An attack that turns queries into their classes' opposites, and notes which it was given."""

        def perturb(batch, eps, restart):
            given.append((eps, restart, [image.tolist() for image in batch.images]))
            return gradient_attack(shift_score, 2)(batch, eps, restart)

        return QueryAttack("then", perturb, **options)

    def reports(self, **options):
        given = Notes()
        images, labels = images_of()
        attacks = (self.ITEMS, self.FIRST, self.noted(given, **options))
        setting = {"eps": (0.02, 0.05), "checks": False}
        report = evaluate_robustness(network(), (images, labels), attacks=attacks, **setting)
        number = {str(image.tolist()): row for row, image in enumerate(images)}
        return report, [(eps, restart, [number[str(image)] for image in found]) for eps, restart, found in given]

    def flags(self, report, attack, eps):
        (found,) = (r.robust_flags for r in report.attacks if (r.attack, r.eps) == (attack, eps))
        return [row for row, flag in enumerate(found) if flag == "1"]

    def test_is_given_what_those_before_left(self):
        report, given = self.reports(follows=True)
        assert [found[:2] for found in given] == [(0.02, 0), (0.05, 0)]
        assert given[0][2] == self.flags(report, "first", 0.02)
        left = set(self.flags(report, "first", 0.05)) & set(self.flags(report, "then", 0.02))
        assert given[1][2] == sorted(left)
        assert 0 < len(given[1][2]) < len(given[0][2]) < round(24 * report.clean["recall_at_1"])

    def test_its_measures_count_those_of_the_others_on_the_query(self):
        report, _ = self.reports(follows=True)
        by_items = []
        for eps in (0.02, 0.05):
            then = set(self.flags(report, "then", eps))
            assert then <= set(self.flags(report, "first", eps))
            by_items += then - set(self.flags(report, "items", eps))
            assert report.worst_case(eps) == len(then) / 24
        assert by_items

    def test_a_later_start_is_given_what_the_earlier_one_left(self):
        _, given = self.reports(follows=True, restarts=2)
        assert [found[:2] for found in given] == [(0.02, 0), (0.02, 1), (0.05, 0), (0.05, 1)]
        assert set(given[1][2]) <= set(given[0][2])

    def test_others_are_given_all_or_what_they_left_themselves(self):
        report, given = self.reports()
        assert [len(found[2]) for found in given] == [24, 24]
        _, given = self.reports(only_robust=True)
        assert len(given[0][2]) == round(24 * report.clean["recall_at_1"])


class TestStrongestAttempt:
    """Of attempts that fail, the one is kept after which the nearest wrong item is nearest."""

    def noise(self, number):
        def perturb(batch, eps, restart):
            directions = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(10 * number + restart)).sign()
            return (batch.images + 0.2 * eps * directions[batch.rows]).clamp(0, 1)

        return QueryAttack(f"noise {number}", perturb, restarts=2)

    def margins(self, model, images, labels, attempt):
        """By a loop over queries: how much nearer the nearest wrong item is than the nearest right one."""
        with torch.no_grad():
            items, moved = (normalize(model.eval()(x)) for x in (images, attempt))
        found = []
        for row in range(len(images)):
            near = {other: float(moved[row] @ items[other]) for other in range(len(images)) if other != row}
            right = max(value for other, value in near.items() if labels[other] == labels[row])
            found.append(max(value for other, value in near.items() if labels[other] != labels[row]) - right)
        return found

    def test_by_loops(self):
        (images, labels), model, radii = images_of(spread=0.05), network(), (0.01, 0.02)
        attacks = tuple(map(self.noise, range(3)))
        report = evaluate_robustness(
            model, (images, labels), eps=radii, attacks=attacks, checks=False, keep_attacked=True
        )
        assert report.worst_case(0.02) == report.clean["recall_at_1"] == 1
        tried = {}
        for eps in radii:
            for number in range(3):
                for restart in range(2):
                    generator = torch.Generator().manual_seed(10 * number + restart)
                    directions = torch.randn(24, 1, 6, 6, generator=generator).sign()
                    tried[eps, number, restart] = (images + 0.2 * eps * directions).clamp(0, 1)
            margins = {name: self.margins(model, images, labels, attempt) for name, attempt in tried.items()}
            for row in range(24):
                best = max(margins, key=lambda name: margins[name][row])
                torch.testing.assert_close(report.attacked[eps][row], tried[best][row], rtol=0, atol=1e-6)
        for example in report.examples:
            assert not example.succeeded
            name = (example.eps, int(example.attack[-1]))
            assert any(
                torch.allclose(example.perturbed, tried[(*name, restart)][example.query], atol=1e-6)
                for restart in range(2)
            )

    def test_examples_show_items_alone_that_a_query_may_find(self):
        images, labels = images_of()[0], torch.arange(24) // 2
        ignored = (torch.arange(24)[:, None] - torch.arange(24)).abs() > 2
        report = evaluate_robustness(
            network(), (images, labels), eps=0.02, attacks=quick(2, 1), ignore=ignored, checks=False
        )
        for example in report.examples:
            for item in (*example.before, *example.after):
                assert 0 < abs(item.item - example.query) <= 2
        assert {len(example.before) for example in report.examples} <= {2, 3, 4}

    def test_some_examples_show_queries_that_withstood(self):
        margin = QueryAttack("margin", gradient_attack(margin_score, 8))
        report = evaluate_robustness(network(), images_of(), eps=0.02, attacks=(margin,), checks=False)
        clean, robust = report.clean_flags, report.worst[0].robust_flags
        assert sum(one == "1" and other == "0" for one, other in zip(clean, robust, strict=True)) >= 5
        states = [example.succeeded for example in report.examples]
        assert states == [robust[example.query] == "0" for example in report.examples]
        assert states == [True] * 5 + [False] * 3
