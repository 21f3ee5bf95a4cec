"""Remembers how tensors were made: which modules gave them, and what was done to their outputs since.

While a `Watch` lives, the outputs of the outermost modules that run with gradient become `Traced`, a class of tensors
that notes each further operation. So the embeddings that reach a loss tell how they were made of the modules' inputs.
Nothing is noted inside a module: its call is one step of the trace.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .nested import leaves, mapped, tensors_in

_numbers = count()
_DEVICES = ("cpu", "cuda")
_PLAIN = {bool, int, float, str, type(None)}


class Ref:
    """A tensor of a trace: the ``place``-th one that a step gave."""

    __slots__ = ("place", "step")

    def __init__(self, step: Step, place: int) -> None:
        self.step, self.place = step, place


class Fixed:
    """A tensor that no step of the trace gave, and its version when it was used; a change in place raises it."""

    __slots__ = ("value", "version")

    def __init__(self, value: Tensor, version: int | None = None) -> None:
        self.value, self.version = value, version_of(value) if version is None else version


class Step:
    """One step of a trace: what was called, and with which arguments.

    Attributes:
        function: a module, or a function of torch.
        args: positional arguments, with `Ref` and `Fixed` in place of tensors.
        kwargs: keyword arguments, likewise.
        in_place: whether the function changes its first argument.
        number: grows from step to step.
        autocast: device -> type, where autocast was on.
        call: what is known of the call of a module; None for a function.
    """

    __slots__ = ("args", "autocast", "call", "function", "in_place", "kwargs", "number")

    def __init__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], in_place: bool = False) -> None:
        self.function, self.in_place, self.number = function, in_place, next(_numbers)
        self.args, self.kwargs = mapped(tuple(args), _argument), mapped(dict(kwargs), _argument)
        self.autocast = autocast()
        self.call: Call | None = None

    @property
    def refs(self) -> list[Ref]:
        """The arguments that other steps gave."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]


class State(NamedTuple):
    """In which a call of a module began.

    Attributes:
        on_cpu: state of torch's random number generator.
        on_devices: likewise, of each device.
        buffers: (module, name, a copy of the buffer).
    """

    on_cpu: Tensor
    on_devices: list[Tensor]
    buffers: list[tuple[nn.Module, str, Tensor]]


class Call:
    """What is known of the call of a module.

    Attributes:
        outputs: the tensors that it gave, detached, in the order of `tensors_in`.
        modes: the ``training`` flags of its submodules.
        switches: its own attributes that are numbers, strings or None, after the call.
        swapped: name -> tensor, parameters and buffers that ``torch.func.functional_call`` had put into the module.
        changed: whether the module changed an argument in place.
        state_before: in which the call began, where a `Watch` wanted to know it.
        inner: submodule -> what it gave, for submodules that a `Watch` wanted to know about.
    """

    __slots__ = ("changed", "inner", "modes", "outputs", "state_before", "swapped", "switches")

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        self.outputs = tuple(output.detach() for output in outputs)
        self.modes: tuple[bool, ...] = ()
        self.switches: dict[str, Any] = {}
        self.swapped: dict[str, Tensor] = {}
        self.changed = False
        self.state_before: State | None = None
        self.inner: dict[nn.Module, list[Any]] = {}


