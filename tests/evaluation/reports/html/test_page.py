"""The page as a whole: every number of a report stands where it belongs, and a browser shows it."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from made_reports import EPS, as_measured, example, measures, report
from page_trees import Node, Tree, curves, decoded, levels
from PIL import Image
from scipy.stats import binomtest

from pml_adversarial.attacks.ball import radius_text
from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.reports.html import render
from pml_adversarial.evaluation.reports.report import Report
from pml_adversarial.evaluation.reports.results import Check
from pml_adversarial.evaluation.suites import quick

FLAGGED = (Check("more steps", False, "31 of 128"), Check("black box", True, "fine"), Check("noise", False, "some"))
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><b onclick='a'>&amp;", "' x=\"y"]
REPORTS = {
    "whole": {},
    "flagged": {"checks": FLAGGED},
    "no examples": {"examples": ()},
    "no checks": {"checks": ()},
    "one eps": {"eps": (26 / 255,)},
    "many eps": {"eps": tuple(i / 255 for i in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32))},
    "queries only": {"attacks": (("margin", "query"),)},
    "gallery only": {"attacks": (("demote", "gallery"),)},
    "no attacks": {"attacks": (), "worst": ()},
    "no nmi": {"nmi": None},
    "no collapse": {"collapse": {}, "nmi": None},
    "no norm": {"settings": {}},
    "L2": {"settings": {"norm": "L2"}, "eps": (0.5, 1.0)},
    "all zero": {"clean": dict.fromkeys(measures(0), 0.0), "chance": 0.0, "attacks": (), "worst": ()},
    "many attacks": {"attacks": tuple((f"attack {i}", "query") for i in range(40))},
    "long names": {
        "attacks": (("margin" * 30, "query"), ("a b " * 60, "gallery")),
        "suite": "s" * 300,
        "protocol": "p" * 300,
    },
    "large images": {"examples": (example(1, (3, 224, 224)), example(2, (1, 224, 224)), example(4, (3, 60, 200)))},
    "odd channels": {"examples": (example(1, (2, 9, 9)), example(2, (5, 7, 11)), example(3, (4, 32, 32)))},
    "unbroken": {"examples": (example(attack="none", perturbed=example().clean, after=()),)},
}
each_report = pytest.mark.parametrize("name", REPORTS)


@cache
def page_of(name):
    return render(report(**REPORTS[name]))


def section(page, title):
    return next(part for part in Tree(page).root.all("section") if part.all("h2") and part.all("h2")[0].text == title)


def rows(table):
    """Cells of a table as rows of (text, value of its number); a cell that spans rows stands in each of them."""
    grid, spanning = [], []
    for row in table.all("tr"):
        cells = [cell for cell in row.children if isinstance(cell, Node)]
        spanning = [(cell, left - 1) for cell, left in spanning if left > 1]
        full = [cell for cell, _ in spanning] + cells
        spanning += [(cell, int(cell.attrs["rowspan"])) for cell in cells if "rowspan" in cell.attrs]
        grid.append([(cell.text, [float(data.attrs["value"]) for data in cell.all("data")]) for cell in full])
    return grid


def number(shown, value):
    return shown, [value]


def percent(value):
    return number(f"{value * 100:.1f}", value)


def interval(value, total=12345):
    theirs = binomtest(round(value * total), total).proportion_ci(0.95, method="exact")
    return [theirs.low, theirs.high], f"[{100 * theirs.low:.1f}, {100 * theirs.high:.1f}]"


class Measured:
    """A cell of a measure: of a rate, with its interval."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def __eq__(self, cell):
        text, values = cell
        if not self.name.startswith("recall_at_"):
            return cell == percent(self.value)
        ends, shown = interval(self.value)
        assert values == pytest.approx([self.value, *ends], abs=1e-12)
        return text == f"{self.value * 100:.1f} {shown}"


