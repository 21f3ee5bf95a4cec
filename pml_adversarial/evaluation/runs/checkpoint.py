"""Finished parts of a long evaluation, kept in a folder, so that a run that was cut off can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from .sharing import Ranks, moved


class Checkpoint:
    """A folder of named parts of one evaluation, which is made if it does not exist; None: nothing is kept.

    Of several processes that share the evaluation, the first reads and writes, and tells the others.

    Args:
        path: the folder.
        evaluation: gives all that tells the evaluation from others, in types that JSON knows. It is called if there is
            a folder, or other processes.
        device: where parts go.
        ranks: the processes that share the evaluation. They call all methods together.

    Attributes:
        has_loaded: whether any part was there already.

    Raises:
        InputError: the folder holds parts of another evaluation, or another process makes another one.
    """

    def __init__(
        self,
        path: str | Path | None,
        evaluation: Callable[[], Mapping[str, Any]],
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = Ranks() if ranks is None else ranks
        self.path, self._device = None if path is None else Path(path), device
        self.has_loaded = False
        if self.path is None and self._ranks.count == 1:
            return
        described = evaluation()
        differ = _differences(self._ranks.tell(described), described)
        if differ:
            raise InputError(
                f"This process evaluates something else than the first one: {', '.join(differ)} differ. Expected the "
                "same in all, as they share the evaluation. With share=False each makes its own."
            )
        self.path = self.path if self._ranks.is_first else None
        if self.path is not None:
            self._claim(self.path, described)

    @staticmethod
    def _claim(path: Path, described: Mapping[str, Any]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        file = path / "evaluation.json"
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, file)
        differ = _differences(_read(file), described)
        if differ:
            raise InputError(
                f"{path} holds parts of another evaluation: {', '.join(differ)} differ. "
                "Use another folder, or delete this one."
            )

    def load_or_make(self, name: str, make: Callable[[], Any]) -> Any:
        """The part with this name: loaded if the folder holds it, else made by all processes together, and kept."""
        if self._ranks.tell(self._holds(name)):
            return self._loaded(name)
        return self._kept(name, make())

    def load_or_share(self, names: Sequence[str], make: Callable[[int], Any]) -> Iterator[Any]:
        """The parts with these names: loaded if the folder holds them, else made, each by one process, and kept."""
        missing = self.missing(names)
        made = self._ranks.share(missing, make)
        for number, name in enumerate(names):
            yield self._kept(name, next(made)) if number in missing else self._loaded(name)

    def missing(self, names: Sequence[str]) -> list[int]:
        """The numbers of the parts that the folder does not hold."""
        return self._ranks.tell([number for number, name in enumerate(names) if not self._holds(name)])

    def _holds(self, name: str) -> bool:
        return self.path is not None and (self.path / f"{name}.pt").exists()

    def _loaded(self, name: str) -> Any:
        part, self.has_loaded = None, True
        if self.path is not None:
            part = torch.load(self.path / f"{name}.pt", weights_only=True, map_location=self._device)
        return self._placed(self._ranks.tell(part))

    def _kept(self, name: str, part: Any) -> Any:
        if self.path is not None:
            file = self.path / f"{name}.pt"
            torch.save(part, file.with_suffix(".unfinished"))
            os.replace(file.with_suffix(".unfinished"), file)  # so a file with the final name is complete
        return self._placed(part)

    def _placed(self, part: Any) -> Any:
        """What another process told came on the CPU."""
        return part if self._ranks.count == 1 else moved(part, self._device)


def _differences(found: Any, evaluation: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which what was found differs from an evaluation."""
    if not isinstance(found, dict):
        return ["evaluation.json"]
    missing = object()
    return [key for key in {**evaluation, **found} if found.get(key, missing) != evaluation.get(key, missing)]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
