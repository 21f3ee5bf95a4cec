"""Whether one model is more robust than another: two reports on the same queries, compared query by query."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..attacks.ball import radius_text
from ..errors import InputError
from .reports.binomial import CONFIDENCE, Interval, mcnemar, paired_interval
from .reports.html.several import MOST, render_several
from .reports.report import Report
from .reports.results import TARGETS
from .reports.table import aligned
from .retrieval.options import to_radii
from .retrieval.task import RANDOM

_OF_EACH_MODEL = {  # settings that may differ between two models on the same queries
    *("attacks", "attack_settings", "eps", "recall_at", "normalization", "nmi", "checks", "keep_attacked", "seed"),
    *("batch_size", "device", "precision"),
}


@dataclass(frozen=True)
class Difference:
    """R@1 of two models on the same queries, without attack or in the worst case.

    Attributes:
        target: what the attacks perturb, "query" or "gallery"; "none" without attack.
        eps: radius, in pixels of [0, 1]; 0 without attack.
        first: R@1 of the first model.
        second: R@1 of the second model.
        only_first: how many queries the first model alone is right about.
        only_second: how many queries the second model alone is right about.
        interval: the 95 % confidence interval of the difference, see `binomial.paired_interval`.
        p_value: of the exact McNemar test, see `binomial.mcnemar`.
    """

    target: str
    eps: float
    first: float
    second: float
    only_first: int
    only_second: int
    interval: Interval
    p_value: float

    @property
    def difference(self) -> float:
        """R@1 of the second model minus that of the first one."""
        return self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """Two models on the same queries; ``print(comparison)`` shows a table.

    Attributes:
        num_queries: how many queries were evaluated.
        differences: without attack, then for every target and eps.
        notes: what else differs between the two reports, or speaks against them.
        norm: of eps.
    """

    num_queries: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    norm: str = "Linf"

    def at(self, eps: float, target: str = "query") -> Difference:
        """The difference at one eps; eps 0 is without attack.

        Raises:
            InputError: this was not compared.
        """
        for found in self.differences:
            if found.eps == eps and (found.target == target or eps == 0):
                return found
        compared = ", ".join(f"eps={radius_text(one.eps, self.norm)} on {one.target}" for one in self.differences)
        raise InputError(f"eps={eps} on {target} was not compared; expected one of {compared}.")

    def __str__(self) -> str:
        """A table in percent, with the test and the notes."""
        rows = [["", "eps", "R@1 a", "R@1 b", "b - a", "only a", "only b", "p"]]
        for one in self.differences:
            name, eps = ("none", "") if one.eps == 0 else (f"worst ({one.target})", radius_text(one.eps, self.norm))
            low, high = (f"{100 * end:+.1f}" for end in one.interval)
            change = f"{100 * one.difference:+.1f} [{low}, {high}]"
            recalls = [f"{100 * recall:.1f}" for recall in (one.first, one.second)]
            rows.append([name, eps, *recalls, change, str(one.only_first), str(one.only_second), f"{one.p_value:.2g}"])
        about = (
            f"{self.num_queries} queries; percent [{100 * CONFIDENCE:.0f} % interval of the difference, Tango]; "
            "only a: right with a alone; p: exact McNemar test"
        )
        return "\n".join([*aligned(rows), "", about, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON knows."""
        differences = [
            {**asdict(one), "difference": one.difference, "interval": list(one.interval)} for one in self.differences
        ]
        interval = {"kind": "Tango", "confidence": CONFIDENCE}
        return {**vars(self), "differences": differences, "notes": list(self.notes), "interval": interval}


def compare(first: Report, second: Report, eps: float | Iterable[float] | None = None) -> Comparison:
    """Compares R@1 of two models on the same queries, without attack and in the worst case at each eps.

    Both were measured on the same images and labels, with the same gallery, norm and distance. Attacks and seeds may
    differ; a note says so if the attacks do. Every eps is one test: of many, some fall below 0.05 by chance.

    Args:
        first: of the model a.
        second: of the model b.
        eps: one or more radii that both reports have. None: all, which have to be the same in both.

    Raises:
        InputError: the reports are on other queries, or do not have the same eps.
    """
    check_report(first, "first")
    check_report(second, "second")
    _check_same_queries(first, second)
    wanted = _radii(first, second, eps)
    pairs = [("none", 0.0, first.clean_flags, second.clean_flags)]
    for target in TARGETS:
        one, other = (_flags(report, target) for report in (first, second))
        pairs += [
            (target, radius, one[radius], other[radius]) for radius in wanted if radius in one and radius in other
        ]
    differences = tuple(_difference(*pair) for pair in pairs)
    return Comparison(first.num_queries, differences, tuple(_notes(first, second)), first.settings["norm"])


