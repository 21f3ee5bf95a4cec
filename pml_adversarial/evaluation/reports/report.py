"""Results that can be read and kept: as a table, as JSON, as an HTML page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import InputError
from .binomial import CONFIDENCE
from .html import render
from .results import INTERVAL, AttackResult, Check, Measures, Results, WorstCase
from .table import table

SCHEMA = 3
"""Version of the JSON that `Report.save_json` writes."""

_LISTS: dict[str, Any] = {"attacks": AttackResult, "worst": WorstCase, "checks": Check}


class Report(Results):
    """How robust an embedding is. Its attributes are those of `Results`; ``print(report)`` shows a table."""

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
        return {"schema": SCHEMA, **kept, **lists, "notes": list(self.notes), "intervals": intervals}

    def _intervals(self, measures: Measures) -> dict[str, list[float]]:
        return {name: list(interval) for name, interval in self.intervals(measures).items()}

    def save_json(self, path: str | Path) -> None:
        """Writes what `to_dict` returns."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load_json(cls, path: str | Path) -> Report:
        """Reads a report that `save_json` wrote. It has no images.

        Raises:
            InputError: the file holds something else, or another version of a report.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = found.pop("schema")
            if schema == SCHEMA:
                for part in (found, *found["attacks"], *found["worst"]):
                    del part["intervals"]  # they follow from the numbers
                lists = {key: tuple(kind(**part) for part in found[key]) for key, kind in _LISTS.items()}
                return cls(**{**found, **lists, "notes": tuple(found["notes"])})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{path} holds no report; expected the JSON that Report.save_json writes.") from error
        raise InputError(f"{path} is of schema {schema}, this version reads {SCHEMA}; measure it again.")

    def save_html(self, path: str | Path) -> None:
        """Writes one HTML page that needs no other file and no network."""
        Path(path).write_text(render(self), encoding="utf-8")
