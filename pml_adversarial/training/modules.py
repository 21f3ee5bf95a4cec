"""Which modules a function runs, so that they can be put into eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .isolation import isolated, own_modules, random_kept
from .side_effects import OWN
from .tracing import paused

_DEPTH = 4  # a function that calls a function of an object that holds a module


Isolate = Callable[..., AbstractContextManager[None]]


def modules_run_by(function: Any, inputs: Tensor, isolate: Isolate = isolated) -> tuple[nn.Module, ...]:
    """The outermost modules that a function runs. It is called once, in eval mode; the modules are left as they were.

    ``isolate`` puts modules into eval mode and restores them, see `isolation.isolated`.

    Modules are found as they are called. Those that the function can reach, in its closure, its globals or its
    object, are in eval mode from the start, and stand for what they hold: a method may call a part of a module alone.
    """
    held = modules_reached_by(function)
    with torch.no_grad(), random_kept(), paused():
        try:
            called = _called(function, inputs, held, isolate)
        except Exception:  # a compiled module is not to be called under a hook of all modules
            if not held:
                raise
            _run_without_hook(function, inputs, held, isolate)
            return held
    if not called:
        return held
    holders = [next((one for one in held if any(part is inner for inner in one.modules())), part) for part in called]
    return _outermost(holders)


def modules_reached_by(function: Any) -> tuple[nn.Module, ...]:
    """The outermost modules that a function or an object can reach, whether it runs them or not. It is not called."""
    return _outermost(_held(function, _DEPTH, set()))


def is_compiled(*modules: nn.Module) -> bool:
    """Whether any part is compiled, so that a hook of all modules would cause another compilation."""
    return any(
        isinstance(part, torch._dynamo.OptimizedModule) or getattr(part, "_compiled_call_impl", None) is not None
        for module in modules
        for part in module.modules()
    )


def _run_without_hook(function: Any, inputs: Tensor, held: tuple[nn.Module, ...], isolate: Isolate) -> None:
    """Runs a function to see that it can be run: in eval mode, or with what its model gives in train mode alone."""
    try:
        with isolate(*held, learns=True), torch.no_grad():
            function(inputs)
    except Exception as error:
        try:
            with isolated(*held, but=own_modules(*held), learns=True), torch.no_grad():
                function(inputs)
        except Exception:
            raise error from None


def _called(function: Any, inputs: Tensor, held: tuple[nn.Module, ...], isolate: Isolate) -> list[nn.Module]:
    """The modules that a function calls and that no other one calls, in the order of their calls."""
    known = {id(inner) for one in held for inner in one.modules()}
    found: list[nn.Module] = []
    inside: set[int] = set()
    with isolate(*held, learns=True), ExitStack() as stack:

        def note(module: nn.Module, args: Any) -> None:
            if id(module) in inside:
                return
            found.append(module)
            inside.update(map(id, module.modules()))
            if id(module) not in known:
                stack.enter_context(isolate(module, learns=True))
                stack.enter_context(torch.no_grad())

        stack.callback(register_module_forward_pre_hook(note).remove)
        with torch.no_grad():
            function(inputs)
    return found


def _held(value: Any, depth: int, seen: set[int]) -> Iterator[nn.Module]:
    """Modules that a function or an object can reach, also those that a module holds without registering them."""
    if isinstance(value, nn.Module):
        yield value
    if depth == 0 or isinstance(value, type | ModuleType | Tensor | str | bytes):
        return
    parts: list[Any] = []
    if isinstance(value, nn.Module):
        inner = [part for part in value.modules() if id(part) not in seen]
        seen.update(map(id, inner))
        parts = [held for part in inner for name, held in vars(part).items() if name not in OWN]
    elif isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, FunctionType):
        names = set(_names(value.__code__))
        named = [value.__globals__[name] for name in names if name in value.__globals__]
        parts = [*inspect.getclosurevars(value).nonlocals.values(), *named]
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    for part in parts:
        yield from _held(part, depth - 1, seen)


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function and those defined within it look up."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names(part)


def _outermost(modules: Any) -> tuple[nn.Module, ...]:
    """Each once, and none that another one holds."""
    found = list({id(module): module for module in modules}.values())
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    return tuple(module for module in found if id(module) not in inner)
