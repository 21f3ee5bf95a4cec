"""Two reports on the same queries, compared by plain loops; reports on others are refused."""

import dataclasses
import json
import math

import made_reports
import pytest
import torch
from query_batches import images_of, network

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import Report, compare, evaluate_robustness, quick
from pml_adversarial.evaluation.reports.results import Check, WorstCase
from pml_adversarial.evaluation.suites import standard

OPTIONS = {"eps": (0.02, 0.05), "attacks": [*quick(3, 1), *standard(3)[-2:]], "checks": False}


def measured(weights=5, queries=None, gallery=None, **options):
    return evaluate_robustness(network(weights), queries or images_of(40), gallery, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def pair():
    return measured(), measured(6)


def flags_of(report, target, eps):
    if target == "none":
        return report.clean_flags
    (flags,) = (worst.robust_flags for worst in report.worst if (worst.target, worst.eps) == (target, eps))
    return flags


def mcnemar_by_loop(first, second):
    """The probability, if both are equally good, of a split of the queries that only one is right about, so rare."""
    only_first = only_second = 0
    for one, other in zip(first, second, strict=True):
        only_first += one == "1" and other == "0"
        only_second += one == "0" and other == "1"
    total = only_first + only_second
    p_value = 0.0
    for k in range(total + 1):
        if math.comb(total, k) <= math.comb(total, only_first):
            p_value += math.comb(total, k) / 2**total
    return only_first, only_second, p_value


class TestDifferences:
    def test_by_a_loop_over_the_queries(self, pair):
        found = compare(*pair)
        assert found.num_queries == 40
        places = [("none", 0.0), *((target, eps) for target in ("query", "gallery") for eps in (0.02, 0.05))]
        assert [(one.target, one.eps) for one in found.differences] == places
        for one in found.differences:
            first, second = (flags_of(report, one.target, one.eps) for report in pair)
            only_first, only_second, p_value = mcnemar_by_loop(first, second)
            assert (one.only_first, one.only_second) == (only_first, only_second)
            assert one.p_value == pytest.approx(p_value, rel=1e-9)
            assert (one.first, one.second) == (first.count("1") / 40, second.count("1") / 40)
            assert one.difference == pytest.approx((only_second - only_first) / 40)
            assert one.interval.low < one.difference < one.interval.high
        assert any(one.only_first and one.only_second for one in found.differences)

    def test_agrees_with_the_reports(self, pair):
        found = compare(*pair)
        for eps in (0.02, 0.05):
            for target in ("query", "gallery"):
                one = found.at(eps, target)
                assert one.first == pytest.approx(pair[0].worst_case(eps, target=target))
                assert one.second == pytest.approx(pair[1].worst_case(eps, target=target))
        assert found.at(0) == found.at(0.0, "gallery") == found.differences[0]
        assert found.at(0).first == pytest.approx(pair[0].clean["recall_at_1"])

    def test_the_other_way_round(self, pair):
        for one, other in zip(compare(*pair).differences, compare(*pair[::-1]).differences, strict=True):
            assert (one.first, one.only_first, one.p_value) == (other.second, other.only_second, other.p_value)
            assert one.difference == -other.difference
            assert one.interval == pytest.approx((-other.interval.high, -other.interval.low), abs=1e-9)

    def test_with_itself(self, pair):
        for one in compare(pair[0], pair[0]).differences:
            assert (one.difference, one.only_first, one.only_second, one.p_value) == (0, 0, 0, 1)
            assert one.interval.low < 0 < one.interval.high

    def test_of_reports_that_were_saved(self, pair, tmp_path):
        for name, report in zip("ab", pair, strict=True):
            report.save_json(tmp_path / name)
        assert compare(*(Report.load_json(tmp_path / name) for name in "ab")) == compare(*pair)

    @pytest.mark.parametrize(
        ("eps", "places"),
        [
            (0.05, [0.0, 0.05, 0.05]),
            ([0.05, 0.02], [0.0, 0.02, 0.05, 0.02, 0.05]),
            (torch.tensor(0.05, dtype=torch.float64), [0.0, 0.05, 0.05]),
            (0, [0.0]),
        ],
    )
    def test_at_some_eps(self, pair, eps, places):
        assert [one.eps for one in compare(*pair, eps=eps).differences] == places

    def test_what_was_not_compared(self, pair):
        with pytest.raises(
            InputError, match=r"eps=0\.05 on query was not compared; expected one of eps=0 on none, eps=0\.02"
        ):
            compare(*pair, eps=0.02).at(0.05)


class TestRefusals:
    @pytest.mark.parametrize("other", ["report.json", None, {}])
    def test_what_is_no_report(self, pair, other):
        with pytest.raises(InputError, match=f"second is {type(other).__name__}; expected a Report of evaluate_rob"):
            compare(pair[0], other)
        with pytest.raises(InputError, match="first is"):
            compare(other, pair[1])

    @pytest.mark.parametrize(
        ("change", "differ"),
        [
            ({"norm": "L2"}, "norm: Linf and L2"),
            (
                {"subset": range(30)},
                r"subset: \[0, 1, .* \.\.\. and \[0, 1, .* \.\.\.; num_queries: 40 and 30; queries: .*",
            ),
            (
                {"queries": (images_of(40)[0].flip(3), images_of(40)[1])},
                r"queries: \w{36} \.\.\. and \w{36} \.\.\.; gal.*",
            ),
            (
                {"queries": (images_of(40)[0], images_of(40)[1].flip(0))},
                r"queries: \w{36} \.\.\. and \w{36} \.\.\.; gal.*",
            ),
            ({"gallery": images_of(40)}, "protocol: leave-one-out and separate gallery"),
            ({"gallery": images_of(40, seed=1)}, r"protocol: .*; gallery: \w{36} \.\.\. and \w{36} \.\.\."),
            ({"distance": "euclidean"}, "distance: cosine and euclidean"),
            ({"junk_label": 3}, "junk_label: -1 and 3; num_queries: 40 and 30"),
            (
                {"ignore": torch.eye(40).roll(1, 0).bool()},
                r"ignore: None and \w{36} \.\.\.; protocol: .*ignored.*",
            ),
            ({"gallery": images_of(40), "own": range(40)}, r"own: None and \[0, 1, .* \.\.\."),
        ],
    )
    def test_other_queries(self, pair, change, differ):
        message = (
            rf"^The reports are not on the same queries\. They differ in {differ}\. Measure both models on the same"
        )
        with pytest.raises(InputError, match=message):
            compare(pair[0], measured(6, **change))

    def test_a_setting_that_is_not_known_to_be_harmless(self, pair):
        other = dataclasses.replace(pair[1], settings={**pair[1].settings, "a_later_one": "other"})
        with pytest.raises(InputError, match="They differ in a_later_one: None and other"):
            compare(pair[0], other)

    def test_settings_that_do_not_change_the_queries(self, pair):
        other = measured(6, subset=range(40), recall_at=(1, 3), batch_size=9, seed=4, normalization=([0.0], [1.0]))
        assert compare(pair[0], other).num_queries == 40

    @pytest.mark.parametrize(("eps", "said"), [(None, r"0\.02"), (0.05, r"0\.02"), ((0.02, 0.3), r"0\.02")])
    def test_other_eps(self, pair, eps, said):
        message = (
            rf"^The reports have the eps 0\.02, 0\.05 and 0\.02, 0\.1; expected eps that both have: {said}\. Choose"
        )
        other = measured(6, eps=(0.02, 0.1))
        with pytest.raises(InputError, match=message):
            compare(pair[0], other, eps=eps)
        found = compare(pair[0], other, eps=0.02)
        assert [one.eps for one in found.differences] == [0, 0.02, 0.02]
        assert found.notes == (
            "The eps differ: a has 0.02, 0.05; b has 0.02, 0.1. A worst case includes attacks at smaller eps.",
        )

    def test_no_eps_in_common(self, pair):
        with pytest.raises(InputError, match=r"0\.02, 0\.05 and none; expected eps that both have: none"):
            compare(pair[0], dataclasses.replace(pair[1], worst=()))

    def test_a_report_that_does_not_say_on_what_it_is(self, pair):
        made = dataclasses.replace(pair[0], provenance={})
        with pytest.raises(InputError, match="does not say which queries it is on"):
            compare(made, made)


class TestShown:
    def of(self, first, second, **changes):
        """A comparison of 100 queries by hand."""
        reports = [
            made_reports.report(
                num_queries=100,
                attacks=(),
                worst=(WorstCase("query", 8 / 255, {}, flags),),
                clean_flags="1" * 90 + "0" * 10,
                **changes,
            )
            for flags in (first, second)
        ]
        return compare(*reports)

    def test_as_a_table(self):
        found = self.of("1" * 44 + "0" * 56, "0" * 8 + "1" * 57 + "0" * 35)
        assert str(found).splitlines() == [
            "                 eps  R@1 a  R@1 b                b - a  only a  only b      p",
            "------------------------------------------------------------------------------",
            "none                   90.0   90.0    +0.0 [-3.7, +3.7]       0       0      1",
            "worst (query)  8/255   44.0   57.0  +13.0 [+2.6, +23.6]       8      21  0.024",
            "",
            "100 queries; percent [95 % interval of the difference, Tango]; only a: right with a alone; "
            "p: exact McNemar test",
        ]

    def test_notes(self, pair):
        assert compare(*pair).notes == ()
        other = measured(6, attacks="quick", checks=True)
        failed = Check("noise", False, "some")
        other = dataclasses.replace(other, checks=(failed, Check("b", True, ""), Check("c", None, "")))
        assert compare(pair[0], other).notes == (
            "The attacks differ: a met custom (margin, shift, promote, demote); b met quick-v1 (margin, shift). "
            "Other options have: margin, shift.",
            "Checks of b raise a flag: noise.",
        )
        assert str(compare(pair[0], other)).endswith("\nChecks of b raise a flag: noise.")

    def test_as_a_dict(self, pair):
        found = compare(*pair)
        kept = found.to_dict()
        assert json.loads(json.dumps(kept, allow_nan=False)) == kept
        assert set(kept) == {"num_queries", "differences", "notes", "norm", "interval"}
        assert kept["interval"] == {"kind": "Tango", "confidence": 0.95}
        for one, other in zip(kept["differences"], found.differences, strict=True):
            assert one == {**vars(other), "interval": list(other.interval), "difference": other.difference}
