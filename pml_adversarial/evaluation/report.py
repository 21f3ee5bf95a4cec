"""What was measured: as an object, a table, JSON that suffices to measure it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError

SCHEMA = 1

TARGETS = ("query", "gallery")
"""What an attack may perturb."""

Measures = Mapping[str, float]
"""Name of a measure (``recall_at_1``, ``map_at_r``, ``r_precision``, ...) -> its mean over the queries, in [0, 1]."""


@dataclass(frozen=True)
class AttackResult:
    """What is left under one attack at one eps.

    Attributes:
        attack: its name.
        target: "query" or "gallery": what it perturbs.
        black_box: whether it only asked for outputs.
        eps: radius, in pixels of [0, 1].
        measures: means over all queries, of each the worst over restarts and smaller eps.
        shift: mean distance of perturbed from clean unit embeddings, in [0, 2].
        forward_passes: images that were embedded.
        backward_passes: images whose gradient was taken.
        seconds: wall-clock time.
        standing: one character per query, "1" if R@1 held.
    """

    attack: str
    target: str
    black_box: bool
    eps: float
    measures: Measures
    shift: float
    forward_passes: int
    backward_passes: int
    seconds: float
    standing: str = field(repr=False)


@dataclass(frozen=True)
class WorstCase:
    """What is left if each query meets the attack that is worst for it.

    Attributes:
        target: "query" or "gallery".
        eps: radius.
        measures: means over all queries of the lowest value under any attack; without attack too.
        standing: one character per query, "1" if R@1 held under every attack.
        nmi: normalised mutual information of the queries' embeddings, each under its worst attack; None if not asked.
    """

    target: str
    eps: float
    measures: Measures
    standing: str = field(repr=False)
    nmi: float | None = None


@dataclass(frozen=True)
class Check:
    """Whether one sign of a false claim is absent.

    Attributes:
        name: what is asked.
        passed: False raises the flag; None: it could not be asked.
        line: what was found, in one line.
    """

    name: str
    passed: bool | None
    line: str


@dataclass(frozen=True, eq=False)
class Neighbour:
    """An item of the gallery that a query found: its index, label and pixels ``(C, H, W)``."""

    item: int
    label: int
    image: Tensor


@dataclass(frozen=True, eq=False)
class Example:
    """One query, before and after.

    Attributes:
        query: its index.
        label: its label.
        eps: radius at which it broke, or the last that it met.
        attack: what broke it, or "none".
        clean: ``(C, H, W)``.
        perturbed: ``(C, H, W)``.
        before: nearest items of the clean query, nearest first.
        after: nearest items of the perturbed one.
    """

    query: int
    label: int
    eps: float
    attack: str
    clean: Tensor
    perturbed: Tensor
    before: tuple[Neighbour, ...]
    after: tuple[Neighbour, ...]


@dataclass(frozen=True, eq=False)
class Report:
    """How robust an embedding is.

    Attributes:
        suite: name and version of the attacks, such as "standard-v1".
        protocol: "leave-one-out" or "separate gallery".
        num_queries: queries that were evaluated.
        num_gallery: items that were searched.
        num_classes: classes of the gallery.
        left_out: queries that were left out, for want of a right item.
        clean: measures without attack.
        chance: R@1 of a random ranking.
        attacks: every attack at every eps.
        worst: the worst case per query at every eps, by target.
        collapse: signs that the embedding has collapsed, see `scores.collapse`.
        nmi: normalised mutual information of the queries' embeddings without attack; None if not asked.
        checks: see `checks`.
        settings: all that is needed to measure it again.
        versions: of the libraries.
        clean_standing: one character per query, "1" if R@1 held without attack.
        examples: some queries with what they find; not part of the JSON.
        attacked: eps -> ``(Q, C, H, W)`` what broke each query, or the last that it met; None if not asked.
    """

    suite: str
    protocol: str
    num_queries: int
    num_gallery: int
    num_classes: int
    left_out: int
    clean: Measures
    chance: float
    attacks: tuple[AttackResult, ...]
    worst: tuple[WorstCase, ...]
    collapse: Mapping[str, float]
    nmi: float | None
    checks: tuple[Check, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    clean_standing: str = field(repr=False)
    examples: tuple[Example, ...] = field(default=(), repr=False)
    attacked: Mapping[float, Tensor] | None = field(default=None, repr=False)

    def worst_case(self, eps: float, measure: str = "recall_at_1", target: str = "query") -> float:
        """A measure at an eps, each query under the attack that is worst for it.

        Raises:
            InputError: it was not measured at this eps.
        """
        found = {w.eps: w.measures for w in self.worst if w.target == target}
        if eps not in found or measure not in found[eps]:
            raise InputError(f"{measure} at eps={eps} on {target} was not measured; there is {_there_is(found)}.")
        return found[eps][measure]

    def curve(self, measure: str = "recall_at_1", target: str = "query") -> dict[float, float]:
        """eps, from 0 on -> worst case of a measure."""
        return {0.0: self.clean[measure], **{w.eps: w.measures[measure] for w in self.worst if w.target == target}}

    @property
    def flagged(self) -> tuple[Check, ...]:
        """Checks that failed: reasons not to believe the numbers."""
        return tuple(check for check in self.checks if check.passed is False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, in JSON's types."""
        kept = {key: value for key, value in vars(self).items() if key not in ("examples", "attacked")}
        lists = {key: [asdict(part) for part in kept[key]] for key in ("attacks", "worst", "checks")}
        return {"schema": SCHEMA, **kept, **lists}

    def save_json(self, path: str | Path) -> None:
        """Writes `to_dict`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load_json(cls, path: str | Path) -> Report:
        """A report that `save_json` wrote, without images.

        Raises:
            InputError: the file holds something else, or another version of it.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = found.pop("schema")
            if schema != SCHEMA:
                raise InputError(f"{path} is of schema {schema}, this version reads {SCHEMA}; measure it again.")
            kinds: dict[str, Any] = {"attacks": AttackResult, "worst": WorstCase, "checks": Check}
            parts: dict[str, Any] = {key: tuple(kind(**part) for part in found.pop(key)) for key, kind in kinds.items()}
            return cls(**found, **parts)
        except InputError:
            raise
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{path} holds no report; expected the JSON that Report.save_json writes.") from error

    def save_html(self, path: str | Path) -> None:
        """Writes one self-contained page, see `page`."""
        from .html import render

        Path(path).write_text(render(self), encoding="utf-8")

    def __str__(self) -> str:
        """The table."""
        return table(self)


