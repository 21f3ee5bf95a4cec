"""Results as a picture of matplotlib, which is imported only then."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ...attacks.ball import radius_text
from ...errors import InputError
from .results import Results, heading, is_rate


def plot(results: Results, ax: Any, measure: str, target: str) -> tuple[Any, Any]:
    """See `Report.plot`."""
    results.worst_case(0.0, measure, target)  # refuses what was not measured
    pyplot = needed("matplotlib.pyplot", "plot() draws")
    axes = pyplot.subplots()[1] if ax is None else ax
    radii, values = zip(*sorted(results.curve(measure, target).items()), strict=True)
    for name in dict.fromkeys(result.attack for result in results.attacks if result.target == target):
        found = {r.eps: r.measures[measure] for r in results.attacks if (r.attack, r.target) == (name, target)}
        axes.plot([0.0, *found], [100 * results.clean[measure], *(100 * v for v in found.values())], "0.6", lw=0.8)
    (line,) = axes.plot(radii, [100 * value for value in values], "o-", lw=2, label="worst case per query")
    if is_rate(measure):
        ends = [results.interval(eps, measure, target) for eps in radii]
        low, high = ([100 * getattr(end, name) for end in ends] for name in ("low", "high"))
        axes.fill_between(radii, low, high, color=line.get_color(), alpha=0.2, lw=0, label="95 % interval")
    if measure == "recall_at_1":
        axes.axhline(100 * results.chance, color="0.3", ls=":", label="chance")
    norm = str(results.settings.get("norm", ""))
    axes.set_xticks(radii, [radius_text(eps, norm) for eps in radii])
    axes.set(xlabel=f"eps ({norm}), the {target} perturbed", ylabel=f"{heading(measure)}, percent", ylim=(0, None))
    axes.legend()
    return axes.figure, axes


def needed(module: str, what: str) -> Any:
    """A library that the package does not require.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        raise InputError(f"{what} with {name}, which is not installed; install it with: pip install {name}") from error
