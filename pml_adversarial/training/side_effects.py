"""Undoes what forward passes leave behind outside of tensors: attributes of modules, and what the user's hooks keep."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

_OWN = frozenset(vars(nn.Module()))  # these belong to torch, and are restored where it matters
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextmanager
def undone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On exit, attributes of modules and what their hooks keep are as they were, also after an exception.

    Attributes name their objects again. Lists, dicts, sets and deques hold again what they held: those that modules
    have as attributes, and those that a hook reaches by its closure, its globals, its arguments or its object.
    """
    restore: list[Callable[[], Any]] = []
    seen: set[int] = set()
    for module in modules:
        _keep_attributes(module, restore, seen, _OWN)
        for name in _HOOKS:
            for hook in vars(module)[name].values():
                _keep_hook(hook, restore, seen)
    try:
        yield
    finally:
        for step in reversed(restore):
            step()


def _keep_attributes(owner: Any, restore: list[Callable[[], Any]], seen: set[int], left_out: frozenset[str]) -> None:
    held = getattr(owner, "__dict__", None)
    if not isinstance(held, dict) or id(held) in seen:
        return
    seen.add(id(held))
    kept = {name: value for name, value in held.items() if name not in left_out}
    restore.append(partial(_put_back, held, kept, left_out))
    for value in kept.values():
        _keep_container(value, restore, seen)


def _put_back(held: dict[str, Any], kept: dict[str, Any], left_out: frozenset[str]) -> None:
    for name in [name for name in held if name not in kept and name not in left_out]:
        del held[name]
    held.update(kept)


def _keep_container(value: Any, restore: list[Callable[[], Any]], seen: set[int]) -> None:
    if not isinstance(value, list | dict | set | deque) or id(value) in seen:
        return
    seen.add(id(value))
    before = list(value.items()) if isinstance(value, dict) else list(value)

    def put_back() -> None:
        value.clear()
        value.extend(before) if isinstance(value, list | deque) else value.update(before)

    restore.append(put_back)


def _keep_hook(hook: Any, restore: list[Callable[[], Any]], seen: set[int]) -> None:
    if isinstance(hook, partial):
        for value in (*hook.args, *hook.keywords.values()):
            _keep_container(value, restore, seen)
        _keep_hook(hook.func, restore, seen)
    elif isinstance(hook, MethodType):
        _keep_attributes(hook.__self__, restore, seen, _OWN if isinstance(hook.__self__, nn.Module) else frozenset())
        _keep_hook(hook.__func__, restore, seen)
    elif isinstance(hook, FunctionType):
        for cell in hook.__closure__ or ():
            _keep_cell(cell, restore, seen)
        for value in (*(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values()):
            _keep_container(value, restore, seen)
        for name in hook.__code__.co_names:
            if name in hook.__globals__:
                value = hook.__globals__[name]
                restore.append(partial(hook.__globals__.__setitem__, name, value))
                _keep_container(value, restore, seen)
    else:
        _keep_attributes(hook, restore, seen, frozenset())


def _keep_cell(cell: CellType, restore: list[Callable[[], Any]], seen: set[int]) -> None:
    try:
        value = cell.cell_contents
    except ValueError:  # it is empty
        return
    restore.append(partial(setattr, cell, "cell_contents", value))
    if isinstance(value, FunctionType | MethodType | partial):
        _keep_hook(value, restore, seen)
    elif isinstance(value, list | dict | set | deque):
        _keep_container(value, restore, seen)
    elif not isinstance(value, nn.Module):
        _keep_attributes(value, restore, seen, frozenset())
