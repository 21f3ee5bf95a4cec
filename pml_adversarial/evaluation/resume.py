"""What was finished stays finished: parts of a long evaluation, kept in a folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from .images import ImageSet
from .task import RetrievalTask

T = TypeVar("T")

_LOOKED_AT = 32  # images of each set that are compared


class Folder:
    """Keeps parts by name; without a path it keeps none.

    Args:
        path: folder, made if it is not there; None keeps nothing.
        settings: of the evaluation, in JSON's types.
        task: what is evaluated.
        attacks: by which attacks.
        known: embeddings of the gallery that were given.

    Raises:
        InputError: the folder holds parts of another evaluation.
    """

    def __init__(
        self,
        path: str | Path | None,
        settings: Mapping[str, Any],
        task: RetrievalTask,
        attacks: Sequence[object],
        known: Tensor | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self._device = task.queries.device
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        own = {**settings, **_fingerprints(task), "strength": description(attacks)}
        if known is not None:
            own["gallery_embeddings"] = _digest([known])
        note = self.path / "evaluation.json"
        if not note.exists():
            unfinished = note.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, note)
        differ = _differences(note, own)
        if differ:
            raise InputError(
                f"{self.path} holds parts of another evaluation: {', '.join(differ)} differ. "
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
        return torch.load(file, weights_only=True, map_location=self._device)


def description(value: object) -> str:
    """What a callable is and all that was bound into it, the same in every process.

    >>> from functools import partial
    >>> description(partial(print, 3, end=""))
    "partial(print, 3, end='')"
    """
    if isinstance(value, partial):
        bound = [description(part) for part in (value.func, *value.args)]
        return _call("partial", [*bound, *(f"{key}={description(part)}" for key, part in value.keywords.items())])
    if isinstance(value, FunctionType):
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        bound = [f"{name}={description(cell.cell_contents)}" for name, cell in cells.items()]
        return _call(value.__qualname__, bound) if bound else value.__qualname__
    if is_dataclass(value) and not isinstance(value, type):
        return _call(
            type(value).__qualname__,
            [f"{part.name}={description(getattr(value, part.name))}" for part in fields(value)],
        )
    if isinstance(value, tuple | list):
        return f"({', '.join(map(description, value))})"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _call(name: str, arguments: Iterable[str]) -> str:
    return f"{name}({', '.join(arguments)})"


def _differences(note: Path, own: Mapping[str, Any]) -> list[str]:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return [note.name]
    return [key for key in {**own, **found} if key not in found or key not in own or found[key] != own[key]]


def _fingerprints(task: RetrievalTask) -> dict[str, str]:
    return {
        "model": _digest(task.embed.model.state_dict().values()),
        "queries": _digest(_some_of(task.queries)),
        "gallery": "the queries" if task.items is task.queries else _digest(_some_of(task.items)),
    }


def _some_of(images: ImageSet) -> Iterable[Tensor]:
    yield images.labels
    for row in sorted({int(row) for row in torch.linspace(0, len(images) - 1, _LOOKED_AT).tolist()}):
        yield images.pixels([row])


def _digest(tensors: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