class TestWhole:
    @each_report
    def test_is_balanced_and_has_each_section_once(self, name):
        tree = Tree(page_of(name)).root
        assert [len(tree.all(tag)) for tag in ("html", "head", "body", "main", "h1", "title")][:5] == [1] * 5
        titles = [node.text for node in tree.all("h2")]
        shown = ["Queries, before and after"] if report(**REPORTS[name]).examples else []
        last = ["What was measured, and where", "To measure it again"]
        assert titles == ["Curves", "Attacks", "Embedding", *shown, *last]

    @each_report
    def test_needs_no_network_and_runs_nothing(self, name):
        page = page_of(name)
        tree = Tree(page).root
        assert (
            re.search(r"https?:|//\w|@import|url\(|javascript:", re.sub(r"data:image/png;base64,[^\"]+", "", page))
            is None
        )
        linked = {name for node in tree.everything() for name in node.attrs} & {"href", "srcset", "action", "data"}
        assert linked == set()
        assert all(node.attrs["src"].startswith("data:image/png;base64,") for node in tree.all("img"))
        assert {node.tag for node in tree.everything()}.isdisjoint({"script", "link", "iframe", "object", "form"})

    def test_forbids_the_browser_all_else(self):
        (policy,) = (node for node in Tree(render(report())).root.all("meta") if "http-equiv" in node.attrs)
        assert policy.attrs["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

    @each_report
    def test_no_number_is_unreadable(self, name):
        text = " ".join(node.text for node in Tree(page_of(name)).root.all("main"))
        assert re.search(r"\bnan\b|\binf\b|None|tensor", text) is None

    @pytest.mark.parametrize("text", HOSTILE)
    def test_names_stay_text(self, text):
        hostile = report(
            attacks=((text, "query"),),
            suite=text,
            protocol=text,
            checks=(Check(text, False, text),),
            collapse={text: 1.0},
            settings={"norm": text, text: [text]},
            versions={text: text},
            provenance={text: text, "x": {text: [text, text]}},
            examples=(example(attack=text),),
        )
        harmless = report(
            attacks=(("x", "query"),),
            suite="x",
            protocol="x",
            checks=(Check("x", False, "x"),),
            collapse={"x": 1.0},
            settings={"norm": "x", "x": ["x"]},
            versions={"x": "x"},
            provenance={"y": "x", "x": {"x": ["x", "x"]}},
            examples=(example(attack="x"),),
        )
        found, expected = (Tree(render(made)).root for made in (hostile, harmless))
        assert [(node.tag, sorted(node.attrs)) for node in found.everything()] == [
            (node.tag, sorted(node.attrs)) for node in expected.everything()
        ]
        (summary,) = (part for part in found.all("figcaption") if "Query" in part.text)
        assert text in summary.text
        assert text in found.all("title")[0].text
        assert text in found.all("li")[0].text
        assert json.loads(found.all("pre")[0].text)["versions"] == {text: text}
        (table,) = (part for part in found.all("table") if "What was measured" in part.attrs["aria-label"])
        shown = text.replace("_", " ")
        assert rows(table)[1:] == [
            [(shown, []), (text, [])],
            [(f"x: {shown}", []), (shlex.join([text, text]), [])],
        ]

    def test_a_report_loaded_from_json_gives_the_same_page_without_examples(self, tmp_path):
        made = as_measured(report())
        made.save_json(tmp_path / "report.json")
        Report.load_json(tmp_path / "report.json").save_html(tmp_path / "report.html")
        assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(replace(made, examples=()))

    def test_a_measured_report(self):
        images = torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(2))
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 5))
        made = evaluate_robustness(
            model, (images, torch.arange(24) % 3), eps=(0.05, 0.1), attacks=quick(steps=2, restarts=1), checks=False
        )
        tree = Tree(render(made)).root
        assert len(tree.all("figure", "example")) == len(made.examples) > 0
        assert len(tree.all("img")) == sum(3 + len(part.before) + len(part.after) for part in made.examples)
        assert all(
            f"{100 * w.measures['recall_at_1']:.1f}\u00a0%" in tree.all("p", "headline")[0].text for w in made.worst
        )


