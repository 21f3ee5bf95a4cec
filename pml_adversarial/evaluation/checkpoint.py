"""Finished parts of a long evaluation, kept in a folder, so that a run that was cut off can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .images import ImageSet
from .retrieval_task import RetrievalTask

_COMPARED_IMAGES = 32  # of each set


class Checkpoint:
    """A folder of named parts of one evaluation, which is made if it does not exist; None: nothing is kept.

    Raises:
        InputError: the folder holds parts of another evaluation.
    """

    def __init__(
        self,
        path: str | Path | None,
        settings: Mapping[str, Any],
        task: RetrievalTask,
        attacks: Sequence[object],
        gallery_embeddings: Tensor | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self._device = task.embed.device
        if self.path is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        evaluation = {
            **settings,
            "model": _digest(value for module in task.embed.modules for value in module.state_dict().values()),
            "queries": _digest(_some_of(task.queries)),
            "gallery": "the queries" if task.items is task.queries else _digest(_some_of(task.items)),
            "attack_settings": description(attacks),
        }
        if gallery_embeddings is not None:
            evaluation["gallery_embeddings"] = _digest([gallery_embeddings])
        file = self.path / "evaluation.json"
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, file)
        differ = _differences(file, evaluation)
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


def description(value: object) -> str:
    """A value as text that is the same in every process; of a callable, its name and the values bound to it.

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
        parts = [f"{part.name}={description(getattr(value, part.name))}" for part in fields(value)]
        return _call(type(value).__qualname__, parts)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(description, value))})"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _call(name: str, arguments: Iterable[str]) -> str:
    return f"{name}({', '.join(arguments)})"


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


def _some_of(images: ImageSet) -> Iterable[Tensor]:
    yield images.labels
    for row in sorted({int(row) for row in torch.linspace(0, len(images) - 1, _COMPARED_IMAGES).tolist()}):
        yield images[[row]]


def _digest(tensors: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
