"""Remembers how tensors were made: which modules gave them, and what was done to their outputs since.

The outputs of the outermost modules that run with gradient become `Traced`, a class of tensors that notes each further
operation. So the embeddings that reach a loss tell how they were made of the inputs of the modules. Nothing is noted
inside a module: its call is one step of the trace.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

_number = count()


class Ref(NamedTuple):
    """The ``place``-th tensor that a step of a trace gave."""

    step: Step
    place: int = 0


class Fixed(NamedTuple):
    """A tensor that no step gave. A change in place increases its version."""

    value: Tensor
    version: int


class Step:
    """One step of a trace: what was called, and with which arguments.

    Attributes:
        function: a module or a function of torch.
        args: positional arguments, with `Ref` and `Fixed` in place of tensors.
        kwargs: keyword arguments, likewise.
        number: grows from step to step.
        autocast: devices and types of autocast that was on.
        in_place: whether the function changes its first argument.
        outputs: of a module, the tensors that it gave, detached, in the order of `tensors_in`.
        modes: of a module, the ``training`` flags of its submodules.
        random_state: of a module, the state of the random number generators before the call, where it was asked for.
    """

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], in_place: bool = False) -> None:
        self.function, self.number, self.in_place = function, next(_number), in_place
        self.args, self.kwargs = mapped(args, _argument), mapped(dict(kwargs), _argument)
        self.autocast = autocast_state()
        self.outputs: tuple[Tensor, ...] = ()
        self.modes: tuple[bool, ...] = ()
        self.random_state: Any = None
        self.swapped: dict[str, Tensor] = {}
        self.changed: list[Tensor] = []

    @property
    def is_module(self) -> bool:
        """Whether a module was called."""
        return isinstance(self.function, nn.Module)

    @property
    def refs(self) -> list[Ref]:
        """The arguments that other steps gave."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]


class Traced(Tensor):
    """A tensor that knows how it was made."""

    made_by: Ref
    made_at: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs a function, and notes it on tensors with gradient that it returns."""
        return _run_and_note(func, args, kwargs or {})


@torch.compiler.disable
def _run_and_note(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    noted = not _tracer.paused and torch.is_grad_enabled()
    in_place = noted and _works_in_place(func, args, kwargs)
    step = Step(func, args, kwargs, in_place=True) if in_place else None
    if step is not None and isinstance(step.args[0], Fixed):
        step.args = (Fixed(args[0].clone(), 0), *step.args[1:])
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if not noted or isinstance(result, int | float | torch.Size | torch.dtype | torch.device):
        return result
    found = [args[0]] if in_place else tensors_in(result)
    if any(tensor.requires_grad for tensor in found):
        step = step or Step(func, args, kwargs)
        for place, tensor in enumerate(found):
            if in_place or not any(tensor is leaf for leaf in leaves((args, kwargs))):
                note(tensor, Ref(step, place))
    return result


def note(tensor: Tensor, made_by: Ref) -> None:
    """From now on, operations on the tensor are noted."""
    if type(tensor) in (Tensor, Traced) and tensor.requires_grad:
        tensor.__class__ = Traced
        tensor.made_by, tensor.made_at = made_by, tensor._version  # type: ignore[attr-defined]


@contextmanager
def plain(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, these are tensors like others, and nothing is noted."""
    changed = [tensor for tensor in tensors if type(tensor) is Traced]
    for tensor in changed:
        tensor.__class__ = Tensor
    try:
        yield
    finally:
        for tensor in changed:
            tensor.__class__ = Traced


def leaves(value: Any) -> Iterator[Any]:
    """What a nested value holds: all that is no tuple, list, mapping or dataclass."""
    if isinstance(value, Tensor | Ref | Fixed):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))
    else:
        yield value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested value, in order."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested value with other leaves."""
    if isinstance(value, Tensor | Ref | Fixed):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: mapped(getattr(value, f.name), change) for f in fields(value) if f.init})
    return change(value)