class TestOpening:
    def test_title(self):
        tree = Tree(render(report())).root
        assert tree.all("title")[0].text == "Robustness of an embedding: standard-v1, leave-one-out"
        assert tree.all("small")[0].text == "standard-v1, leave-one-out"

    def test_headline(self):
        made = report(eps=(26 / 255,))
        values = [part["recall_at_1"] for part in (made.clean, made.worst[0].measures)]
        ends, texts = zip(*map(interval, values), strict=True)
        clean, attacked = (f"{100 * value:.1f}\u00a0% {text}" for value, text in zip(values, texts, strict=True))
        (headline,) = Tree(render(made)).root.all("p", "headline")
        assert headline.text == (
            f"R@1 {clean} clean; {attacked} at eps\u00a026/255 in the worst case per query (Linf, 2 attacks)."
        )
        found = [float(data.attrs["value"]) for data in headline.all("data")]
        assert [found[0], found[3], found[6]] == [*values, 26 / 255]
        assert found[1:3] + found[4:6] == pytest.approx([*ends[0], *ends[1]], abs=1e-12)

    def test_notes(self):
        texts = ["margin is left out: it needs <7> classes", "odd"]
        (header,) = Tree(render(report(notes=tuple(texts), checks=()))).root.all("header")
        assert [item.text for item in header.all("li")] == texts
        (header,) = Tree(render(report(checks=()))).root.all("header")
        assert header.all("ul") == []

    def test_intervals_are_explained(self):
        (text,) = (node.text for node in Tree(render(report())).root.all("p") if "In brackets" in node.text)
        assert "95 % confidence intervals (Clopper-Pearson)" in text

    def test_headline_on_the_gallery(self):
        made = report()
        texts = [node.text for node in Tree(render(made)).root.all("p")]
        (line,) = (text for text in texts if text.startswith("If instead"))
        found = re.findall(r"([\d.]+)\u00a0% \[[\d., ]+\] at eps\u00a0([\d./]+)", line)
        gallery = [w for w in made.worst if w.target == "gallery"]
        assert [value for value, _ in found] == [f"{100 * w.measures['recall_at_1']:.1f}" for w in gallery]
        assert [eps for _, eps in found] == ["4/255", "0.1", "26/255"]
        assert line.endswith("(Linf, 1 attack).")

    @pytest.mark.parametrize(
        ("name", "line"),
        [("no attacks", "; no attack ran."), ("gallery only", "(Linf, 1 attack)."), ("no norm", "(2 attacks).")],
    )
    def test_headline_of_less(self, name, line):
        (headline,) = Tree(page_of(name)).root.all("p", "headline")
        assert headline.text.endswith(line)

    def test_of_many_eps_some_and_the_largest(self):
        (headline,) = Tree(render(report(**REPORTS["many eps"]))).root.all("p", "headline")
        assert re.findall(r"eps\u00a0([\d./]+)", headline.text) == ["1/255", "8/255", "32/255"]

    def test_facts(self):
        made = report()
        (facts,) = (p.text for p in Tree(render(made)).root.all("p", "quiet") if "searched" in p.text)
        assert "12,345 queries (41 more left out" in facts
        assert f"23,456 items of 17 classes searched; chance {100 * made.chance:.1f}\u00a0%." in facts
        assert "left out" not in render(report(left_out=0))

    def test_flags_stand_before_the_headline(self):
        tree = Tree(render(report(checks=FLAGGED))).root
        (warning,) = tree.all("section", "warning")
        assert "2 checks raise a flag" in warning.text
        assert [item.text for item in warning.all("li")] == ["more steps: 31 of 128", "noise: some"]
        order = tree.everything()
        assert order.index(warning) < order.index(tree.all("p", "headline")[0])

    def test_one_flag(self):
        assert "A check raises a flag" in render(report(checks=FLAGGED[:2]))

    def test_without_flags_no_warning(self):
        assert Tree(render(report())).root.all("section", "warning") == []


