"""Whether a report is one that an evaluation can have made. The file that it is read from may have been changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...attacks.ball import NORMS
from ...errors import InputError
from ..retrieval.task import RANDOM
from .results import TARGETS, Measures, Results

SUITES = {
    "standard-v2": ("margin", "targeted", "shift", "apgd-ce", "apgd-t", "fab-t", "square", "promote", "demote"),
    "fast-v1": ("margin", "targeted", "promote", "demote"),
    "quick-v1": ("margin", "shift"),
}
"""The names of the attacks of each suite."""

_MEASURES = ("recall_at_1", "map_at_r", "r_precision")
_SETTINGS = ("norm", "eps", "distance", "attacks", "attack_settings", "normalization", "batch_size", "device")
_MEASURED = ("model", "queries", "gallery")
_ROUNDING = 1e-6  # of a number of queries, as the product of a mean and a number


def check_results(report: Results) -> None:
    """Refuses a report whose parts are missing, are no such numbers, or contradict one another.

    Raises:
        InputError: what is wrong, with its place in the report.
    """
    for name, least in (("num_queries", 1), ("num_gallery", 1), ("num_classes", 1), ("left_out", 0)):
        value = getattr(report, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _wrong(f"{name} is {value!r}, no number of queries, items or classes")
    if len(set(report.queries)) not in (0, report.num_queries) or len(report.queries) > report.num_queries:
        raise _wrong(f"queries holds {len(set(report.queries))} indices for {report.num_queries} queries")
    _check_keys(report.settings, _SETTINGS, "settings")
    _check_keys(report.provenance, ("threads", *_MEASURED), "provenance")
    for name in _MEASURED:
        _check_keys(report.provenance[name], ("sha256",), f"provenance[{name!r}]")
    _check_share(report.chance, "chance")
    _check_rates(report)
    _check_attacks(report)


def _check_rates(report: Results) -> None:
    """Measures are shares, and R@1 is that of the flags of the single queries."""
    parts: list[tuple[str, Measures, str]] = [("the part without attack", report.clean, report.clean_flags)]
    parts += [(f"{one.attack} at eps {one.eps:g}", one.measures, one.robust_flags) for one in report.attacks]
    parts += [
        (f"the worst case at eps {one.eps:g}, which is not that of the attacks in it", one.measures, one.robust_flags)
        for one in report.worst
    ]
    is_random = any(note.startswith(RANDOM) for note in report.notes)  # R@1 is then a mean over draws
    for place, measures, flags in parts:
        _check_keys(measures, _MEASURES, place)
        if set(measures) != set(report.clean):
            raise _wrong(f"{place} has the measures {_listed(measures)}, without attack there are others")
        for name, value in measures.items():
            _check_share(value, f"{name} of {place}")
        if len(flags) != report.num_queries or set(flags) - {"0", "1"}:
            raise _wrong(f"{place} has {len(flags)} flags for {report.num_queries} queries")
        right, total = flags.count("1"), report.num_queries
        if not is_random and abs(measures["recall_at_1"] * total - right) > _ROUNDING * total:
            raise _wrong(f"R@1 is {measures['recall_at_1']:.6g} and {right} of {total} queries are right in {place}")


def _check_attacks(report: Results) -> None:
    """Worst cases are those of the attacks, and both those of the settings."""
    settings = report.settings
    if settings["norm"] not in NORMS:
        raise _wrong(f"the norm is {settings['norm']!r}, none of {', '.join(NORMS)}")
    named = [spec["name"] for spec in settings["attack_settings"]]
    if named != settings["attacks"] or named != list(SUITES.get(report.suite, named)):
        raise _wrong(f"the suite {report.suite} is not that of the attacks {_listed(named)}")
    worst, met = [(one.target, one.eps) for one in report.worst], [(one.target, one.eps) for one in report.attacks]
    for target, eps in (*worst, *met):
        if target not in TARGETS or eps not in settings["eps"]:
            raise _wrong(f"a result is on {target!r} at eps {eps!r}, the settings have {settings['eps']}")
    unknown = {one.attack for one in report.attacks} - set(named)
    if unknown:
        raise _wrong(f"it has results of {_listed(unknown)}, which the settings do not name")
    if set(worst) != set(met) or len(set(worst)) < len(worst):
        raise _wrong(f"worst cases are those of {_listed(worst)}, and the attacks in it those of {_listed(met)}")


def _check_share(value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e-9 <= value <= 1 + 1e-9:
        raise _wrong(f"{place} is {value!r}, no share from 0 to 1")


def _check_keys(found: Any, names: Iterable[str], place: str) -> None:
    missing = [name for name in names if not isinstance(found, Mapping) or name not in found]
    if missing:
        raise _wrong(f"{place} has no {', '.join(missing)}")


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values})) or "none"


def _wrong(what: str) -> InputError:
    return InputError(f"This is not what an evaluation wrote: {what}. Make the report again, and do not change it.")