def save_comparison(reports: Mapping[str, Report], path: str | Path) -> None:
    """Writes one HTML page of two or more models on the same queries; each is compared with the first.

    Args:
        reports: name of a model -> its report. All have the same eps.
        path: of the page, which needs no other file and no network.

    Raises:
        InputError: there are fewer than two or more than six models, or `compare` refuses two of them.
    """
    if not 2 <= len(reports) <= MOST:
        raise InputError(f"Found {len(reports)} report(s); expected 2 to {MOST}, as more cannot be told apart.")
    first, *others = reports.values()
    Path(path).write_text(render_several(reports, [compare(first, other) for other in others]), encoding="utf-8")


def check_report(value: object, name: str) -> None:
    """Refuses what is no report of `evaluate_robustness`."""
    if not isinstance(value, Report):
        raise InputError(
            f"{name} is {type(value).__name__}; expected a Report of evaluate_robustness, such as "
            "Report.load_json(path) gives."
        )


def _difference(target: str, eps: float, first: str, second: str) -> Difference:
    total, pairs = len(first), list(zip(first, second, strict=True))
    only_first, only_second = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return Difference(
        target=target,
        eps=eps,
        first=first.count("1") / total,
        second=second.count("1") / total,
        only_first=only_first,
        only_second=only_second,
        interval=paired_interval(only_first, only_second, total),
        p_value=mcnemar(only_first, only_second),
    )


def _flags(report: Report, target: str) -> dict[float, str]:
    return {worst.eps: worst.robust_flags for worst in report.worst if worst.target == target}


def _check_same_queries(first: Report, second: Report) -> None:
    one, other = map(_identity, (first, second))
    if one["queries"] is None or other["queries"] is None:
        raise InputError("A report does not say which queries it is on; expected reports of evaluate_robustness.")
    differ = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if differ:
        values = "; ".join(f"{key}: {_short(one.get(key))} and {_short(other.get(key))}" for key in differ)
        raise InputError(
            f"The reports are not on the same queries. They differ in {values}. Measure both models on the same "
            "images, with the same settings."
        )


def _identity(report: Report) -> dict[str, Any]:
    """All that has to be the same in two reports whose queries are compared one by one."""
    found = {key: value for key, value in report.settings.items() if key not in _OF_EACH_MODEL}
    queries, gallery = (report.provenance.get(key) for key in ("queries", "gallery"))
    if found.get("subset") is None and isinstance(queries, Mapping):
        found["subset"] = list(range(queries["images"]))
    hashes = {"queries": queries, "gallery": isinstance(gallery, Mapping) and gallery["sha256"]}
    return {**found, "protocol": report.protocol, "num_queries": report.num_queries, **hashes}


def _short(value: object) -> str:
    text = str(value["sha256"] if isinstance(value, Mapping) and "sha256" in value else value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _radii(first: Report, second: Report, eps: float | Iterable[float] | None) -> list[float]:
    one, other = ({worst.eps for worst in report.worst} for report in (first, second))
    wanted = one | other if eps is None else {*to_radii(eps, first.settings["norm"], zero=True)} - {0.0}
    if wanted <= one & other:
        return sorted(wanted)
    both, *found = (_in_words(radii, first.settings["norm"]) for radii in (one & other, one, other))
    raise InputError(
        f"The reports have the eps {' and '.join(found)}; expected eps that both have: {both}. Choose with eps=...."
    )


def _in_words(radii: Iterable[float], norm: str) -> str:
    return ", ".join(radius_text(eps, norm) for eps in sorted(radii)) or "none"


def _notes(first: Report, second: Report) -> Iterator[str]:
    radii = [_in_words(report.settings["eps"], first.settings["norm"]) for report in (first, second)]
    if radii[0] != radii[1]:
        yield f"The eps differ: a has {radii[0]}; b has {radii[1]}. A worst case includes attacks at smaller eps."
    one, other = (report.settings.get("attack_settings") for report in (first, second))
    if one != other:
        by_name = [{spec["name"]: spec for spec in specs or ()} for specs in (one, other)]
        names = [name for name, spec in by_name[0].items() if by_name[1].get(name, spec) != spec]
        changed = f" Other options have: {', '.join(names)}." if names else ""
        yield f"The attacks differ: a met {_attacks(first)}; b met {_attacks(second)}.{changed}"
    for name, report in (("a", first), ("b", second)):
        if any(note.startswith(RANDOM) for note in report.notes):
            yield f"The model of {name} answers at random: a query counts as right if it is right in most draws."
        if report.flagged:
            yield f"Checks of {name} raise a flag: {', '.join(check.name for check in report.flagged)}."


def _attacks(report: Report) -> str:
    names = dict.fromkeys(result.attack for result in report.attacks)
    return f"{report.suite} ({', '.join(names) or 'none'})"