class TestChecks:
    def of(self, *checks):
        (header,) = Tree(render(report(checks=checks))).root.all("header")
        return header

    def test_the_verdict_comes_first_and_is_folded(self):
        header = self.of(*FLAGGED, Check("c", None, "d"))
        (details,) = header.all("details", "verdict")
        assert "open" not in details.attrs
        assert details.all("summary")[0].text == "1 of 4 checks passed, 2 raised a flag, 1 gave no evidence."
        order = header.everything()
        assert order.index(details) < order.index(header.all("p", "headline")[0])

    @pytest.mark.parametrize(
        ("states", "said"),
        [
            ((True, True), "2 of 2 checks passed."),
            ((True, None), "1 of 2 checks passed, 1 gave no evidence."),
            ((False, True), "1 of 2 checks passed, 1 raised a flag."),
        ],
    )
    def test_verdicts(self, states, said):
        header = self.of(*(Check(str(i), state, "found") for i, state in enumerate(states)))
        assert header.all("summary")[0].text == said

    def test_each_in_words_with_what_it_catches(self):
        checks = (FLAGGED[0], Check("black box", True, "fine", "Catches <this>."), Check("c", None, "d"))
        found = self.of(*checks).all("ul", "checks")[0].all("li")
        assert [item.text for item in found] == [
            "⚑ flagmore steps: 31 of 128",
            "✓ passblack box: fineCatches <this>.",
            "· no evidencec: d",
        ]

    def test_none(self):
        assert "No check was made" in self.of().all("p", "verdict")[0].text


class TestCurves:
    @pytest.mark.parametrize(
        "name", ["whole", "one eps", "many eps", "queries only", "gallery only", "L2", "long names"]
    )
    def test_each_point_lies_where_its_numbers_say(self, name):
        made = report(**REPORTS[name])
        for figure, measure in zip(charts(made), ("recall_at_1", "map_at_r"), strict=True):
            x, y = axes(figure, made)
            drawn = curves(figure)
            attacks = {(r.attack, r.target) for r in made.attacks}
            assert len(drawn) == len(attacks) + len({w.target for w in made.worst})
            for attack, target in attacks:
                points = [
                    (r.eps, r.measures[measure]) for r in made.attacks if (r.attack, r.target) == (attack, target)
                ]
                expected = [(0.0, made.clean[measure]), *points]
                assert_at(drawn[f"{target} one", attack], [(x(eps), y(value)) for eps, value in expected])
            for target in {w.target for w in made.worst}:
                expected = made.curve(measure, target).items()
                assert_at(drawn[f"{target} worst", f"worst ({target})"], [(x(e), y(v)) for e, v in expected])

    def test_worst_cases_lie_above_and_the_querys_highest(self):
        figure, _ = charts(report())
        assert list(curves(figure))[-2:] == [("gallery worst", "worst (gallery)"), ("query worst", "worst (query)")]

    def test_chance_is_where_it_belongs(self):
        made = report()
        recall, precision = charts(made)
        (line,) = recall.all("line", "chance")
        _, y = axes(recall, made)
        assert float(line.attrs["y1"]) == float(line.attrs["y2"]) == pytest.approx(y(made.chance), abs=0.06)
        assert precision.all("line", "chance") == []

    def test_words_say_what_the_picture_shows(self):
        made = report()
        for figure, measure in zip(charts(made), ("recall_at_1", "map_at_r"), strict=True):
            (picture,) = (svg for svg in figure.all("svg") if svg.attrs.get("role") == "img")
            for worst in made.worst:
                assert (
                    f"{100 * worst.measures[measure]:.1f} at eps {radius_text(worst.eps)}"
                    in picture.attrs["aria-label"]
                )
            assert f"{100 * made.clean[measure]:.1f} at eps 0" in picture.attrs["aria-label"]
            of_rates = re.findall(r"\(([\d.]+) to ([\d.]+)\)", picture.attrs["aria-label"])
            values = [v for target in ("query", "gallery") for v in made.curve(measure, target).values()]
            ends = [re.findall(r"[\d.]+", interval(value)[1]) for value in values]
            assert sorted(map(list, of_rates)) == (sorted(ends) if measure == "recall_at_1" else [])

    @pytest.mark.parametrize("name", ["whole", "one eps", "many eps", "gallery only"])
    def test_whiskers_are_the_intervals_of_the_worst_cases(self, name):
        made = report(**REPORTS[name])
        recall, precision = charts(made)
        assert precision.all("polyline", "whisker") == []
        x, y = axes(recall, made)
        found = []
        for whisker in recall.all("polyline", "whisker"):
            points = [tuple(map(float, point.split(","))) for point in whisker.attrs["points"].split()]
            found.append((points[2][0], points[0][1], points[-1][1]))
        expected = []
        for target in ("gallery", "query"):
            if any(worst.target == target for worst in made.worst):
                for eps, value in made.curve("recall_at_1", target).items():
                    low, high = interval(value)[0]
                    expected.append((x(eps), y(low), y(high)))
        assert len(found) == len(expected)
        for whisker, place in zip(found, expected, strict=True):
            assert whisker == pytest.approx(place, abs=0.06)

    def test_numbers(self):
        made = report()
        for figure, measure in zip(charts(made), ("recall_at_1", "map_at_r"), strict=True):
            grid = rows(figure.all("table")[0])
            radii = ((0.0, "0"), (EPS[0], "4/255"), (EPS[1], "0.1"), (EPS[2], "26/255"))
            assert grid[0] == [("eps", []), *(number(shown, eps) for eps, shown in radii)]
            found = {row[0][0]: row[1:] for row in grid[1:]}
            assert len(found) == 5
            for name, target in (("margin", "query"), ("square", "query"), ("demote", "gallery")):
                values = [r.measures[measure] for r in made.attacks if (r.attack, r.target) == (name, target)]
                assert found[name] == [Measured(measure, value) for value in (made.clean[measure], *values)]
            for target in ("query", "gallery"):
                assert found[f"worst ({target})"] == [
                    Measured(measure, v) for v in made.curve(measure, target).values()
                ]

    def test_one_name_on_both_targets_stays_two_lines(self):
        figure, _ = charts(report(attacks=(("same", "query"), ("same", "gallery"))))
        assert {("query one", "same"), ("gallery one", "same")} < set(curves(figure))

    def test_without_attacks(self):
        assert section(render(report(**REPORTS["no attacks"])), "Curves").text.split() == [
            "Curves",
            "No",
            "attack",
            "ran.",
        ]

    def test_only_measures_that_there_are(self):
        made = report()
        parts = [replace(part, measures={"recall_at_1": 0.5}) for part in (*made.attacks, *made.worst)]
        made = replace(made, clean={"recall_at_1": 0.7}, attacks=tuple(parts[:9]), worst=tuple(parts[9:]))
        assert len(charts(made)) == 1

    def test_too_many_attacks_are_not_named(self):
        for figure in charts(report(**REPORTS["many attacks"])):
            named = {text.text for text in figure.all("text", "name")}
            assert named <= {"worst (query)", "chance"}
            assert "worst (query)" in named


