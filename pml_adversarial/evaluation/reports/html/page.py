"""Fills the templates of the HTML page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from ....attacks.ball import radius_text
from ..binomial import CONFIDENCE
from ..results import INTERVAL, TARGETS, Example, Neighbour, Results, WorstCase, heading
from .charts import Line, chart
from .pictures import magnified, picture, small, visible

if TYPE_CHECKING:
    from jinja2 import Environment

_THUMBNAIL = 64


def render(results: Results) -> str:
    """Results as one complete HTML page."""
    norm = str(results.settings.get("norm", ""))
    measures = [name for name in ("recall_at_1", "map_at_r") if name in results.clean] if results.attacks else []
    cases = {target: [worst for worst in results.worst if worst.target == target] for target in TARGETS}
    settings = {name: getattr(results, name) for name in ("suite", "protocol", "settings", "versions")}
    template = environment().get_template("page.html")
    return template.render(
        results=results,
        norm=norm,
        radii=sorted({result.eps for result in results.attacks} | {worst.eps for worst in results.worst}),
        targets=[target for target in TARGETS if cases[target]],
        headline_cases={target: _few(cases[target]) for target in TARGETS},
        num_attacks={t: len({part.attack for part in results.attacks if part.target == t}) for t in TARGETS},
        figures=[_figure(results, measure, norm) for measure in measures],
        examples=[_pictures(example) for example in results.examples if example.clean.ndim == 3],
        verdict=verdict(results),
        about_intervals=f"{100 * CONFIDENCE:.0f} % confidence intervals ({INTERVAL})",
        provenance=list(_entries(results.provenance)),
        settings=_json(settings, 2),
    )


def render_short(results: Results) -> str:
    """The worst cases and how the checks ended, as a table for a notebook."""
    norm, template = str(results.settings.get("norm", "")), environment().get_template("short.html")
    return template.render(results=results, norm=norm, verdict=verdict(results), measures=list(results.clean))


def verdict(results: Results) -> str:
    """How the checks ended, in a sentence."""
    total = len(results.checks)
    if not total:
        return "No check was made, so nothing here says whether the numbers can be trusted."
    passed, unknown = (sum(check.passed is state for check in results.checks) for state in (True, None))
    flags = total - passed - unknown
    more = [f"{flags} raised a flag"] * (flags > 0) + [f"{unknown} gave no evidence"] * (unknown > 0)
    return f"{passed} of {total} checks passed{''.join(f', {part}' for part in more)}."


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
    found.filters |= {"heading": heading, "radius": radius_text}
    return found


def _few(cases: Sequence[WorstCase]) -> Sequence[WorstCase]:
    """All cases if there are up to four, else those of the smallest, the middle and the largest eps."""
    cases = sorted(cases, key=lambda worst: worst.eps)
    return cases if len(cases) <= 4 else [cases[0], cases[len(cases) // 2], cases[-1]]


def _figure(results: Results, measure: str, norm: str) -> dict[str, Any]:
    """A measure over eps: its curves, its chart, and a description for readers who do not see the chart."""
    lines = _lines(results, measure)
    worst = "; ".join(f"{line.name}: {in_words(line, norm)}" for line in lines if line.worst)
    return {
        "measure": measure,
        "lines": lines,
        "chart": chart(lines, norm, results.chance if measure == "recall_at_1" else None),
        "description": f"{heading(measure)} in percent against eps. {worst}.",
    }


def in_words(line: Line, norm: str) -> str:
    """The numbers of a line, for readers who do not see it."""
    points = [f"{100 * value:.1f} at eps {radius_text(eps, norm)}" for eps, value in line.points]
    intervals = [f" ({100 * low:.1f} to {100 * high:.1f})" for low, high in line.intervals]
    return ", ".join(map("".join, zip_longest(points, intervals, fillvalue="")))


def _lines(results: Results, measure: str) -> list[Line]:
    """One line per attack, then the worst cases, which are drawn above them."""
    clean = (0.0, results.clean[measure])
    points: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    for result in results.attacks:
        points.setdefault((result.attack, result.target, False), []).append((result.eps, result.measures[measure]))
    for worst in sorted(results.worst, key=lambda worst: worst.target == "query"):
        key = (f"worst ({worst.target})", worst.target, True)
        points.setdefault(key, []).append((worst.eps, worst.measures[measure]))
    return [_line(results, measure, key, (clean, *sorted(values))) for key, values in points.items()]


def _line(results: Results, measure: str, key: tuple[str, str, bool], points: tuple[tuple[float, float], ...]) -> Line:
    """A line; if it is a worst case and its measure is a rate, with intervals."""
    intervals = [results.intervals({measure: value}).values() for _, value in points if key[-1]]
    return Line(*key, points, tuple(interval for found in intervals for interval in found))


def _pictures(example: Example) -> dict[str, Any]:
    """An example, pictures of its query, and under each title those of the items that it finds."""
    difference, factor = magnified(example.clean, example.perturbed)
    query = f"query {example.query}"
    changed = f"{query}, perturbed less clean, times {factor}, about grey"
    found = {"finds, clean": example.before, "finds, perturbed": example.after}
    return {
        "example": example,
        "name": example.name or str(example.label),
        "query": [
            picture(visible(example.clean), f"{query}, clean", "clean"),
            picture(visible(example.perturbed), f"{query}, perturbed", "perturbed"),
            picture(difference, changed, f"difference \u00d7 {factor}"),
        ],
        "found": {title: [_thumbnail(item) for item in items] for title, items in found.items()},
    }


def _thumbnail(item: Neighbour) -> tuple[bool, dict[str, Any]]:
    """Whether an item is right, and its picture: white if it has none."""
    image = torch.ones(1, 1, 1) if item.image is None else item.image
    name = item.name or str(item.label)
    description = f"item {item.item}, class {name}, {'right' if item.is_right else 'wrong'}"
    caption = f"{'✓' if item.is_right else '✗'} {name}"
    return item.is_right, picture(small(visible(image), _THUMBNAIL), description, caption)


def _entries(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values as text; those of a mapping within the mapping one by one."""
    for name, value in values.items():
        shown = prefix + name.replace("_", " ")
        if isinstance(value, Mapping):
            yield from _entries(value, f"{shown}: ")
        elif isinstance(value, list):
            yield shown, shlex.join(map(str, value))
        else:
            words = {None: "none", True: "yes", False: "no"}
            yield shown, words[value] if value is None or isinstance(value, bool) else str(value)


def _json(value: Any, depth: int, indent: str = "") -> str:
    """A value as JSON, with a line of its own for each entry of dicts down to ``depth``, however long it is."""
    if not depth or not isinstance(value, Mapping):
        return json.dumps(value, allow_nan=False)
    lines = [f"{indent}  {json.dumps(key)}: {_json(part, depth - 1, indent + '  ')}" for key, part in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
