"""Undoes what forward passes leave behind outside of tensors: attributes of modules, and what the user's hooks keep."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

OWN = frozenset(vars(nn.Module()))  #: Attributes that belong to torch; they are restored where it matters.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DEPTH = 3  # of what lies in one another: containers, objects, functions


@contextmanager
def undone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On exit, attributes of modules and what their hooks keep are as they were, also after an exception.

    Attributes name their objects again. Lists, dicts, sets and deques hold again what they held: those that modules and
    their objects have as attributes, and those that a hook reaches by its closure, its globals, its arguments or its
    object, up to three of them in one another.
    """
    keeper = _Keeper()
    for module in modules:
        keeper.keep(module, _DEPTH)
        for hooks in [found for name in _HOOKS if (found := vars(module).get(name))]:
            for hook in hooks.values():
                keeper.keep(hook, _DEPTH)
    try:
        yield
    finally:
        for step in reversed(keeper.restore):
            step()


class _Keeper:
    """Looks at each object once, and knows how to put it back."""

    def __init__(self) -> None:
        self.restore: list[Callable[[], Any]] = []
        self._seen: dict[int, Any] = {}

    def keep(self, value: Any, depth: int) -> None:
        """Keeps what ``value`` holds, and what that holds, down to a depth."""
        if depth < 0 or value is None or isinstance(value, _LEAVES) or id(value) in self._seen:
            return
        self._seen[id(value)] = value  # held, so that its number stays its own
        if isinstance(value, list | dict | set | deque):
            self._keep_container(value, depth)
        elif isinstance(value, tuple):
            self._keep_all(value, depth)
        elif isinstance(value, partial):
            self._keep_all((value.func, *value.args, *value.keywords.values()), depth)
        elif isinstance(value, MethodType):
            self._keep_all((value.__func__, value.__self__), depth)
        elif isinstance(value, FunctionType):
            self._keep_function(value, depth)
        elif isinstance(vars(value) if hasattr(value, "__dict__") else None, dict):
            self._keep_attributes(value, depth)

    def _keep_all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            kind = type(value)
            if kind not in _PLAIN and not (kind is tuple and all(type(part) in _PLAIN for part in value)):
                self.keep(value, depth - 1)

    def _keep_attributes(self, owner: Any, depth: int) -> None:
        held, left_out = vars(owner), OWN if isinstance(owner, nn.Module) else frozenset()
        kept = {name: held[name] for name in held.keys() - left_out}
        self.restore.append(partial(_put_back, held, kept, left_out))
        self._keep_all(kept.values(), depth)

    def _keep_container(self, value: Any, depth: int) -> None:
        kind: Any = next(kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(value, kind))
        before = list(value.items()) if isinstance(value, dict) else list(value)

        def put_back() -> None:  # by the class of Python, as a class of one's own may count, or refuse to be changed
            now = list(value.items()) if isinstance(value, dict) else list(value)
            if len(now) == len(before) and all(_same(*pair) for pair in zip(now, before, strict=True)):
                return
            kind.clear(value)
            if isinstance(value, dict):
                for key, item in before:
                    kind.__setitem__(value, key, item)
            else:
                (kind.update if isinstance(value, set) else kind.extend)(value, before)

        self.restore.append(put_back)
        self._keep_all([pair[1] for pair in before] if isinstance(value, dict) else before, depth)

    def _keep_function(self, function: FunctionType, depth: int) -> None:
        if vars(function):
            self._keep_attributes(function, depth)
        for cell in function.__closure__ or ():
            self._keep_cell(cell, depth)
        self._keep_all((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()), depth)
        for name in function.__code__.co_names:
            if name in function.__globals__:
                value = function.__globals__[name]
                self.restore.append(partial(function.__globals__.__setitem__, name, value))
                self.keep(value, depth - 1)

    def _keep_cell(self, cell: CellType, depth: int) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # it is empty
            return
        self.restore.append(partial(setattr, cell, "cell_contents", value))
        self.keep(value, depth - 1)


_PLAIN = {type(None), bool, int, float, str, Tensor, torch.dtype, torch.device}  # most attributes are, so they go first
_LEAVES = (Tensor, ModuleType, type, str, bytes, int, float, complex)


def _put_back(held: dict[str, Any], kept: dict[str, Any], left_out: frozenset[str]) -> None:
    for name in held.keys() - kept.keys() - left_out:
        del held[name]
    held.update(kept)


def _same(one: Any, other: Any) -> bool:
    """Whether two items are one object, or pairs of a key and one object."""
    return one is other or (
        isinstance(one, tuple) and len(one) == len(other) == 2 and one[1] is other[1] and one[0] is other[0]
    )
