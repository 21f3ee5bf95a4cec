"""The page of several models: each number stands where it belongs."""

import re
from dataclasses import replace

import pytest
from made_reports import EPS, report
from page_trees import Tree, curves
from query_batches import images_of, network

from pml_adversarial import InputError
from pml_adversarial.evaluation import Comparison, compare, evaluate_robustness, quick, save_comparison
from pml_adversarial.evaluation.reports.html import render_several
from pml_adversarial.evaluation.reports.results import Check

SAME = Comparison(12345, (), ("odd",))
HOSTILE = '<b onclick="x">&amp;'


@pytest.fixture(scope="module")
def reports():
    options = {"eps": (4 / 255, 0.05), "attacks": quick(2, 1), "checks": False}
    return {f"model {seed}": evaluate_robustness(network(seed), images_of(), **options) for seed in (5, 6, 7)}


@pytest.fixture
def page(reports, tmp_path):
    save_comparison(reports, tmp_path / "page.html")
    return Tree((tmp_path / "page.html").read_text(encoding="utf-8")).root


def cells(row):
    return [float(data.attrs["value"]) for data in row.all("data")]


def test_rates_with_their_intervals(reports, page):
    head, *rows = page.all("table")[0].all("tr")
    assert [cell.text for cell in head.all("th")] == ["model", "clean", "eps 4/255", "eps 0.05"]
    for row, (name, found) in zip(rows, reports.items(), strict=True):
        assert row.all("th")[0].text == f"● {name}"
        expected = [[found.worst_case(eps), *found.interval(eps)] for eps in (0, 4 / 255, 0.05)]
        assert cells(row) == [value for part in expected for value in part]


def test_a_curve_for_each_model(reports, page):
    drawn = curves(page.all("figure")[0])
    assert list(drawn) == [(f"model{i} worst", f"model {i + 4}") for i in (1, 2, 3)]
    heights = {name: [y for _, y in points] for (_, name), points in drawn.items()}
    clean = {name: found.clean["recall_at_1"] for name, found in reports.items()}
    assert sorted(clean, key=clean.get) == sorted(heights, key=lambda name: -heights[name][0])
    labels = [text.text for text in page.all("figure")[0].all("text", "name")]
    assert sorted(labels) == sorted([*reports, "chance"])


def test_each_later_model_is_compared_with_the_first(reports, page):
    first, *others = reports.values()
    tables = page.all("table")[1:-1]
    assert len(tables) == 2
    for table, other in zip(tables, others, strict=True):
        rows = table.all("tr")[1:]
        for row, one in zip(rows, compare(first, other).differences, strict=True):
            eps = [one.eps] if one.eps else []
            assert cells(row) == [*eps, one.difference, one.only_first, one.only_second, one.p_value]
            assert [f"{100 * end:+.1f}" for end in one.interval] == re.findall(r"[+-][\d.]+", row.all("span")[0].text)


def test_what_speaks_against_a_model(tmp_path):
    checks = (Check("noise", False, "some"), Check("b", True, "x"), Check("c", None, "y"))
    models = {HOSTILE: report(), "other": report(checks=checks)}
    tree = Tree(render_several(models, [SAME])).root
    (warning,) = tree.all("section", "warning")
    assert "robustness of other may be lower" in warning.text
    assert [item.text for item in warning.all("li")] == ["noise: some"]
    believed = tree.all("table")[-1].all("tr")[1:]
    assert [row.all("th")[0].text for row in believed] == [HOSTILE, "other"]
    assert [item.text for item in tree.all("ul", "quiet")[0].all("li")] == ["odd"]
    assert "2 of 3 checks passed, 1 gave no evidence." in believed[0].text
    assert "1 of 3 checks passed, 1 raised a flag, 1 gave no evidence." in believed[1].text


def test_both_targets_have_a_table_and_a_chart():
    tree = Tree(render_several({"a": report(), "b": report()}, [SAME])).root
    assert len(tree.all("figure")) == len(tree.all("caption")) == 2
    for target, table in zip(("query", "gallery"), tree.all("table"), strict=False):
        (_, row, _) = table.all("tr")
        assert cells(row)[3::3] == [report().worst_case(eps, target=target) for eps in EPS]


def test_needs_no_network_and_runs_nothing(page):
    assert {node.tag for node in page.everything()}.isdisjoint({"script", "link", "iframe", "object", "form", "img"})
    assert {name for node in page.everything() for name in node.attrs} & {"href", "src", "onclick"} == set()


def test_without_attacks():
    made = report(attacks=(), worst=())
    assert "No attack ran." in render_several({"a": made, "b": made}, [SAME])


@pytest.mark.parametrize("count", [0, 1, 7])
def test_how_many(reports, tmp_path, count):
    some = dict.fromkeys(map(str, range(count)), reports["model 5"])
    with pytest.raises(InputError, match=rf"Found {count} report\(s\); expected 2 to 6"):
        save_comparison(some, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_other_queries_are_refused(reports, tmp_path):
    other = replace(reports["model 6"], num_queries=23)
    with pytest.raises(InputError, match="not on the same queries"):
        save_comparison({"a": reports["model 5"], "b": other}, tmp_path / "page.html")