def table(report: Report) -> str:
    """A report in lines of text, in percent."""
    names = list(report.clean)
    heads = ["attack", "eps", *map(heading, names), "passes", "s"]
    rows = [["none", "", *_percent(report.clean, names), "", ""]]
    radii = sorted({result.eps for result in report.attacks})
    for eps in radii:
        for result in (result for result in report.attacks if result.eps == eps):
            cost = [f"{result.forward_passes + result.backward_passes:,}", f"{result.seconds:.0f}"]
            rows.append([result.attack, f"{eps:.4g}", *_percent(result.measures, names), *cost])
        rows += [
            [f"worst ({worst.target})", f"{eps:.4g}", *_percent(worst.measures, names), "", ""]
            for worst in report.worst
            if worst.eps == eps
        ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [_line(row, widths) for row in [heads, *rows]]
    lines.insert(1, "-" * len(lines[0]))
    signs = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in report.collapse.items())
    notes = [
        f"{report.suite}, {report.settings.get('norm', '')}, {report.protocol}: {report.num_queries} queries, "
        f"{report.num_gallery} items of {report.num_classes} classes; percent; chance {100 * report.chance:.1f}",
        f"embedding: {signs}" + ("" if report.nmi is None else f"; NMI {100 * report.nmi:.1f}"),
    ]
    marks = {True: "ok", False: "FLAG", None: "not asked"}
    checks = [f"[{marks[check.passed]}] {check.name}: {check.line}" for check in report.checks]
    return "\n".join([*lines, "", *notes, *checks])


def heading(measure: str) -> str:
    """A measure's name in tables.

    >>> heading("recall_at_4"), heading("map_at_r")
    ('R@4', 'mAP@R')
    """
    return {"map_at_r": "mAP@R", "r_precision": "R-prec"}.get(measure, measure.replace("recall_at_", "R@"))


def _percent(measures: Measures, names: list[str]) -> list[str]:
    return [f"{100 * measures[name]:.1f}" for name in names]


def _line(row: list[str], widths: list[int]) -> str:
    first = row[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])


def _there_is(found: Mapping[float, Measures]) -> str:
    names = sorted({name for measures in found.values() for name in measures})
    return f"{', '.join(names)} at {', '.join(f'{eps:g}' for eps in sorted(found))}" if found else "nothing"