def _argument(leaf: Any) -> Any:
    if isinstance(leaf, Traced) and leaf._version == leaf.made_at:
        return leaf.made_by
    return Fixed(leaf, _version_of(leaf)) if isinstance(leaf, Tensor) else leaf


def _version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _works_in_place(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    if not args or not isinstance(args[0], Tensor):
        return False
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    return tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    )


class _Tracer(threading.local):
    """What is going on in this thread.

    Attributes:
        paused: whether nothing is noted: inside a module, and inside a replay.
    """

    paused = False


_tracer = _Tracer()
_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_hooks: list[Any] = []
_TRANSPARENT = "pml_adversarial_traces_inside"


class Watch:
    """Asks for traces as long as it lives.

    Args:
        modules: calls of these modules, of modules inside them and of modules that hold them are noted, and calls that
            take what they gave. None: all calls.
    """

    def __init__(self, modules: Iterable[nn.Module] | None = None) -> None:
        self.known = None if modules is None else {id(m) for module in modules for m in module.modules()}
        self.wants_random_state = False
        _watches.add(self)
        if not _hooks:
            _hooks.append(register_module_forward_pre_hook(_before))
        _kinds.clear()


_kinds: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _kind_of(module: nn.Module) -> str:
    """What a call of the module is: "watched", "through" (a module that holds a wrapper), or "other"."""
    if module not in _kinds:
        inside = list(module.modules())
        if any(getattr(type(m), _TRANSPARENT, False) for m in inside):
            kind = "through"
        elif any(watch.known is None or not watch.known.isdisjoint(map(id, inside)) for watch in _watches):
            kind = "watched"
        else:
            kind = "other"
        _kinds[module] = kind
    return _kinds[module]


@torch.compiler.disable
def _before(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Begins to note the call of an outermost module. Modules inside it are not looked at."""
    if _tracer.paused or torch.compiler.is_compiling():
        return
    if not _watches:
        _hooks.pop().remove()
        return
    kind = _kind_of(module)
    if kind == "through":
        return
    traced = [t for t in tensors_in(args) if type(t) is Traced]
    versions = [_version_of(t) for t in tensors_in(args)]
    random_state = _random_state() if any(w.wants_random_state for w in _watches) else None
    inside = ExitStack()
    inside.enter_context(plain(traced))
    inside.enter_context(paused())
    inside.enter_context(_without_hook())

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        handle.remove()
        inside.close()
        if output is None:
            return
        if not torch.is_grad_enabled():
            for tensor in tensors_in(output):
                tensor.without_gradient_from = type(module).__name__
            return
        if kind == "watched" or any(type(t) is Traced for t in tensors_in((args, kwargs))):
            found = [t for t in tensors_in(output)]
            if not any(t.requires_grad and t.ndim for t in found):
                return
            step = Step(module, args, kwargs)
            step.modes = tuple(m.training for m in module.modules())
            step.random_state = random_state
            step.outputs = tuple(t.detach() for t in found)
            step.swapped = {n: p for n, p in module.named_parameters() if not isinstance(p, nn.Parameter)}
            fixed = [leaf for leaf in leaves(step.args) if isinstance(leaf, Fixed | Ref)]
            step.changed = [f.value for f, v in zip(fixed, versions) if isinstance(f, Fixed) and f.version != v]
            for place, tensor in enumerate(found):
                if tensor.ndim:
                    note(tensor, Ref(step, place))

    handle = module.register_forward_hook(after, with_kwargs=True, always_call=True)


@contextmanager
def paused() -> Iterator[None]:
    """Inside, nothing is noted in this thread."""
    before, _tracer.paused = _tracer.paused, True
    try:
        yield
    finally:
        _tracer.paused = before


@contextmanager
def _without_hook() -> Iterator[None]:
    """Takes the hook out while an outermost module runs, so that the modules inside it cost nothing."""
    hooks = nn.modules.module._global_forward_pre_hooks
    handle = _hooks[0]
    hook = hooks.pop(handle.id)
    try:
        yield
    finally:
        hooks[handle.id] = hook


def _random_state() -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
