"""Results that can be read and kept: as a table, as JSON, as an HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .binomial import CONFIDENCE
from .html import render, render_short
from .plots import needed, plot
from .results import INTERVAL, AttackResult, Check, Measures, Results, WorstCase
from .saved import Saved
from .table import table
from .validation import check_results

_LISTS: dict[str, Any] = {"attacks": AttackResult, "worst": WorstCase, "checks": Check}


class Report(Results, Saved):
    """How robust an embedding is. Its attributes are those of `Results`; ``print(report)`` shows a table."""

    SCHEMA = 3

    def __str__(self) -> str:
        """The results as a table, see `table.table`."""
        return table(self)

    def to_dict(self) -> dict[str, Any]:
        """All results but the images, with the confidence intervals of all rates, in types that JSON knows."""
        kept = {key: value for key, value in vars(self).items() if key not in ("examples", "attacked")}
        lists = {key: [asdict(part) for part in kept[key]] for key in _LISTS}
        for part in (*lists["attacks"], *lists["worst"]):
            part["intervals"] = self._intervals(part["measures"])
        intervals = {"kind": INTERVAL, "confidence": CONFIDENCE, "clean": self._intervals(self.clean)}
        plain = {"notes": list(self.notes), "queries": list(self.queries), "intervals": intervals}
        return {"schema": self.SCHEMA, **kept, **lists, **plain}

    def _intervals(self, measures: Measures) -> dict[str, list[float]]:
        return {name: list(interval) for name, interval in self.intervals(measures).items()}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Report:
        """A report from what JSON makes of `to_dict`, without ``schema``.

        Raises:
            InputError: its numbers contradict one another, or a part is missing, see `validation`.
        """
        found = deepcopy(dict(found))
        for part in (found, *found["attacks"], *found["worst"]):
            del part["intervals"]  # they follow from the numbers
        lists = {key: tuple(kind(**part) for part in found[key]) for key, kind in _LISTS.items()}
        plain = {name: tuple(found.get(name, ())) for name in ("notes", "queries")}
        report = cls(**{**found, **lists, **plain})
        check_results(report)
        return report

    def plot(self, ax: Any = None, measure: str = "recall_at_1", target: str = "query") -> tuple[Any, Any]:
        """Draws a measure against eps with matplotlib: the worst case with its intervals, single attacks, and chance.

        Args:
            ax: matplotlib's axes to draw into; None: new ones.
            measure: one of those in ``clean``.
            target: what the attacks perturb, "query" or "gallery".

        Returns:
            The figure and the axes, as in torchmetrics.

        Raises:
            InputError: the measure was not taken, or matplotlib is not installed.
        """
        return plot(self, ax, measure, target)

    def to_pandas(self) -> Any:
        """A pandas data frame: a row without attack, for every attack at every eps, and for every worst case.

        Its columns are ``attack``, ``target``, ``eps``, each measure, the ends of the 95 % confidence interval of each
        rate (``_low``, ``_high``), ``shift`` and the costs.

        Raises:
            InputError: pandas is not installed.
        """
        pandas = needed("pandas", "to_pandas() makes a data frame")
        rows: list[dict[str, Any]] = [{"attack": "none", "target": "", "eps": 0.0, **self._cells(self.clean)}]
        for result in self.attacks:
            costs = {name: getattr(result, name) for name in ("shift", "forward_passes", "backward_passes", "seconds")}
            where = {"attack": result.attack, "target": result.target, "eps": result.eps}
            rows.append({**where, **self._cells(result.measures), **costs})
        for worst in self.worst:
            where = {"attack": "worst case", "target": worst.target, "eps": worst.eps}
            rows.append({**where, **self._cells(worst.measures)})
        return pandas.DataFrame(rows)

    def _cells(self, measures: Measures) -> dict[str, float]:
        ends = {
            f"{name}_{end}": value
            for name, interval in self.intervals(measures).items()
            for end, value in zip(("low", "high"), interval, strict=True)
        }
        return {**measures, **ends}

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return render_short(self)

    def save_html(self, path: str | Path) -> None:
        """Writes one HTML page that needs no other file and no network."""
        Path(path).write_text(render(self), encoding="utf-8")