def charts(made):
    return section(render(made), "Curves").all("figure")


def axes(figure, made):
    """eps -> x and value -> y, from the numbers that stand at the axes."""
    texts = [
        (node.text, float(node.attrs["x"]), float(node.attrs["y"]), node.attrs["class"]) for node in figure.all("text")
    ]
    levels = [(float(text) / 100, y - 4) for text, _, y, class_ in texts if class_ == "end"]
    (low, bottom), (high, top) = min(levels), max(levels)
    (zero,) = (x for text, x, _, class_ in texts if class_ == "middle" and text == "0")
    right = max(x for text, x, _, class_ in texts if class_ == "middle" and not text.startswith("eps"))
    largest = max(result.eps for result in made.attacks)
    return (
        lambda eps: zero + (right - zero) * eps / largest,
        lambda value: bottom + (top - bottom) * (value - low) / (high - low),
    )


def assert_at(drawn, expected):
    assert len(drawn) == len(expected)
    for point, place in zip(drawn, expected, strict=True):
        assert point == pytest.approx(place, abs=0.06)


class TestAttacks:
    def test_every_number(self):
        made = report()
        grid = rows(section(render(made), "Attacks").all("table")[0])
        names = ["recall_at_1", "recall_at_8", "map_at_r", "r_precision"]
        assert [text for text, _ in grid[0]] == [
            *(
                "eps",
                "attack",
                "perturbs",
                "access",
                "R@1",
                "R@8",
                "mAP@R",
                "R-prec",
                "shift",
                "forward",
                "backward",
                "seconds",
            )
        ]
        empty = ("", [])
        clean = [Measured(name, made.clean[name]) for name in names]
        expected = [[empty, ("none", []), empty, empty, *clean, *[empty] * 4]]
        for eps, shown in zip(EPS, ("4/255", "0.1", "26/255"), strict=True):
            for r in (r for r in made.attacks if r.eps == eps):
                access = "black box" if r.attack == "square" else "white box"
                head = [number(shown, eps), (r.attack, []), (r.target, []), (access, [])]
                costs = [
                    number(f"{r.shift:.3f}", r.shift),
                    number(f"{r.forward_passes:,}", r.forward_passes),
                    number(f"{r.backward_passes:,}", r.backward_passes),
                    number(f"{r.seconds:.1f}", r.seconds),
                ]
                expected.append([*head, *(Measured(name, r.measures[name]) for name in names), *costs])
            for w in (w for w in made.worst if w.eps == eps):
                head = [number(shown, eps), ("worst case", []), (w.target, []), empty]
                expected.append([*head, *(Measured(name, w.measures[name]) for name in names), *[empty] * 4])
        assert grid[1:] == expected

    def test_worst_cases_are_marked(self):
        table = section(render(report()), "Attacks").all("table")[0]
        marked = [row for row in table.all("tr") if row.attrs.get("class") == "worst"]
        assert len(marked) == 6
        assert all("worst case" in row.text for row in marked)

    @each_report
    def test_each_head_says_what_it_heads_and_rows_are_full(self, name):
        for table in Tree(page_of(name)).root.all("table"):
            assert all("scope" in head.attrs for head in table.all("th"))
            assert len({len(row) for row in rows(table)}) == 1
            assert table.attrs["aria-label"]


