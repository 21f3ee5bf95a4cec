"""Where a chart's parts stand, against the same places by hand and as drawn by the template."""

from itertools import pairwise

import pytest
from page_trees import Tree, curves

from pml_adversarial.evaluation.reports.html.charts import Line, chart, spread
from pml_adversarial.evaluation.reports.html.page import environment


def drawn(lines, chance=None):
    template = environment().get_template("chart.svg")
    return Tree(template.render(chart=chart(lines, "Linf", chance), description="label")).root


def test_the_style_of_a_line_follows_from_what_it_shows():
    assert Line("margin", "query", False, ()).kind == "query one"
    assert Line("worst", "gallery", True, ()).kind == "gallery worst"
    assert Line("a model", "gallery", True, (), colour="model2").kind == "model2 worst"


def test_points_stand_on_straight_scales():
    points = (((0.0, 0.7), (0.05, 0.6), (0.2, 0.1)), ((0.0, 0.7), (0.1, 0.33)))
    found = chart([Line(f"a{i}", "query", False, part) for i, part in enumerate(points)], "Linf", 0.25)
    assert max(found["levels"]) == 80  # the next level above 70 percent

    def y(value):
        return found["bottom"] + (found["levels"][80] - found["bottom"]) * value / 0.8

    for (line, drawn_points, whiskers), part in zip(found["curves"], points, strict=True):
        assert line.points == part
        assert whiskers == []
        for (x, height), (eps, value) in zip(drawn_points, part, strict=True):
            assert x == pytest.approx(found["left"] + (found["right"] - found["left"]) * eps / 0.2, abs=0.06)
            assert height == pytest.approx(y(value), abs=0.06)
    assert all(height == pytest.approx(y(percent / 100), abs=0.06) for percent, height in found["levels"].items())
    assert found["chance"] == pytest.approx(y(0.25), abs=0.06)
    assert [(name, kind) for name, kind, *_ in found["labels"]] == [("chance", "level")]


def test_whiskers_reach_from_one_end_of_the_interval_to_the_other_and_stay_inside():
    intervals = ((0.6, 0.93), (0.0, 0.3))
    made = [Line("worst", "query", True, ((0.0, 0.8), (0.2, 0.1)), intervals)]
    found = chart(made, "Linf")
    assert max(found["levels"]) == 100  # the highest interval ends above 80 percent
    height = found["bottom"] - found["levels"][100]
    ((_, points, whiskers),) = found["curves"]
    for (x, _), (at, low, high), interval in zip(points, whiskers, intervals, strict=True):
        assert at == x
        assert (low, high) == pytest.approx([found["bottom"] - height * end for end in interval], abs=0.06)
    tree = drawn(made)
    drawn_at = [
        [tuple(map(float, p.split(","))) for p in w.attrs["points"].split()] for w in tree.all("polyline", "whisker")
    ]
    assert [{y for _, y in part} for part in drawn_at] == [{low, high} for _, low, high in whiskers]
    for part, (x, _, _) in zip(drawn_at, whiskers, strict=True):
        assert {at for at, _ in part} == {x - 4, x, x + 4}
    assert curves(tree) == {("query worst", "worst"): points}


def test_without_chance_no_line_is_drawn_for_it():
    found = chart([Line("a", "query", False, ((0.0, 0.7), (0.1, 0.2)))], "Linf")
    assert found["chance"] is None
    assert found["labels"] == []


def test_each_eps_has_a_tick_and_a_number_where_there_is_room():
    radii = (0.0, 0.001, 0.1, 0.101, 0.2)
    found = chart([Line("a", "query", False, tuple((eps, 0.5) for eps in radii))], "Linf")
    assert [text for _, text in found["ticks"]] == ["0.2", "0.101", "", "", "0"]
    assert [x for x, _ in found["ticks"]] == [x for x, _ in reversed(found["curves"][0][1])]


def test_only_the_worst_case_and_chance_are_named():
    lines = [Line(f"a{i}", "query", False, ((0.0, 0.7), (0.1, 0.2))) for i in range(10)]
    lines.append(Line("worst", "query", True, ((0.0, 0.7), (0.1, 0.1))))
    found = chart(lines, "Linf", 0.25)
    assert [name for name, *_ in found["labels"]] == ["worst", "chance"]
    assert len(found["curves"]) == 11


def test_a_curve_of_zeros_lies_at_the_bottom():
    found = chart([Line("a", "query", False, ((0.0, 0.0),))], "Linf", 0.0)
    assert found["curves"][0][1] == [(found["left"], found["bottom"])]


@pytest.mark.parametrize("highest", [0.03, 0.2, 0.41, 0.99, 1.0])
def test_curves_fill_the_height_and_do_not_leave_it(highest):
    tree = drawn([Line("a", "query", True, ((0.0, highest), (0.1, 0.0)))])
    levels = [float(line.attrs["y1"]) for line in tree.all("line", "grid")]
    heights = [y for _, y in curves(tree)["query worst", "a"]]
    assert min(levels) < 20
    assert min(levels) - 0.1 <= min(heights) <= max(heights) == max(levels)
    assert max(heights) - min(heights) > min(1, 4.9 * highest) * 0.5 * (max(levels) - min(levels))


def test_names_do_not_overlap():
    tree = drawn([Line(f"a{i}", "query", True, ((0.0, 0.9), (0.1, 0.02 * (i % 3)))) for i in range(15)], 0.2)
    heights = sorted(float(text.attrs["y"]) for text in tree.all("text", "name"))
    assert len(heights) == 16
    assert min(b - a for a, b in pairwise(heights)) > 12


@pytest.mark.parametrize("places", [[3.0], [5, 5, 5], [9, 1, 5], [50, 50, 50], [0, 0, 48, 50], [-9, 70], []])
def test_spread(places):
    moved = spread(places, 10, 0, 50)
    order = sorted(range(len(places)), key=lambda i: places[i])
    assert [moved[i] for i in order] == sorted(moved)
    assert all(b - a >= 10 for a, b in pairwise(sorted(moved)))
    assert all(0 <= place <= 50 for place in moved)
