"""What was finished stays finished: parts of a long evaluation, kept in a folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from .bench import Bench

T = TypeVar("T")


class Folder:
    """Keeps parts by name; without a path it keeps none.

    Args:
        path: folder, made if it is not there; None keeps nothing.
        settings: of the evaluation, in JSON's types.
        bench: what is evaluated.

    Raises:
        InputError: the folder holds parts of another evaluation.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], bench: Bench) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        own: dict[str, Any] = {"settings": dict(settings), "of": _fingerprint(bench)}
        note = self.path / "evaluation.json"
        if not note.exists():
            note.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != own:
            differs = [key for key in own["settings"] if found.get("settings", {}).get(key) != own["settings"][key]]
            raise InputError(
                f"{self.path} holds parts of another evaluation: {', '.join(differs) or 'model or images'} differ. "
                "Use another folder, or delete this one."
            )

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The part of this name, made now if it is not kept yet."""
        if self.path is None:
            return make()
        file = self.path / f"{name}.pt"
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            torch.save(make(), unfinished)
            os.replace(unfinished, file)  # so that a file that is there is whole
        return torch.load(file, weights_only=True, map_location=_device_of)


def _device_of(storage: Any, location: str) -> Any:
    return storage if location == "cpu" or not torch.cuda.is_available() else storage.cuda()


def _fingerprint(bench: Bench) -> str:
    digest = hashlib.sha256()
    parts: list[Tensor] = [*bench.embed.model.state_dict().values(), bench.queries.labels, bench.items.labels]
    for images in (bench.queries, bench.items):
        parts += [images.pixels([0]), images.pixels([len(images) - 1])]
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
