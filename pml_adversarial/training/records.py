"""What a step did, as attributes that PML's HookContainer and record-keeper find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor

from ..errors import PluginError

STANDARD = (
    "strength",
    "num_perturbed",
    "perturbation_linf",
    "perturbation_l2",
    "embedding_shift",
    "share_score_rose",
    "share_zero_gradient",
    "attack_seconds",
)
"""The records of every step; 0 until the first, and for a step in which nobody was perturbed."""

OF_LOSSES = ("loss_before", "loss_after", "batch_recall", "batch_recall_attacked")
"""What a loss records besides."""


def declare(module: ModuleWithRecords, names: Iterable[str]) -> None:
    """Makes the names recordable, at 0; record-keeper wants each series from the first step on."""
    module.add_to_recordable_attributes(list_of_names=list(names), is_stat=False)


def write(module: ModuleWithRecords, answers: Iterable[Mapping[str, Any]]) -> None:
    """Sets the answers of all record hooks as attributes of ``module``, in Python numbers.

    Where several plugins give one name, the one asked first wins. All tensors are read in one transfer.

    Raises:
        PluginError: a name is no string or taken, or a tensor has several elements.
    """
    values: dict[str, Any] = {}
    for answer in answers:
        for name, value in answer.items():
            values.setdefault(name, value)
    wrong = [name for name, value in values.items() if not _recordable(name, value)]
    if wrong:
        raise PluginError(f"A plugin records {wrong}; expected names with numbers or tensors of one element.")
    tensors = {name: value.detach().double().reshape(()) for name, value in values.items() if isinstance(value, Tensor)}
    if tensors:
        values.update(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))
    taken = [name for name in values if hasattr(module, name) and name not in module._record_these]
    if taken:
        raise PluginError(f"A plugin records {taken}, which are attributes of {type(module).__name__}; rename them.")
    declare(module, values)
    for name, value in values.items():
        setattr(module, name, value)


def _recordable(name: Any, value: Any) -> bool:
    return isinstance(name, str) and (not isinstance(value, Tensor) or (value.numel() == 1 and not value.is_complex()))


def clear(module: ModuleWithRecords, strength: float) -> None:
    """Records a step in which nobody was perturbed."""
    for name in module._record_these:
        setattr(module, name, 0)
    module.strength = strength
