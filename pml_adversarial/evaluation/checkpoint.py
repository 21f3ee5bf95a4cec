"""Finished parts of a long evaluation, kept in a folder, so that a run that was cut off can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError


class Checkpoint:
    """A folder of named parts of one evaluation, which is made if it does not exist; None: nothing is kept.

    Args:
        path: the folder.
        evaluation: gives all that tells the evaluation from others, in types that JSON knows. It is called if there is
            a folder.
        device: to which parts are loaded.

    Raises:
        InputError: the folder holds parts of another evaluation.
    """

    def __init__(
        self, path: str | Path | None, evaluation: Callable[[], Mapping[str, Any]], device: torch.device
    ) -> None:
        self.path, self._device = None if path is None else Path(path), device
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file, described = self.path / "evaluation.json", evaluation()
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, file)
        differ = _differences(file, described)
        if differ:
            raise InputError(
                f"{self.path} holds parts of another evaluation: {', '.join(differ)} differ. "
                "Use another folder, or delete this one."
            )

    def load_or_make(self, name: str, make: Callable[[], Any]) -> Any:
        """The part with this name: loaded if the folder holds it, else made and kept."""
        if self.path is None:
            return make()
        file = self.path / f"{name}.pt"
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            torch.save(make(), unfinished)
            os.replace(unfinished, file)  # so a file with the final name is complete
        return torch.load(file, weights_only=True, map_location=self._device)


def _differences(file: Path, evaluation: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which a file's evaluation differs from this one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return [file.name]
    missing = object()
    return [key for key in {**evaluation, **found} if found.get(key, missing) != evaluation.get(key, missing)]
