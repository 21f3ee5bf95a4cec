"""What the pictures of the demo show, read back from vector graphics."""

import base64
import io
import re

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from pml_adversarial.cli.figures import query_panel, recall_curves

GREEN, RED = "#1b7f4d", "#c0392b"
CURVES = {"plain": {0.0: 0.9, 0.1: 0.5, 0.2: 0.2}, "adversarial": {0.0: 0.8, 0.05: 0.75, 0.2: 0.6}}
CHANCE = 0.25


class Angle(nn.Module):
    """Embeds an image by its brightness, so that the nearest item is the one that is about as bright."""

    def forward(self, x):
        angle = x.flatten(1).mean(1)
        return torch.stack([angle.cos(), angle.sin()], 1)


def texts(svg):
    """All that is written."""
    return re.findall(r"<!-- (.*?) -->", svg, re.DOTALL)


class TestRecallCurves:
    @pytest.fixture
    def svg(self, tmp_path):
        recall_curves(CURVES, CHANCE, tmp_path / "curves.svg")
        return (tmp_path / "curves.svg").read_text()

    def lines(self, svg):
        """Points of every line across the axes."""
        found = re.findall(r'<path d="([^"]*?)" clip-path="[^"]*" style="fill: none;[^"]* stroke: ([^;"]*)', svg)
        points = [(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), colour) for path, colour in found]
        return [([(float(x), float(y)) for x, y in line], colour) for line, colour in points]

    def test_each_curve_goes_through_its_points(self, svg):
        lines = [points for points, colour in self.lines(svg) if colour in ("#7f7f7f", "#1f5fa8")]
        values = [value for curve in CURVES.values() for value in curve.items()]
        drawn = [point for line in lines for point in line]
        assert [len(line) for line in lines] == [len(curve) for curve in CURVES.values()]
        for axis in (0, 1):  # one scale for all of them
            scale, offset = numpy.polyfit([value[axis] for value in values], [point[axis] for point in drawn], 1)
            for value, point in zip(values, drawn, strict=True):
                assert point[axis] == pytest.approx(scale * value[axis] + offset, abs=0.01)
            assert (scale > 0) == (axis == 0)  # in an SVG, y counts from the top

    def test_chance_is_a_line_across(self, svg):
        ((left, right),) = [points for points, colour in self.lines(svg) if colour == "#000000"]
        assert left[0] < right[0]
        assert left[1] == right[1]
        (plain, *_) = (points for points, colour in self.lines(svg) if colour == "#7f7f7f")
        per_unit = (plain[2][1] - plain[0][1]) / (0.2 - 0.9)
        assert left[1] == pytest.approx(plain[0][1] + (CHANCE - 0.9) * per_unit, abs=0.01)

    def test_says_what_is_drawn(self, svg):
        written = texts(svg)
        for expected in (
            "plain",
            "adversarial",
            "chance",
            "eps (l-inf, pixels in [0, 1])",
            "R@1, worst case per query",
        ):
            assert expected in written


class TestQueryPanel:
    """Of every query two halves, clean and attacked: the query and the five nearest items."""

    BRIGHTNESS = (0.1, 0.14, 0.2, 0.3, 0.42, 0.58, 0.75, 0.88)
    LABELS = (4, 4, 5, 5, 4, 4, 5, 5)
    ATTACKED = (0.52, 0.12, 0.25, 0.8, 0.2, 0.65, 0.3, 0.4)
    QUERIES = (0, 6)

    def images(self, brightness):
        return torch.tensor(brightness).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)

    def cells(self, svg):
        """Brightness of every image that is shown."""
        for data in re.findall(r'"data:image/png;base64,\s*([^"]*)"', svg):
            pixels = numpy.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
            yield 1 - float(numpy.median(pixels)) / 255  # dark is high

    def drawn(self, tmp_path, models, queries):
        clean = self.images(self.BRIGHTNESS)
        query_panel(models, clean, torch.tensor(self.LABELS), queries, 0.1, tmp_path / "panel.svg")
        return (tmp_path / "panel.svg").read_text()

    def test_shows_the_nearest_others(self, tmp_path):
        svg = self.drawn(tmp_path, {"plain": (Angle(), self.images(self.ATTACKED))}, self.QUERIES)
        expected, frames = [], []
        for query in self.QUERIES:
            for brightness in (self.BRIGHTNESS[query], self.ATTACKED[query]):
                others = [item for item in range(8) if item != query]
                nearest = sorted(others, key=lambda item: abs(self.BRIGHTNESS[item] - brightness))[:5]
                expected += [brightness, *(self.BRIGHTNESS[item] for item in nearest)]
                frames += [GREEN if self.LABELS[item] == self.LABELS[query] else RED for item in nearest]
        assert [*self.cells(svg)] == pytest.approx(expected, abs=0.01)
        drawn = re.findall(rf"stroke: ({GREEN}|{RED})", svg)
        assert drawn == [colour for frame in frames for colour in [frame] * 4]  # four sides each
        assert {GREEN, RED} == set(frames)

    def test_says_whose_queries_they_are(self, tmp_path):
        attacked = self.images(self.ATTACKED)
        svg = self.drawn(tmp_path, {"plain": (Angle(), attacked), "adversarial": (Angle(), attacked)}, self.QUERIES[:1])
        labels = [text for text in texts(svg) if text in ("plain", "adversarial") or ": " in text]
        heads = ["plain", "clean: 4", "plain", "attacked: 4", "adversarial", "clean: 4", "adversarial", "attacked: 4"]
        assert labels[: len(heads)] == heads
        assert "attacked at eps 0.1 (right)" in " ".join(texts(svg))

    def test_is_a_png_by_its_name(self, tmp_path):
        clean = self.images(self.BRIGHTNESS)
        models = {"plain": (Angle(), self.images(self.ATTACKED))}
        query_panel(models, clean, torch.tensor(self.LABELS), [0], 0.1, tmp_path / "panel.png")
        with Image.open(tmp_path / "panel.png") as picture:
            assert picture.format == "PNG"
            assert picture.width > picture.height > 100
