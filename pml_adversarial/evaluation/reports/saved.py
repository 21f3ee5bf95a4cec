"""Reports that are kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class Saved:
    """A report that is written as JSON, and read again.

    Attributes:
        SCHEMA: version of what is written; other versions are refused.
    """

    SCHEMA: ClassVar[int]

    def to_dict(self) -> dict[str, Any]:
        """All results but images, in types that JSON knows, ``schema`` among them."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """A report from what JSON makes of `to_dict`, without ``schema``."""
        raise NotImplementedError

    def save_json(self, path: str | Path) -> None:
        """Writes what `to_dict` returns."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load_json(cls, path: str | Path) -> Self:
        """Reads a report that `save_json` wrote. It has no images.

        Raises:
            InputError: the file holds something else, or another version of a report.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
            schema = found.pop("schema")
            if schema == cls.SCHEMA:
                return cls.from_dict(found)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"{path} holds no report; expected the JSON that {cls.__name__}.save_json writes."
            ) from error
        raise InputError(f"{path} is of schema {schema}, this version reads {cls.SCHEMA}; measure it again.")


def _refuse(text: str) -> float:
    raise InputError(f"it holds {text}, which is no number in JSON; expected finite numbers. Make the report again.")