class Traced(Tensor):
    """A tensor that knows which step made it."""

    made_by: Ref
    made_at: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs a function of torch, and notes it on the tensors with gradient that it returns."""
        return _run_and_note(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with plain([self]):
            return Tensor.__repr__(self, tensor_contents=tensor_contents)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.view_as(self).__reduce_ex__(protocol)  # a tensor like others: the trace stays here


@torch.compiler.disable
def _run_and_note(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    noted = not _here.paused and torch.is_grad_enabled()
    in_place = noted and _works_in_place(func, args, kwargs)
    step = Step(func, args, kwargs, in_place=True) if in_place else None
    if step is not None and isinstance(step.args[0], Fixed):
        step.args = (Fixed(args[0].clone()), *step.args[1:])  # as it is before the function changes it
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if not noted or not (in_place or isinstance(result, Tensor | tuple | list)):
        return result
    found = [args[0]] if in_place else tensors_in(result)
    if any(tensor.requires_grad for tensor in found):
        step = step or Step(func, args, kwargs)
        for place, tensor in enumerate(found):
            if in_place or type(tensor) is Tensor:
                note(tensor, Ref(step, place))
    return result


def note(tensor: Tensor, made_by: Ref) -> None:
    """From now on, operations on the tensor are noted."""
    if type(tensor) in (Tensor, Traced) and tensor.requires_grad:
        tensor.__class__ = Traced
        tensor.made_by, tensor.made_at = made_by, tensor._version  # type: ignore[attr-defined]


def ref_of(tensor: Tensor) -> Ref | None:
    """How a tensor was made; None where that is not known, or where it was changed in place since."""
    made_by: Ref | None = vars(tensor).get("made_by")
    return made_by if made_by is not None and tensor._version == tensor.made_at else None  # type: ignore[attr-defined]


@contextmanager
def plain(tensors: Iterable[Any]) -> Iterator[None]:
    """Inside, traced tensors among these are tensors like others."""
    traced = [tensor for tensor in tensors if type(tensor) is Traced]
    for tensor in traced:
        tensor.__class__ = Tensor
    try:
        yield
    finally:
        for tensor in traced:
            tensor.__class__ = Traced


@contextmanager
def paused() -> Iterator[None]:
    """Inside, nothing is noted in this thread."""
    before, _here.paused = _here.paused, True
    try:
        with _without_hook():
            yield
    finally:
        _here.paused = before


class Watch:
    """Asks for traces, as long as it lives.

    Args:
        modules: what is noted are calls of these modules, of their submodules, of modules that hold them, and of
            modules that take what was noted. None: all calls.
        inner: a submodule whose outputs inside of other modules are kept; None: none.

    Attributes:
        wants_state: whether the `State` before each call is kept.
        seen: "with gradient", "without gradient" or "not watched" -> names of modules that were called so.
    """

    def __init__(self, modules: Iterable[nn.Module] | None = None, inner: nn.Module | None = None) -> None:
        self.known = None if modules is None else {id(m) for module in modules for m in module.modules()}
        self.wants_state = False
        self.seen: dict[str, set[str]] = {"with gradient": set(), "without gradient": set(), "not watched": set()}
        if inner is not None:
            weakref.finalize(self, inner.register_forward_hook(_keep_inner).remove)
        _watches.add(self)
        _kinds.clear()
        if not _handles:
            _handles.append(nn_module.register_module_forward_pre_hook(_begin))


    def forget(self) -> None:
        """Forgets what was seen."""
        for names in self.seen.values():
            names.clear()


class _Here(threading.local):
    """Of this thread: whether nothing is noted, inside a module or a replay."""

    paused = False
    inner: dict[nn.Module, list[Any]] | None = None


_here = _Here()
_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_handles: list[Any] = []
_kinds: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def _begin(module: nn.Module, args: Sequence[Any]) -> None:
    """The hook before any module: begins to note the call of an outermost one."""
    if _here.paused or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if not _watches:
        _handles.pop().remove()
        return
    kind = _kind_of(module)
    if kind == "holds a wrapper":
        return
    given = tensors_in(args)
    versions = [version_of(tensor) for tensor in given]
    state = _state_of(module) if any(watch.wants_state for watch in _watches) else None
    inside = ExitStack()
    inside.enter_context(plain(given))
    inside.enter_context(paused())  # so that submodules cost nothing
    inner = _here.inner = {}

    def end(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        handle.remove()
        inside.close()
        _here.inner = None
        if output is None:  # the module raised
            return
        if not torch.is_grad_enabled():
            _tell("without gradient", module)
            for tensor in tensors_in(output):
                tensor.without_gradient_from = type(module).__name__  # type: ignore[attr-defined]
        elif kind == "watched" or any(type(tensor) is Traced for tensor in tensors_in((args, kwargs))):
            _tell("with gradient", module)
            call = _note_call(module, args, kwargs, output)
            call.changed = any(version_of(t) != before for t, before in zip(given, versions, strict=True))
            call.state_before, call.inner = state, inner
        else:
            _tell("not watched", module)

    if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks of its own
        handle = nn_module.register_module_forward_hook(end, with_kwargs=True, always_call=True)
    else:
        handle = module.register_forward_hook(end, with_kwargs=True, always_call=True)


def _tell(how: str, module: nn.Module) -> None:
    for watch in _watches:
        watch.seen[how].add(type(module).__name__)


def _keep_inner(module: nn.Module, args: Any, output: Any) -> None:
    if _here.inner is not None and torch.is_grad_enabled():
        kept = output.detach() if isinstance(output, Tensor) else output
        _here.inner.setdefault(module, []).append(kept)


def _note_call(module: nn.Module, args: Sequence[Any], kwargs: Any, output: Any) -> Call:
    found = tensors_in(output)
    call = Call(found)
    if any(tensor.requires_grad and tensor.ndim for tensor in found):
        step = Step(module, args, kwargs)
        step.call = call
        inside = list(module.modules())
        call.modes, call.switches = modes_of(inside), switches_of(module)
        if any(not isinstance(p, nn.Parameter) for m in inside for p in m._parameters.values() if p is not None):
            call.swapped = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for place, tensor in enumerate(found):
            if tensor.ndim:
                note(tensor, Ref(step, place))
    return call


def modes_of(modules: Iterable[nn.Module]) -> tuple[bool, ...]:
    """The ``training`` flags of modules."""
    return tuple(module.training for module in modules)


def switches_of(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes that are numbers, strings or None, but for its mode."""
    return {name: value for name, value in vars(module).items() if type(value) in _PLAIN and name != "training"}


