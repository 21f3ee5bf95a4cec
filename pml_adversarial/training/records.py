"""What a step did, in numbers: as one typed value, and as the attributes that PML's HookContainer looks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor

from ..errors import PluginError

R = TypeVar("R", bound="Records")


@dataclass(frozen=True, eq=False)
class Records(Mapping[str, float]):
    """What the last step of a miner did; also as a mapping, ``dict(loss_func.records)``.

    Numbers that no step has measured yet are NaN. In a step that perturbs no row, ``num_perturbed`` and
    ``attack_seconds`` are 0, and the other numbers but the strength are NaN.

    Attributes:
        strength: share of the attack's eps and alpha that the step could spend, from 0 to 1.
        num_perturbed: number of perturbed copies. A row may have several.
        perturbation_linf: largest change of a value of a copy, in pixels of [0, 1].
        perturbation_l2: Euclidean norm of the change of a copy, in pixels of [0, 1], averaged over the copies.
        embedding_shift: Euclidean distance from the embedding of a row to that of its copy, averaged over the copies.
        share_score_rose: share of the copies whose score is above that of their row.
        share_zero_gradient: share of the copies whose input gradient was zero in every attack step.
        attack_seconds: seconds of wall-clock time that the attack took.
        of_plugins: name -> number, what plugins recorded besides.
    """

    strength: float = math.nan
    num_perturbed: float = math.nan
    perturbation_linf: float = math.nan
    perturbation_l2: float = math.nan
    embedding_shift: float = math.nan
    share_score_rose: float = math.nan
    share_zero_gradient: float = math.nan
    attack_seconds: float = math.nan
    of_plugins: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the records that every step has."""
        return tuple(found.name for found in fields(cls) if found.name != "of_plugins")

    def __getitem__(self, name: str) -> float:
        return getattr(self, name) if name in self.names() else self.of_plugins[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.names(), *self.of_plugins))

    def __len__(self) -> int:
        return len(self.names()) + len(self.of_plugins)


@dataclass(frozen=True, eq=False)
class LossRecords(Records):
    """What the last step of a loss did.

    Attributes:
        loss_before: the training loss with unperturbed copies.
        loss_after: the training loss, which was returned.
        batch_recall: R@1 within the batch without attack, from 0 to 1, averaged over the last measurements.
        batch_recall_attacked: R@1 of perturbed rows among the clean other rows, at full strength.
        batch_recall_searched: the same under the same attack, where it raises the margin of the search itself.
    """

    loss_before: float = math.nan
    loss_after: float = math.nan
    batch_recall: float = math.nan
    batch_recall_attacked: float = math.nan
    batch_recall_searched: float = math.nan


STANDARD = Records.names()
"""The records of every step."""

OF_LOSSES = tuple(name for name in LossRecords.names() if name not in STANDARD)
"""What a loss records besides."""


def declare(module: ModuleWithRecords, names: Iterable[str]) -> None:
    """Makes the names recordable, at NaN: record-keeper needs each series from the first step on."""
    new = [name for name in names if name not in getattr(module, "_record_these", ())]
    module.add_to_recordable_attributes(list_of_names=new, is_stat=False)
    for name in new:
        vars(module)[name] = math.nan  # on the wrapper, also where the wrapped module has an attribute of this name


def read(module: ModuleWithRecords, kind: type[R]) -> R:
    """The attributes that are recorded, as one value."""
    values = {name: getattr(module, name) for name in module._record_these}
    own = {name: values.pop(name) for name in kind.names()}
    return kind(**own, of_plugins=values)


def write(module: ModuleWithRecords, answers: Iterable[Mapping[str, Any]]) -> None:
    """Sets the answers of all record hooks as attributes of ``module``, as Python numbers. The first of a name counts.

    Raises:
        PluginError: a name is not a string, or is taken, or a value is not one number.
    """
    values = {name: value for answer in reversed([*answers]) for name, value in answer.items()}
    if wrong := [name for name, value in values.items() if not _recordable(name, value)]:
        raise PluginError(f"A plugin records {wrong}; expected names with numbers or tensors of one element.")
    values.update(_numbers({name: value for name, value in values.items() if isinstance(value, Tensor)}))
    new = [name for name in values if name not in getattr(module, "_record_these", ())]
    if taken := [name for name in new if name in dir(module)]:  # the names of a module that it wraps are free
        raise PluginError(
            f"A plugin records {taken}, which are attributes of {type(module).__name__} already; expected other names."
        )
    declare(module, values)
    for name, value in values.items():
        vars(module)[name] = value


def nobody_perturbed(strength: float) -> dict[str, float]:
    """The standard records of a step that perturbs no row."""
    return {**dict.fromkeys(Records.names(), math.nan), "strength": strength, "num_perturbed": 0, "attack_seconds": 0.0}


def clear(module: ModuleWithRecords, strength: float) -> None:
    """Records a step in which no row was perturbed."""
    known = nobody_perturbed(strength)
    for name in module._record_these:
        vars(module)[name] = known.get(name, math.nan)


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Tensors of one element as Python numbers. All of one type are read in one transfer."""
    found: dict[str, float] = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        of_type = {name: t if t.ndim == 0 else t.reshape(()) for name, t in tensors.items() if t.dtype == dtype}
        found.update(zip(of_type, map(float, torch.stack([*of_type.values()]).tolist()), strict=True))
    return found


def _recordable(name: Any, value: Any) -> bool:
    one_number = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    return isinstance(name, str) and (one_number or isinstance(value, int | float))
