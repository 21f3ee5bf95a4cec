"""Tensors in nested values: in tuples, lists, mappings and dataclasses, as modules take and return them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_SIMPLE = (Tensor, str, int, float, type(None))


def leaves(value: Any) -> Iterator[Any]:
    """What a nested value holds, in order: all that is no container."""
    if isinstance(value, _SIMPLE):  # first, as most are
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        for item in value:
            yield from leaves(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))
    else:
        yield value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) is tuple and len(value) == 1 and isinstance(value[0], Tensor):  # as most arguments are
        return [value[0]]
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def outputs_in(value: Any) -> list[Tensor]:
    """The tensors that a module returned, in order; also those that are attributes of an object."""
    found: list[Tensor] = []
    for leaf in [value] if isinstance(value, Tensor) else leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type) and not callable(leaf):
            found += tensors_in(vars(leaf))
    return found


def places_in(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the tensors of `outputs_in` stand in what a module returned, as keys, numbers and names of attributes."""
    if isinstance(value, Tensor):
        return [place]
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        return [(*place, name) for name, item in vars(value).items() for _ in tensors_in(item)]
    return [found for key, item in items for found in places_in(item, (*place, key))]


def mapped(value: Any, change: Callable[[Any], Any], before: Callable[[Any], Any] | None = None) -> Any:
    """A copy of a nested value with other leaves. They are changed in the order of `leaves`.

    Args:
        value: any.
        change: a leaf -> another value.
        before: a list or tuple -> another one, whose items are looked at then; None: they stay.
    """
    if isinstance(value, _SIMPLE):
        return change(value)
    if before is not None and type(value) in (list, tuple):
        value = before(value)
    if isinstance(value, Mapping):
        items = {key: mapped(item, change, before) for key, item in value.items()}
        return items if type(value) is dict else _filled(value, items)
    if isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        parts = [mapped(item, change, before) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in fields(value):
            object.__setattr__(changed, field.name, mapped(getattr(value, field.name), change, before))
        return changed
    return change(value)


def _filled(like: Any, items: dict[Any, Any]) -> Any:
    """A mapping of the same class with these items; a dict where the class does not let itself be filled."""
    try:
        changed = copy.copy(like)
        for key, item in items.items():
            changed[key] = item
    except TypeError:
        return items
    return changed