def _kind_of(module: nn.Module) -> str:
    if module not in _kinds:
        inside = list(module.modules())
        if any(getattr(type(m), "wraps_a_loss_or_miner", False) for m in inside):
            kind = "holds a wrapper"
        elif any(watch.known is None or not watch.known.isdisjoint(map(id, inside)) for watch in _watches):
            kind = "watched"
        else:
            kind = "other"
        _kinds[module] = kind
    return _kinds[module]


@contextmanager
def _without_hook() -> Iterator[None]:
    """Inside, no module calls the hook, so that torch.compile does not see it."""
    hooks = nn_module._global_forward_pre_hooks
    taken = [(handle.id, hooks.pop(handle.id)) for handle in _handles if handle.id in hooks]
    try:
        yield
    finally:
        hooks.update(taken)


def _argument(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return (ref_of(leaf) if type(leaf) is Traced else None) or Fixed(leaf)


def version_of(tensor: Tensor) -> int:
    """The number of changes in place; 0 for tensors of inference mode, which have no such number."""
    return 0 if tensor.is_inference() else tensor._version


def _works_in_place(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    if not args or not isinstance(args[0], Tensor):
        return False
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True


def autocast() -> dict[str, torch.dtype]:
    """Device -> type, where autocast is on."""
    return {kind: torch.get_autocast_dtype(kind) for kind in _DEVICES if torch.is_autocast_enabled(kind)}


def _state_of(module: nn.Module) -> State:
    on_devices = torch.cuda.is_available() and torch.cuda.is_initialized()
    buffers = [
        (inside, name, buffer.detach().clone())
        for inside in module.modules()
        for name, buffer in inside._buffers.items()
        if buffer is not None
    ]
    return State(torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_devices else [], buffers)
