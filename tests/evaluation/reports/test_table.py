"""The table that a report prints."""

import re
from dataclasses import replace

import pytest
from made_reports import EPS, report
from scipy.stats import binomtest

from pml_adversarial.evaluation.reports.binomial import Interval
from pml_adversarial.evaluation.reports.results import Check
from pml_adversarial.evaluation.reports.table import aligned, table, with_interval

HEADS = ["attack", "eps", "R@1", "R@8", "mAP@R", "R-prec", "passes", "s"]
CHECKS = (Check("one", True, "fine"), Check("two", False, "not fine"), Check("three", None, "no gradient"))


CELL = re.compile(r"[\d.]+ \[.+?\]|worst \(\w+\)|\S+")  # an interval belongs to its number


RATES = ("recall_at_1", "recall_at_8")


def percent(measures, rates=RATES, total=12345, digits=1):
    """The cells of some measures; ``rates`` have intervals."""
    cells = []
    for name, value in measures.items():
        interval = ""
        if name in rates:
            theirs = binomtest(round(value * total), total).proportion_ci(0.95, method="exact")
            interval = f" [{100 * theirs.low:.{digits}f}, {100 * theirs.high:.{digits}f}]"
        cells.append(f"{100 * value:.1f}{interval}")
    return cells


def cells(line):
    return CELL.findall(line)


def ends(line):
    """Where each cell ends."""
    return [cell.end() for cell in CELL.finditer(line)]


class TestTable:
    def test_shows_every_number(self):
        made = report()
        lines = table(made).splitlines()
        assert lines[0].split() == HEADS
        assert set(lines[1]) == {"-"}
        rows = [["none", *percent(made.clean)]]
        for eps, shown in zip(EPS, ("4/255", "0.1", "26/255"), strict=True):
            for result in (result for result in made.attacks if result.eps == eps):
                passes = f"{result.forward_passes + result.backward_passes:,}"
                rows.append([result.attack, shown, *percent(result.measures), passes, f"{result.seconds:.0f}"])
            worst_cases = [worst for worst in made.worst if worst.eps == eps]
            rows += [[f"worst ({worst.target})", shown, *percent(worst.measures)] for worst in worst_cases]
        assert [cells(line) for line in lines[2:18]] == rows
        assert lines[18] == ""

    def test_says_on_what(self):
        made = report(
            checks=CHECKS,
            settings={"norm": "L2", "distance": "cosine", "precision": "half"},
            notes=("odd",),
            chance=0.2174,
            nmi=0.5,
        )
        assert table(made).splitlines()[19:] == [
            "standard-v1, L2, cosine, leave-one-out: 12345 queries (41 left out), 23456 items of 17 classes; "
            "chance 21.7; half",
            "percent; in brackets: 95 % confidence interval of a rate over the queries (Clopper-Pearson)",
            "note: odd",
            "embedding: mean similarity 0.432, effective rank 12.3; NMI 50.0",
            "[ok] one: fine",
            "[FLAG] two: not fine",
            "[no evidence] three: no gradient",
        ]

    def test_no_query_left_out_needs_no_word(self):
        assert "leave-one-out: 12345 queries, 23456 items" in table(report(left_out=0))

    def test_columns_are_aligned(self):
        lines = table(report()).splitlines()[:18]
        assert len({len(line) for line in lines}) == 1
        heads = ends(lines[0])
        assert len(heads) == len(HEADS)
        for line in lines[2:]:
            if line.startswith("none"):
                assert ends(line)[1:] == heads[2:6]
            elif line.startswith("worst"):
                assert ends(line)[1:] == heads[1:6]
            else:
                assert ends(line)[1:] == heads[1:]

    def test_measures_stand_in_the_order_of_those_without_attack(self):
        made = report()
        backwards = replace(made, clean=dict(reversed(made.clean.items())))
        assert table(backwards).splitlines()[0].split() == [*HEADS[:2], *reversed(HEADS[2:6]), *HEADS[6:]]
        found, other = (cells(table(one).splitlines()[3]) for one in (made, backwards))
        assert other == [*found[:2], *reversed(found[2:6]), *found[6:]]

    @pytest.mark.parametrize(("nmi", "shown"), [(0.0, "; NMI 0.0"), (None, "effective rank 12.3")])
    def test_an_nmi_is_shown_if_it_was_measured(self, nmi, shown):
        assert table(report(nmi=nmi)).splitlines()[21].endswith(shown)

    def test_without_attacks(self):
        made = report(attacks=(), worst=())
        lines = table(made).splitlines()
        assert lines[0].split() == HEADS
        assert [cells(lines[2]), lines[3]] == [["none", *percent(made.clean)], ""]


class TestIntervals:
    def test_of_all_rates_where_there_is_room(self):
        made = report(num_queries=200, attacks=(("margin", "query"),))
        lines = table(made).splitlines()
        assert len(lines[0]) <= 120
        expected = percent(made.clean, RATES, 200, 0)
        assert [cells(line) for line in lines if line.startswith("none")] == [["none", *expected]]

    @pytest.mark.parametrize("length", [9, 60])
    def test_of_r_at_1_alone_where_the_lines_would_be_too_long(self, length):
        made = report(num_queries=200, attacks=(("m" * length, "query"),))
        lines = table(made).splitlines()
        rates = RATES if length == 9 else RATES[:1]
        expected = percent(made.worst[0].measures, rates, 200, 0)
        assert cells(lines[4]) == ["worst (query)", "4/255", *expected]

    def test_the_table_of_a_usual_report_has_120_columns_at_most(self):
        measures = {**{f"recall_at_{k}": 1.0 for k in (1, 2, 4, 8)}, "map_at_r": 1.0, "r_precision": 1.0}
        for total in (20, 999, 1000, 60_502):
            made = report(attacks=(("targeted", "query"), ("promote", "gallery")), num_queries=total)
            made = replace(
                made,
                clean=measures,
                attacks=tuple(replace(one, measures=measures, seconds=12345.0) for one in made.attacks),
                worst=tuple(replace(one, measures=measures) for one in made.worst),
            )
            assert max(len(line) for line in table(made).splitlines()[:16]) <= 120

    @pytest.mark.parametrize(
        ("total", "shown"), [(999, "44.0 [34, 54]"), (1000, "44.0 [34.1, 54.3]"), (60_502, "44.0 [34.1, 54.3]")]
    )
    def test_of_many_queries_have_tenths(self, total, shown):
        assert with_interval(0.44, Interval(0.34083, 0.54281), total) == shown


def test_rows_are_aligned_and_the_first_is_underlined():
    assert aligned([["a", "bb"], ["ccc", "d"], ["", ""]]) == ["a    bb", "-------", "ccc   d", "       "]
