"""One page of several models on the same queries: their curves, what they withstand, and whether they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..binomial import CONFIDENCE
from ..results import INTERVAL, TARGETS, Results
from .charts import Line, chart
from .page import environment, in_words, verdict

MOST = 6  #: Models on one page: as many lines can be told apart.


def render_several(models: Mapping[str, Results], pairs: Sequence[Any]) -> str:
    """Models on the same queries as one complete HTML page.

    Args:
        models: name of a model -> its results.
        pairs: how each later model differs from the first, as `comparison.Comparison` has it.
    """
    first = next(iter(models.values()))
    norm = str(first.settings.get("norm", ""))
    targets = [target for target in TARGETS if any(worst.target == target for worst in first.worst)]
    template = environment().get_template("several.html")
    return template.render(
        models=[_model(name, number, found, targets) for number, (name, found) in enumerate(models.items(), 1)],
        first=next(iter(models)),
        results=first,
        norm=norm,
        targets=targets,
        radii=sorted({worst.eps for found in models.values() for worst in found.worst}),
        figures=[_figure(models, target, norm) for target in targets],
        pairs=list(zip([*models][1:], pairs, strict=True)),
        about_intervals=f"{100 * CONFIDENCE:.0f} % confidence intervals ({INTERVAL})",
        confidence=f"{100 * CONFIDENCE:.0f} %",
    )


def _model(name: str, number: int, found: Results, targets: Sequence[str]) -> dict[str, Any]:
    """A model's rates with their intervals, by target and eps, and how its checks ended."""
    rates = {
        target: {eps: (rate, *found.interval(eps, target=target)) for eps, rate in curve.items()}
        for target in targets
        for curve in [found.curve(target=target)]
    }
    return {
        "name": name,
        "colour": f"model{number}",
        "map_at_r": found.clean.get("map_at_r"),
        "rates": rates,
        "flagged": found.flagged,
        "verdict": verdict(found),
        "suite": found.suite,
        "provenance": found.provenance.get("model"),
    }


def _figure(models: Mapping[str, Results], target: str, norm: str) -> dict[str, Any]:
    lines = []
    for number, (name, found) in enumerate(models.items(), 1):
        points = tuple(sorted(found.curve(target=target).items()))
        intervals = tuple(found.interval(eps, target=target) for eps, _ in points)
        lines.append(Line(name, target, True, points, intervals, f"model{number}"))
    said = "; ".join(f"{line.name}: {in_words(line, norm)}" for line in lines)
    chance = next(iter(models.values())).chance
    return {
        "target": target,
        "chart": chart(lines, norm, chance),
        "description": f"R@1 in percent against eps, the {target} perturbed. {said}.",
    }