class TestEmbedding:
    def test_every_number(self):
        made = report()
        grid = [row[:2] for row in rows(section(render(made), "Embedding").all("table")[0])]
        assert grid[1:4] == [
            [("mean similarity", []), number("0.432", 0.4321)],
            [("effective rank", []), number("12.346", 12.3456)],
            [("NMI, percent", []), percent(made.nmi)],
        ]
        attacked = [(w.eps, w.nmi) for w in made.worst if w.target == "query"]
        shown = ("4/255", "0.1", "26/255")
        assert grid[4:] == [
            [number(f"NMI at eps {text}, percent", eps), percent(nmi)]
            for text, (eps, nmi) in zip(shown, attacked, strict=True)
        ]

    def test_an_nmi_of_zero_is_one(self):
        made = report(nmi=0.0)
        made = replace(made, worst=tuple(replace(worst, nmi=0.0) for worst in made.worst))
        assert render(made).count("percent</th>") == 1 + len(made.worst)

    def test_each_sign_is_explained(self):
        known = dict.fromkeys(
            ("mean_similarity", "mean_similarity_same", "mean_similarity_other", "effective_rank"), 0.5
        )
        grid = rows(section(render(report(collapse=known)), "Embedding").all("table")[0])
        assert all(row[2][0] for row in grid)
        assert len({row[2][0] for row in grid[1:6]}) == 5

    def test_without_nmi(self):
        made = report(nmi=None)
        made = replace(made, worst=tuple(replace(worst, nmi=None) for worst in made.worst))
        assert "NMI" not in render(made)


