"""The table that a report prints."""

import re
from dataclasses import replace

import pytest
from made_reports import EPS, report

from pml_adversarial.evaluation.results import Check
from pml_adversarial.evaluation.table import table

HEADS = ["attack", "eps", "R@1", "R@8", "mAP@R", "R-prec", "passes", "s"]
CHECKS = (Check("one", True, "fine"), Check("two", False, "not fine"), Check("three", None, "no gradient"))


def percent(measures):
    return [f"{100 * value:.1f}" for value in measures.values()]


def ends(line):
    """Where each word ends."""
    return [word.end() for word in re.finditer(r"\S+", line)]


class TestTable:
    def test_shows_every_number(self):
        made = report()
        lines = table(made).splitlines()
        assert lines[0].split() == HEADS
        assert set(lines[1]) == {"-"}
        rows = [["none", *percent(made.clean)]]
        for eps in EPS:
            shown = f"{eps:.4g}"
            for result in (result for result in made.attacks if result.eps == eps):
                passes = f"{result.forward_passes + result.backward_passes:,}"
                rows.append([result.attack, shown, *percent(result.measures), passes, f"{result.seconds:.0f}"])
            worst_cases = [worst for worst in made.worst if worst.eps == eps]
            rows += [["worst", f"({worst.target})", shown, *percent(worst.measures)] for worst in worst_cases]
        assert [line.split() for line in lines[2:18]] == rows
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
            "standard-v1, L2, cosine, leave-one-out: 12345 queries, 23456 items of 17 classes; percent; chance "
            "21.7; half",
            "note: odd",
            "embedding: mean similarity 0.432, effective rank 12.3; NMI 50.0",
            "[ok] one: fine",
            "[FLAG] two: not fine",
            "[skipped] three: no gradient",
        ]

    def test_columns_are_aligned(self):
        lines = table(report()).splitlines()[:18]
        assert len({len(line) for line in lines}) == 1
        heads = ends(lines[0])
        assert len(heads) == len(HEADS)
        for line in lines[2:]:
            if line.startswith("none"):
                assert ends(line)[1:] == heads[2:6]
            elif line.startswith("worst"):
                assert ends(line)[2:] == heads[1:6]
            else:
                assert ends(line)[1:] == heads[1:]

    def test_measures_stand_in_the_order_of_those_without_attack(self):
        made = report()
        backwards = replace(made, clean=dict(reversed(made.clean.items())))
        assert table(backwards).splitlines()[0].split() == [*HEADS[:2], *reversed(HEADS[2:6]), *HEADS[6:]]
        found, other = (table(one).splitlines()[3].split() for one in (made, backwards))
        assert other == [*found[:2], *reversed(found[2:6]), *found[6:]]

    @pytest.mark.parametrize(("nmi", "shown"), [(0.0, "; NMI 0.0"), (None, "effective rank 12.3")])
    def test_an_nmi_is_shown_if_it_was_measured(self, nmi, shown):
        assert table(report(nmi=nmi)).splitlines()[20].endswith(shown)

    def test_without_attacks(self):
        made = report(attacks=(), worst=())
        lines = table(made).splitlines()
        assert lines[0].split() == HEADS
        assert [lines[2].split(), lines[3]] == [["none", *percent(made.clean)], ""]
