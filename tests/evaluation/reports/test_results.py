"""What is asked of results that were measured."""

import pytest
from made_reports import EPS, report
from scipy.stats import binomtest

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.reports.results import Check, WorstCase, decode_flags, heading


class TestWorstCase:
    @pytest.mark.parametrize("target", ["query", "gallery"])
    def test_curve_and_what_was_not_measured(self, target):
        made = report()
        for measure in made.clean:
            values = {worst.eps: worst.measures[measure] for worst in made.worst if worst.target == target}
            assert made.curve(measure, target) == {0.0: made.clean[measure], **values}
            assert list(made.curve(measure, target)) == [0.0, *EPS]
            assert {eps: made.worst_case(eps, measure, target) for eps in EPS} == values
            assert made.worst_case(0, measure, target) == made.clean[measure]
        message = rf"recall_at_1 at eps=0\.3 on {target} was not measured; choose .* at 0, 4/255, 0\.1, 26/255\."
        with pytest.raises(InputError, match=message):
            made.worst_case(0.3, target=target)
        message = r"recall_at_3 at eps=0\.1 .* choose map_at_r, r_precision, recall_at_1, recall_at_8 at"
        with pytest.raises(InputError, match=message):
            made.worst_case(0.1, "recall_at_3", target)

    def test_queries_and_recall_at_1_unless_asked_otherwise(self):
        made = report()
        assert made.curve() == made.curve("recall_at_1", "query") != made.curve("recall_at_1", "gallery")
        assert made.worst_case(0.1) == made.curve()[0.1]

    def test_a_target_that_no_attack_perturbed(self):
        made = report(attacks=(("margin", "query"),))
        with pytest.raises(InputError, match=r"No attack on the gallery was evaluated; expected attacks that perturb"):
            made.worst_case(0.1, target="gallery")
        assert made.curve(target="gallery") == {0.0: made.clean["recall_at_1"]}
        assert made.worst_case(0, target="gallery") == made.clean["recall_at_1"]
        assert made.interval(0, target="gallery") == made.interval(0)


class TestInterval:
    def counted(self):
        """100 queries: R@1 94 without attack, 44 and 12 in the worst cases."""
        worst = tuple(
            WorstCase(target, eps, {"recall_at_1": rate, "map_at_r": 0.5}, "")
            for target, eps, rate in (("query", 0.1, 0.44), ("query", 0.2, 0.12), ("gallery", 0.1, 0.7))
        )
        clean = {"recall_at_1": 0.94, "map_at_r": 0.6}
        return report(num_queries=100, clean=clean, attacks=(), worst=worst)

    @pytest.mark.parametrize(
        ("eps", "target", "successes"),
        [(0, "query", 94), (0.0, "gallery", 94), (0.1, "query", 44), (0.2, "query", 12), (0.1, "gallery", 70)],
    )
    def test_is_that_of_so_many_queries(self, eps, target, successes):
        theirs = binomtest(successes, 100).proportion_ci(0.95, method="exact")
        found = self.counted().interval(eps, target=target)
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)

    def test_of_other_recalls(self):
        made = report()
        for measure in ("recall_at_1", "recall_at_8"):
            for eps, value in made.curve(measure).items():
                low, high = made.interval(eps, measure)
                assert low < value < high
                assert made.intervals(made.clean)[measure] == made.interval(0, measure)

    @pytest.mark.parametrize("measure", ["map_at_r", "r_precision", "nmi"])
    @pytest.mark.parametrize("eps", [0, 0.1])
    def test_a_mean_that_is_no_rate_has_none(self, measure, eps):
        message = f"{measure} is no rate, so it has no interval; .*: recall_at_1, recall_at_8"
        with pytest.raises(InputError, match=message):
            report().interval(eps, measure)
        assert set(report().intervals(report().clean)) == {"recall_at_1", "recall_at_8"}

    @pytest.mark.parametrize(("eps", "measure"), [(0.3, "recall_at_1"), (0.1, "recall_at_3"), (0, "recall_at_3")])
    def test_what_was_not_measured(self, eps, measure):
        with pytest.raises(InputError, match=rf"{measure} at eps={eps} on query was not measured"):
            report().interval(eps, measure)


def test_flagged_are_the_checks_that_failed():
    checks = (Check("one", True, "fine"), Check("two", False, "not fine"), Check("three", None, "no gradient"))
    assert [check.name for check in report(checks=checks).flagged] == ["two"]


def test_flags_are_decoded_one_by_one():
    assert decode_flags("0110").tolist() == [False, True, True, False]
    assert decode_flags("").shape == (0,)


@pytest.mark.parametrize(
    ("measure", "shown"),
    [
        ("recall_at_1", "R@1"),
        ("recall_at_16", "R@16"),
        ("map_at_r", "mAP@R"),
        ("r_precision", "R-prec"),
        ("own", "own"),
    ],
)
def test_heading(measure, shown):
    assert heading(measure) == shown