class TestExamples:
    def test_every_picture(self):
        one = example()
        found = pictures(render(report(examples=(one,))))
        difference, factor = one.perturbed - one.clean, 5
        expected = {
            "query 3, clean": one.clean,
            "query 3, perturbed": one.perturbed,
            "query 3, perturbed less clean, times 5, about grey": 0.5 + factor * difference,
            **{f"item {n.item}, class {n.label}, {'right' if n.label == 7 else 'wrong'}": n.image for n in one.before},
            **{f"item {n.item}, class {n.label}, {'right' if n.label == 7 else 'wrong'}": n.image for n in one.after},
        }
        assert list(found) == list(expected)
        for alt, image in expected.items():
            assert torch.equal(found[alt], levels(image)), alt

    def test_caption(self):
        shown = example(), example(4, succeeded=False, name="a b"), example(5, attack="none", succeeded=False)
        page = section(render(report(examples=shown)), "Queries, before and after")
        assert [caption.text for caption in page.all("figcaption")] == [
            "Query 3, class 7; broken by margin, eps 0.1",
            "Query 4, class a b; no attack broke it; the strongest attempt: margin, eps 0.1",
            "Query 5, class 7; no attack was tried",
        ]

    def test_classes_have_the_names_that_the_images_came_with(self):
        one = example()
        named = replace(one, after=tuple(replace(n, name=f"class {n.label}") for n in one.after))
        found = section(render(report(examples=(named,))), "Queries, before and after").all("div", "finds")
        assert [item.text.strip() for item in found[1].all("li")] == ["✗ class 9", "✓ class 7", "✗ class 5"]

    def test_right_and_wrong_are_told_without_colour(self):
        one = example()
        found = section(render(report(examples=(one,))), "Queries, before and after")
        marks = [[item.text.strip() for item in part.all("li")] for part in found.all("div", "finds")]
        assert marks == [["✓ 7", "✓ 7", "✗ 2"], ["✗ 9", "✓ 7", "✗ 5"]]
        assert [part.all("h3")[0].text for part in found.all("div", "finds")] == ["finds, clean", "finds, perturbed"]
        classes = [item.attrs["class"] for item in found.all("li")]
        assert classes == ["right", "right", "wrong", "wrong", "right", "wrong"]

    def test_small_images_are_drawn_in_squares(self):
        page = render(report(examples=(example(1, (1, 8, 8)), example(2, (1, 224, 224)))))
        drawn = [(img.attrs["width"], img.attrs.get("class")) for img in Tree(page).root.all("img")]
        assert drawn == [("8", "pixelated")] * 9 + [("224", None)] * 3 + [("112", None)] * 6


def pictures(page):
    return {img.attrs["alt"]: decoded(img.attrs["src"]) for img in Tree(page).root.all("img")}


class TestProvenance:
    def test_every_entry_in_words(self):
        grid = rows(section(render(report()), "What was measured, and where").all("table")[0])
        assert [[text for text, _ in row] for row in grid] == [
            ["what", "value"],
            ["model: class", "Net"],
            ["model: sha256", "ab12" * 16],
            ["queries: images", "12386"],
            ["queries: hashed", "1024"],
            ["queries: sha256", "cd34" * 16],
            ["gallery", "the queries"],
            ["autocast", "none"],
            ["cudnn benchmark", "yes"],
            ["command", "python -m 'a b'"],
        ]


class TestSettings:
    def test_are_json_that_says_it_all(self):
        made = report()
        part = section(render(made), "To measure it again")
        assert json.loads(part.all("pre")[0].text) == {
            "suite": made.suite,
            "protocol": made.protocol,
            "settings": made.settings,
            "versions": made.versions,
        }
        assert "open" not in part.all("details")[0].attrs
        assert len(part.all("pre")[0].text.splitlines()) == 13


PROBE = """
<script>
document.querySelectorAll("details").forEach(d => d.open = true);
const luminance = c => c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const colour = text => text.match(/[\\d.]+/g).map(Number);
const behind = e => { for (; e; e = e.parentElement) {
  const c = colour(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c.slice(0, 3); }
  return [255, 255, 255]; };
const contrast = e => { const s = getComputedStyle(e), ink = e.closest("svg") ? s.fill : s.color;
  const [a, b] = [luminance(colour(ink).slice(0, 3)), luminance(behind(e))];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };
const written = e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
const size = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
onload = () => parent.postMessage({
  width: innerWidth,
  scroll: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  images: [...document.images].map(i => i.complete ? i.naturalWidth : 0),
  shown: [...document.images].map(size),
  svgs: [...document.querySelectorAll("svg")].map(size),
  wide: [...document.querySelectorAll("main *")].filter(
    e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + .5).map(e => e.outerHTML.slice(0, 80)),
  faint: [...document.querySelectorAll("main *")].filter(e => written(e) && e.tagName != "title" && contrast(e) < 4.5)
    .map(e => e.outerHTML.slice(0, 80)),
}, "*");
</script>
"""
FRAME = """<!DOCTYPE html><iframe src="{}" style="width:{}px;height:2000px;border:0"></iframe><pre></pre>
<script>onmessage = e => document.querySelector("pre").textContent = JSON.stringify(e.data)</script>"""


