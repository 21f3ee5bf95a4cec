"""`Report.plot`, `Report.to_pandas` and what a notebook shows."""

import math
import sys

import matplotlib
import pytest
from made_reports import EPS, report
from page_trees import Tree

from pml_adversarial import InputError

matplotlib.use("Agg")


class TestPlot:
    def test_the_worst_case_its_interval_and_chance(self):
        from matplotlib import pyplot

        made = report()
        figure, axes = made.plot()
        try:
            lines = {line.get_label(): line for line in axes.get_lines()}
            worst = lines["worst case per query"]
            assert list(worst.get_xdata()) == [0, *EPS]
            assert list(worst.get_ydata()) == [100 * value for value in made.curve().values()]
            assert set(lines["chance"].get_ydata()) == {100 * made.chance}
            assert len(lines) == 4  # and two attacks on queries
            (band,) = axes.collections
            low, high = made.interval(EPS[0])
            edges = [y for x, y in band.get_paths()[0].vertices if math.isclose(x, EPS[0])]
            assert sorted({round(y, 9) for y in edges}) == [round(100 * low, 9), round(100 * high, 9)]
            assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "4/255", "0.1", "26/255"]
            assert axes.get_xlabel() == "eps (Linf), the query perturbed"
            assert axes.figure is figure
        finally:
            pyplot.close(figure)

    def test_into_axes_and_of_what_is_no_rate(self):
        figure = matplotlib.figure.Figure()
        axes = figure.add_subplot()
        assert report().plot(axes, "map_at_r", "gallery") == (figure, axes)
        assert axes.get_ylabel() == "mAP@R, percent"
        assert not axes.collections
        assert "chance" not in [line.get_label() for line in axes.get_lines()]

    def test_what_was_not_measured(self):
        with pytest.raises(InputError, match=r"recall_at_3 at eps=0\.0 on query was not measured"):
            report().plot(measure="recall_at_3")

    def test_without_matplotlib(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        with pytest.raises(InputError, match="with matplotlib, which is not installed; install it with: pip install"):
            report().plot()


class TestPandas:
    def test_a_row_for_each_result(self):
        made = report()
        frame = made.to_pandas()
        assert len(frame) == 1 + len(made.attacks) + len(made.worst)
        assert list(frame.attack) == ["none", *(a.attack for a in made.attacks), *["worst case"] * len(made.worst)]
        assert list(frame.target) == ["", *(part.target for part in (*made.attacks, *made.worst))]
        for row, part in zip(frame.to_dict("records")[1:], (*made.attacks, *made.worst), strict=True):
            assert row["eps"] == part.eps
            assert {name: row[name] for name in part.measures} == part.measures
            for name, interval in made.intervals(part.measures).items():
                assert (row[f"{name}_low"], row[f"{name}_high"]) == tuple(interval)
        assert frame.seconds[1] == made.attacks[0].seconds
        assert "map_at_r_low" not in frame

    def test_without_pandas(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(InputError, match="makes a data frame with pandas, which is not installed"):
            report().to_pandas()


def test_a_notebook_shows_the_worst_cases():
    made = report()
    tree = Tree(made._repr_html_()).root
    said = "12,345 queries (41 left out). 2 of 3 checks passed, 1 gave no evidence."
    assert tree.all("caption")[0].text.endswith(said)
    assert "12,345 queries. " in report(left_out=0)._repr_html_()
    values = [[float(data.attrs["value"]) for data in row.all("data")] for row in tree.all("tr")[1:]]
    assert values == [list(made.clean.values()), *([w.eps, *w.measures.values()] for w in made.worst)]
