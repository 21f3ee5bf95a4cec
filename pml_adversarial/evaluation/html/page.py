"""Fills the templates of the HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ..results import TARGETS, Example, Neighbour, Results, WorstCase, heading
from .charts import Chart, Line, chart, radius
from .pictures import Picture, magnified, picture, small, visible

if TYPE_CHECKING:
    from jinja2 import Environment

_THUMBNAIL = 64


@dataclass(frozen=True)
class _Figure:
    """A measure over eps: its curves, its chart, and a description for readers who do not see the chart."""

    measure: str
    lines: Sequence[Line]
    chart: Chart
    description: str


@dataclass(frozen=True)
class _ExamplePictures:
    """An example with its pictures: of the query, and of the items that it finds, under a title."""

    example: Example
    query: Sequence[Picture]
    found: Mapping[str, Sequence[tuple[bool, Picture]]]


def render(results: Results) -> str:
    """Results as one complete HTML page."""
    norm = str(results.settings.get("norm", ""))
    measures = [name for name in ("recall_at_1", "map_at_r") if name in results.clean] if results.attacks else []
    cases = {target: [worst for worst in results.worst if worst.target == target] for target in TARGETS}
    return (
        environment()
        .get_template("page.html")
        .render(
            results=results,
            norm=norm,
            radii=sorted({result.eps for result in results.attacks} | {worst.eps for worst in results.worst}),
            targets=[target for target in TARGETS if cases[target]],
            headline_cases={target: _few(cases[target]) for target in TARGETS},
            num_attacks={t: len({part.attack for part in results.attacks if part.target == t}) for t in TARGETS},
            figures=[_figure(results, measure, norm) for measure in measures],
            examples=[_pictures(example) for example in results.examples],
            settings=_settings(results),
        )
    )


@cache
def environment() -> Environment:
    """The templates; all text that they are filled with is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # takes a while to import

    found = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"heading": heading, "radius": radius}
    return found


def _few(cases: Sequence[WorstCase]) -> Sequence[WorstCase]:
    """All cases if there are up to four, else those of the smallest, the middle and the largest eps."""
    cases = sorted(cases, key=lambda worst: worst.eps)
    return cases if len(cases) <= 4 else [cases[0], cases[len(cases) // 2], cases[-1]]


def _figure(results: Results, measure: str, norm: str) -> _Figure:
    lines = _lines(results, measure)
    worst = "; ".join(
        f"{line.name}: " + ", ".join(f"{100 * value:.1f} at eps {eps:.4g}" for eps, value in line.points)
        for line in lines
        if line.worst
    )
    chance = results.chance if measure == "recall_at_1" else None
    description = f"{heading(measure)} in percent against eps. {worst}."
    return _Figure(measure, lines, chart(lines, norm, chance), description)


def _lines(results: Results, measure: str) -> list[Line]:
    """One line per attack, then the worst cases, which are drawn above them."""
    clean = (0.0, results.clean[measure])
    points: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    for result in results.attacks:
        points.setdefault((result.attack, result.target, False), []).append((result.eps, result.measures[measure]))
    for worst in sorted(results.worst, key=lambda worst: worst.target == "query"):
        key = (f"worst ({worst.target})", worst.target, True)
        points.setdefault(key, []).append((worst.eps, worst.measures[measure]))
    return [Line(*key, (clean, *sorted(values))) for key, values in points.items()]


def _pictures(example: Example) -> _ExamplePictures:
    difference, factor = magnified(example.clean, example.perturbed)
    query = f"query {example.query}"
    triple = [
        picture(visible(example.clean), f"{query}, clean", "clean"),
        picture(visible(example.perturbed), f"{query}, perturbed", "perturbed"),
        picture(
            difference, f"{query}, perturbed less clean, times {factor}, about grey", f"difference \u00d7 {factor}"
        ),
    ]
    found = {"finds, clean": example.before, "finds, perturbed": example.after}
    thumbnails = {title: [_thumbnail(item, example.label) for item in items] for title, items in found.items()}
    return _ExamplePictures(example, triple, thumbnails)


def _thumbnail(item: Neighbour, label: int) -> tuple[bool, Picture]:
    """Whether an item is right for a query with this label, and its picture."""
    right = item.label == label
    description = f"item {item.item}, label {item.label}, {'right' if right else 'wrong'}"
    return right, picture(small(visible(item.image), _THUMBNAIL), description, f"{'✓' if right else '✗'} {item.label}")


def _settings(results: Results) -> str:
    """All that is needed to repeat the evaluation, as JSON with one line per setting, however long its value."""
    parts = {"suite": json.dumps(results.suite), "protocol": json.dumps(results.protocol)}
    groups = {"settings": results.settings, "versions": results.versions}
    return _json_object({**parts, **{name: _json_values(values) for name, values in groups.items()}})


def _json_values(values: Mapping[str, object]) -> str:
    return _json_object({key: json.dumps(value, allow_nan=False) for key, value in values.items()}, "  ")


def _json_object(values: Mapping[str, str], indent: str = "") -> str:
    lines = [f"{indent}  {json.dumps(key)}: {value}" for key, value in values.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