@pytest.fixture
def chromium(tmp_path):
    """file, arguments -> standard output and what was written to the console."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing = "no chromium on this machine: the page is not looked at in a browser"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)

    def run(file: Path, *arguments: str) -> tuple[str, list[str]]:
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000")
        own = (f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0")
        command = [program, *options, *own, *arguments, file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


@pytest.mark.slow
class TestInABrowser:
    def probed(self, chromium, folder, page, width, *arguments):
        """What a browser measures in a copy of the page with a script, in a frame of some width."""
        without_policy = re.sub(r"<meta http-equiv[^>]*>", "", page)
        (folder / "probed.html").write_text(without_policy.replace("</body>", PROBE + "</body>"), encoding="utf-8")
        (folder / "frame.html").write_text(FRAME.format("probed.html", width), encoding="utf-8")
        dom, console = chromium(folder / "frame.html", "--window-size=1400,2100", "--dump-dom", *arguments)
        assert console == []
        return json.loads(Tree(dom).root.all("pre")[0].text)

    @pytest.mark.parametrize("name", ["whole", "flagged", "no examples", "no attacks", "large images"])
    def test_opens_without_a_complaint(self, chromium, tmp_path, name):
        (tmp_path / "page.html").write_text(page_of(name), encoding="utf-8")
        dom, console = chromium(tmp_path / "page.html", "--dump-dom")
        assert console == []
        assert "To measure it again" in dom

    def test_a_complaint_would_be_seen_and_scripts_do_not_run(self, chromium, tmp_path):
        page = render(report()).replace("</body>", "<script>document.title = 'ran'</script></body>")
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        dom, console = chromium(tmp_path / "page.html", "--dump-dom")
        assert "Content Security Policy" in console[0]
        assert "<title>ran" not in dom

    @pytest.mark.parametrize("width", [400, 1280])
    @pytest.mark.parametrize("name", ["whole", "flagged", "many attacks", "long names", "large images", "odd channels"])
    def test_is_laid_out(self, chromium, tmp_path, name, width):
        made = report(**REPORTS[name])
        found = self.probed(chromium, tmp_path, render(made), width)
        assert found["width"] == width
        assert found["scroll"] <= width
        assert found["wide"] == []
        assert len(found["images"]) == sum(3 + len(part.before) + len(part.after) for part in made.examples)
        assert min(found["images"]) > 0
        assert min(min(size) for size in found["shown"]) > 30
        assert len(found["svgs"]) == 2 + len({worst.target for worst in made.worst})
        assert min(min(size) for size in found["svgs"]) > 10
        assert sum(min(size) > 150 for size in found["svgs"]) == 2

    @pytest.mark.parametrize("dark", [False, True])
    def test_is_legible(self, chromium, tmp_path, dark):
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        found = self.probed(chromium, tmp_path, render(report(checks=FLAGGED)), 1280, scheme)
        assert found["dark"] is dark
        assert found["faint"] == []

    def test_looks_at_what_is_wrong(self, chromium, tmp_path):
        bad = "<div style='width:2000px;color:#777;background:#888'>a</div><img src='data:image/png;base64,AAAA'>"
        page = render(report()).replace("</main>", bad + "</main>")
        found = self.probed(chromium, tmp_path, page, 1280)
        assert found["scroll"] > 1280
        assert len(found["wide"]) == len(found["faint"]) == 1
        assert min(found["images"]) == 0

    def test_a_picture_is_taken(self, chromium, tmp_path):
        (tmp_path / "page.html").write_text(render(report()), encoding="utf-8")
        chromium(tmp_path / "page.html", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1280,3000")
        with Image.open(tmp_path / "page.png") as picture:
            assert picture.size == (1280, 3000)
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100

    def test_is_printed(self, chromium, tmp_path):
        (tmp_path / "page.html").write_text(render(report()), encoding="utf-8")
        chromium(tmp_path / "page.html", f"--print-to-pdf={tmp_path / 'page.pdf'}")
        assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
