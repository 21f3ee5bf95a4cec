"""What was measured, over seeds, as a table in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]
"""As `run.Bench.run` gives it."""


def table(runs: Sequence[Run], order: Iterable[str]) -> str:
    """One line per method: mean and standard deviation over its seeds, in percent.

    Attacked R@1 is the worst case per query.

    Args:
        runs: with one protocol and one evaluation.
        order: of the methods.
    """
    radii = sorted({worst["eps"] for run in runs for worst in run["report"]["worst"] if worst["target"] == "query"})
    heads = ["method", "R@1", "mAP@R", *(f"R@1 at {255 * eps:g}/255" for eps in radii)]
    lines = [[*heads, "steps", "image passes", "seeds"]]
    for method in order:
        of_method = [run for run in runs if run["method"] == method]
        if of_method:
            lines.append([method, *_line(of_method, radii)])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of cells; the first line is its head, the first column is set left."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def spread(values: Sequence[float], decimals: int = 1) -> str:
    """Mean and sample standard deviation; of one value, the value.

    >>> spread([10, 20, 30]), spread([10])
    ('20.0 ± 10.0', '10.0')
    """
    mean = f"{statistics.fmean(values):,.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):,.{decimals}f}"


def worst_case(run: Run, eps: float, measure: str = "recall_at_1", target: str = "query") -> float:
    """In percent."""
    found = [worst for worst in run["report"]["worst"] if worst["eps"] == eps and worst["target"] == target]
    return 100 * float(found[0]["measures"][measure])


def _line(runs: Sequence[Run], radii: Sequence[float]) -> list[str]:
    clean = [[100 * run["report"]["clean"][name] for run in runs] for name in ("recall_at_1", "map_at_r")]
    attacked = [[worst_case(run, eps) for run in runs] for eps in radii]
    cost = [[run["training"][name] for run in runs] for name in ("steps", "forward")]
    seeds = str(len(runs))
    return [
        *map(spread, clean),
        *map(spread, attacked),
        *(f"{statistics.fmean(values):,.0f}" for values in cost),
        seeds,
    ]
