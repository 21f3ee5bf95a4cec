"""Results that can be read and kept: as a table, as JSON, as an HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .binomial import CONFIDENCE
from .html import render
from .results import INTERVAL, AttackResult, Check, Measures, Results, WorstCase
from .saved import Saved
from .table import table

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
        return {"schema": self.SCHEMA, **kept, **lists, "notes": list(self.notes), "intervals": intervals}

    def _intervals(self, measures: Measures) -> dict[str, list[float]]:
        return {name: list(interval) for name, interval in self.intervals(measures).items()}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Report:
        """A report from what JSON makes of `to_dict`, without ``schema``."""
        found = deepcopy(dict(found))
        for part in (found, *found["attacks"], *found["worst"]):
            del part["intervals"]  # they follow from the numbers
        lists = {key: tuple(kind(**part) for part in found[key]) for key, kind in _LISTS.items()}
        return cls(**{**found, **lists, "notes": tuple(found["notes"])})

    def save_html(self, path: str | Path) -> None:
        """Writes one HTML page that needs no other file and no network."""
        Path(path).write_text(render(self), encoding="utf-8")
