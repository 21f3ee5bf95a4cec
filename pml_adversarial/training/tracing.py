"""Remembers how tensors were made: which modules gave them, and what was done to their outputs since.

While a `Watch` lives, the outputs of the outermost modules become `Traced`, a class of tensors that notes each further
operation. So the embeddings that reach a loss tell how they were made of the modules' inputs. Nothing is noted inside a
module: its call is one step of the trace.

A tensor with gradient holds its trace, as it holds its graph. A number, or a tensor without gradient, holds it weakly,
so that sums and memories that live for long do not grow; the steps themselves stay until the first module runs after a loss. What a module gives
under ``no_grad`` is only marked with the name of the module.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .nested import leaves, mapped, outputs_in, tensors_in

_numbers = count()
_DEVICES = ("cpu", "cuda")
_PLAIN = {bool, int, float, str, type(None)}
_PARAMETER = (nn.Parameter, type(None))
_CALLS_WITHOUT_LOSS = 8  # after as many, traces of tensors without gradient are given up


class Ref:
    """A tensor of a trace: the ``place``-th one that a step gave."""

    __slots__ = ("place", "step")

    def __init__(self, step: Step, place: int) -> None:
        self.step, self.place = step, place


class Fixed:
    """A tensor that no step of the trace gave.

    Attributes:
        value: the tensor.
        version: its number of changes in place when it was used.
        lost: the module that gave it without its trace, in words; None: it has none.
    """

    __slots__ = ("lost", "value", "version")

    def __init__(self, value: Tensor, version: int | None = None, lost: str | None = None) -> None:
        self.value, self.lost = value, lost
        self.version = version_of(value) if version is None else version


class RandomState(NamedTuple):
    """Of torch's random number generators: on the CPU, and on each device."""

    on_cpu: Tensor
    on_devices: list[Tensor]


class Step:
    """One step of a trace: what was called, and with which arguments.

    Attributes:
        function: a module, or a function of torch.
        args: positional arguments, with `Ref` and `Fixed` in place of tensors.
        kwargs: keyword arguments, likewise.
        in_place: whether the function changes its first argument.
        number: grows from step to step.
        autocast: device -> type, where autocast was on.
        random_state: before the step, where a `Watch` wanted to know it.
        call: what is known of the call of a module; None for a function.
    """

    __slots__ = ("__weakref__", "args", "autocast", "call", "function", "in_place", "kwargs", "number", "random_state")

    def __init__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], in_place: bool = False) -> None:
        self.function, self.in_place, self.number = function, in_place, next(_numbers)
        try:
            self.args, self.kwargs = mapped(tuple(args), _argument), mapped(dict(kwargs), _argument)
        except (TypeError, RecursionError):  # a container of a class of its own, or one that holds itself
            self.args, self.kwargs = tuple(map(_argument, args)), {k: _argument(v) for k, v in kwargs.items()}
        self.autocast = autocast()
        self.random_state: RandomState | None = None
        self.call: Call | None = None

    @property
    def refs(self) -> list[Ref]:
        """The arguments that other steps gave."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]


class Call:
    """What is known of the call of a module.

    Attributes:
        outputs: the tensors that it gave, detached, in the order of `outputs_in`.
        modes: the ``training`` flags of its submodules.
        switches: its own attributes that are numbers, strings or None, after the call.
        swapped: name -> tensor, parameters and buffers that ``torch.func.functional_call`` had put into the module.
        changed: whether the module changed an argument in place.
        buffers: (module, name, a copy of the buffer before the call), where a `Watch` wanted to know them.
        inner: submodule -> what it gave, for submodules that a `Watch` wanted to know about.
    """

    __slots__ = ("buffers", "changed", "inner", "modes", "outputs", "swapped", "switches")

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        self.outputs = [output.detach() for output in outputs]
        self.modes: tuple[bool, ...] = ()
        self.switches: dict[str, Any] = {}
        self.swapped: dict[str, Tensor] = {}
        self.changed = False
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []
        self.inner: dict[nn.Module, list[Any]] = {}


class Traced(Tensor):
    """A tensor that knows which step made it."""

    origin: Any
    made_at: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs a function of torch, and notes it on the tensors that it returns."""
        return _run_and_note(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with plain([self]):
            return Tensor.__repr__(self, tensor_contents=tensor_contents)

    def __format__(self, spec: str) -> str:
        with plain([self]):
            return Tensor.__format__(self, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.view_as(self).__reduce_ex__(protocol)  # a tensor like others: the trace stays here


class _Weak(NamedTuple):
    step: weakref.ref[Step]
    place: int
    name: str


class _Lost(NamedTuple):
    name: str


@torch.compiler.disable
def _run_and_note(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if _here.paused:
        return _run(func, args, kwargs)
    name = getattr(func, "__name__", "")
    in_place = _works_in_place(name, args, kwargs)
    step = _before_change(func, args, kwargs) if in_place else None
    random_state = _random_state() if name != "__get__" and _wants_state() else None
    result = _run(func, args, kwargs)
    if not in_place and not isinstance(result, Tensor | tuple | list):  # such as .shape
        return result
    if in_place:
        found = [args[0]] if step is not None else []
    else:
        found = tensors_in(result)
    found = [tensor for tensor in found if in_place or type(tensor) is Tensor]
    if found:
        lost = _lost_among((args, kwargs))
        if lost is not None:
            for tensor in found:
                _mark(tensor, _Lost(lost))
            return result
        step = step or Step(func, args, kwargs)
        step.random_state = random_state
        for place, tensor in enumerate(found if in_place else tensors_in(result)):
            if in_place or type(tensor) is Tensor:
                note(tensor, Ref(step, place))
    return result


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _before_change(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step | None:
    """The step that is about to change its first argument; None where that stays a tensor without trace.

    What others hold of that tensor is copied before. A memory that keeps detached embeddings is not followed.
    """
    target = args[0]
    given = tensors_in((args[1:], kwargs))
    if isinstance(target, nn.Parameter):
        return None
    if type(target) is not Traced and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
        return None
    step = Step(func, args, kwargs, in_place=True)
    if isinstance(step.args[0], Fixed):
        step.args = (Fixed(target.clone()), *step.args[1:])
    elif (call := step.args[0].step.call) is not None:
        place = step.args[0].place
        call.outputs[place] = call.outputs[place].clone()
    return step


def _lost_among(value: Any) -> str | None:
    """The module whose outputs are among these tensors, where all that are traced have lost their trace."""
    traced = [tensor for tensor in tensors_in(value) if type(tensor) is Traced]
    lost = [lost_of(tensor) for tensor in traced]
    return lost[0] if lost and all(name is not None for name in lost) else None


def note(tensor: Tensor, made_by: Ref) -> None:
    """From now on, operations on the tensor are noted."""
    if isinstance(tensor, nn.Parameter):
        return
    if tensor.requires_grad and tensor.ndim:  # sums of losses are often kept, beyond their backward pass
        _mark(tensor, made_by)
    else:
        _here.recent.append(made_by.step)
        _mark(tensor, _Weak(weakref.ref(made_by.step), made_by.place, _name(made_by.step.function)))


def _mark(tensor: Tensor, origin: Any) -> None:
    if type(tensor) in (Tensor, Traced):
        version = version_of(tensor)
        tensor.__class__ = Traced
        tensor.origin, tensor.made_at = origin, version  # type: ignore[attr-defined]


def ref_of(tensor: Tensor) -> Ref | None:
    """How a tensor was made; None where that is not known, or where it was changed in place since."""
    origin = vars(tensor).get("origin")
    if origin is None or version_of(tensor) != tensor.made_at:  # type: ignore[attr-defined]
        return None
    if isinstance(origin, _Weak):
        step = origin.step()
        return None if step is None else Ref(step, origin.place)
    return origin if isinstance(origin, Ref) else None


def lost_of(tensor: Tensor) -> str | None:
    """The module or function that gave the tensor without its trace, or whose trace is gone; None: there is none."""
    origin = vars(tensor).get("origin")
    if isinstance(origin, _Weak):
        return origin.name if origin.step() is None else None
    return origin.name if isinstance(origin, _Lost) else None


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
        wants_state: whether random states and buffers before each step are kept.
        seen: "with gradient", "without gradient" or "not watched" -> names of modules that were called so.
    """

    def __init__(self, modules: Sequence[nn.Module] | None = None, inner: nn.Module | None = None) -> None:
        self.known = None if modules is None else {id(m) for module in modules for m in module.modules()}
        self.wants_state = False
        self.seen: dict[str, set[str]] = {"with gradient": set(), "without gradient": set(), "not watched": set()}
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks", UserWarning)
        for module in modules or ():
            if getattr(module, "_compiled_call_impl", None) is not None:
                weakref.finalize(self, _note_compiled(module))
        if inner is not None:
            weakref.finalize(self, inner.register_forward_hook(_keep_inner).remove)
        _watches.add(self)
        _kinds.clear()
        _threads.add(threading.get_ident())
        if not _handles:
            _handles.append(nn_module.register_module_forward_pre_hook(_begin))

    def knows(self, module: nn.Module) -> bool:
        """Whether calls of the module are noted for this watch."""
        return self.known is None or any(id(m) in self.known for m in module.modules())

    def forget(self) -> None:
        """Forgets what was seen. Traces without gradient are given up when the next module runs."""
        for names in self.seen.values():
            names.clear()
        _here.after_loss = True


class _Here(threading.local):
    """Of this thread.

    Attributes:
        paused: whether nothing is noted, inside a module or a replay.
        inner: see `Call`; None outside of modules.
        recent: steps that gave tensors without gradient, which hold them weakly.
        older: those before the last loss.
        calls: number of outermost calls since ``recent`` was begun.
        after_loss: whether a loss was computed since the last call.
    """

    def __init__(self) -> None:
        self.paused = False
        self.inner: dict[nn.Module, list[Any]] | None = None
        self.recent: list[Step] = []
        self.older: list[Step] = []
        self.calls, self.after_loss = 0, False


_here = _Here()
_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_handles: list[Any] = []
_threads: set[int] = set()
_kinds: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _begin(module: nn.Module, args: Sequence[Any]) -> None:
    """The hook before any module: begins to note the call of an outermost one."""
    if torch.compiler.is_compiling():  # first, so that torch.compile sees nothing else
        return
    if _here.paused or torch.jit.is_tracing():
        return
    if not _watches:
        if _handles:
            _handles.pop().remove()
        return
    if _kind_of(module) == "holds a wrapper":
        return
    noting = _start(module, args)
    if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks of its own
        handle = nn_module.register_module_forward_hook(noting.end, with_kwargs=True, always_call=True)
        noting.undo = [handle.remove, partial(nn_module._global_forward_hooks_with_kwargs.pop, handle.id, None)]
    else:
        handles = (
            module.register_forward_pre_hook(noting.enter),
            module.register_forward_hook(noting.end, with_kwargs=True, always_call=True),
        )
        noting.undo = [handle.remove for handle in handles]


def _note_compiled(module: nn.Module) -> Callable[[], None]:
    """Notes the calls of a module that was compiled in place, which no hook sees. Returns what undoes it."""
    compiled = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        if _here.paused or torch.compiler.is_compiling() or _kind_of(module) == "holds a wrapper":
            return compiled(*args, **kwargs)
        noting, output = _start(module, args), None
        try:
            output = compiled(*args, **kwargs)
        finally:
            noting.end(module, args, kwargs, output)
        return output

    vars(module)["_compiled_call_impl"] = call
    kept = weakref.ref(module)

    def undo() -> None:
        if (held := kept()) is not None and vars(held).get("_compiled_call_impl") is call:
            vars(held)["_compiled_call_impl"] = compiled

    return undo


def _start(module: nn.Module, args: Sequence[Any]) -> _Noting:
    _threads.add(threading.get_ident())
    _here.calls += 1
    if _here.after_loss or _here.calls > _CALLS_WITHOUT_LOSS:
        _here.older, _here.recent = _here.recent, []
        _here.calls, _here.after_loss = 1, False
    return _Noting(module, args, _kind_of(module))


class _Noting:
    """The call of an outermost module while it runs. It has the arguments as they were before the module's own hooks."""

    def __init__(self, module: nn.Module, args: Sequence[Any], kind: str) -> None:
        self.module, self.args, self.kind = module, args, kind
        self.given = _tensors_of(args)
        self.versions = [version_of(tensor) for tensor in self.given]
        wants = _wants_state()
        self.random_state = _random_state() if wants else None
        self.buffers = _buffers_of(module) if wants else []
        self.inner = _here.inner = {}
        self.depth, self.undo = 0, list[Callable[[], Any]]()
        self.traced = [tensor for tensor in self.given if type(tensor) is Traced]
        for tensor in self.traced:
            tensor.__class__ = Tensor
        _here.paused, self.hook = True, _without_hook()  # so that submodules cost nothing
        self.hook.__enter__()

    def enter(self, module: nn.Module, args: Sequence[Any]) -> None:
        """The hook before the module calls itself."""
        self.depth += 1

    def end(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """The hook after the module."""
        if module is not self.module:
            return
        if self.depth:
            self.depth -= 1
            return
        self._close()
        if output is None:  # the module raised
            return
        found = outputs_in(output)
        name = type(module).__name__
        if self.kind != "watched" and not self.traced and all(type(t) is not Traced for t in _tensors_of(kwargs)):
            _tell("not watched", name)
        elif not torch.is_grad_enabled():
            _tell("without gradient", name)
            for tensor in self._new(found):
                _mark(tensor, _Lost(name))
        else:
            self._note(name, kwargs, found)

    def _close(self) -> None:
        for step in self.undo:
            step()
        self.hook.__exit__(None, None, None)
        for tensor in self.traced:
            tensor.__class__ = Traced
        _here.paused, _here.inner = False, None

    def _new(self, found: list[Tensor]) -> list[Tensor]:
        """Without the arguments that the module handed through, which keep the trace that they have."""
        return [tensor for tensor in found if not any(tensor is given for given in self.given)]

    def _note(self, name: str, kwargs: Mapping[str, Any], found: list[Tensor]) -> None:
        if not any(map(_is_followed, found)):
            return
        _tell("with gradient", name)
        step, module = Step(self.module, self.args, kwargs), self.module
        step.random_state = self.random_state
        step.call = call = Call(found)
        inside = submodules_of(module)
        call.modes, call.switches = modes_of(inside), switches_of(module)
        call.buffers = self.buffers
        call.inner = {m: [o.detach() if isinstance(o, Tensor) else o for o in given] for m, given in self.inner.items()}
        call.changed = any(version_of(t) != before for t, before in zip(self.given, self.versions, strict=True))
        if any(not isinstance(p, _PARAMETER) for m in inside for p in m._parameters.values()):
            call.swapped = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        new = set(map(id, self._new(found)))
        for place, tensor in enumerate(found):
            if _is_followed(tensor) and id(tensor) in new:
                note(tensor, Ref(step, place))


def _is_followed(output: Tensor) -> bool:
    """Whether what is done to an output of a module is noted: not to a number, such as a loss, or to indices."""
    return output.ndim > 0 and output.is_floating_point()


def _tensors_of(arguments: Any) -> list[Tensor]:
    try:
        return tensors_in(arguments)
    except RecursionError:  # a container that holds itself
        return []


def _keep_inner(module: nn.Module, args: Any, output: Any) -> None:
    if _here.inner is not None:
        given = _here.inner.setdefault(module, [])
        if not any(output is other for other in given):  # several watches may want to know it
            given.append(output)


def _tell(how: str, name: str) -> None:
    for watch in _watches:
        watch.seen[how].add(name)


def submodules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all that are inside, each once. It is faster than ``module.modules()``, and runs in each step."""
    found, seen = [module], {id(module)}
    for one in found:
        for inner in one._modules.values():
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                found.append(inner)
    return found


def modes_of(modules: Iterable[nn.Module]) -> tuple[bool, ...]:
    """The ``training`` flags of modules."""
    return tuple(module.training for module in modules)


def switches_of(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes that are numbers, strings or None, but for its mode."""
    return {name: value for name, value in vars(module).items() if type(value) in _PLAIN and name != "training"}


def _kind_of(module: nn.Module) -> str:
    if _kinds.get(module, "other") == "other":  # it may have got another module since
        inside = submodules_of(module)
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
    """Inside, no module calls the hook. It stays where other threads run modules too."""
    hooks = nn_module._global_forward_pre_hooks
    handles = _handles if len(_threads) < 2 else []
    taken = [(handle.id, hooks.pop(handle.id)) for handle in handles if handle.id in hooks]
    try:
        yield
    finally:
        hooks.update(taken)


def _argument(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if type(leaf) is not Traced or isinstance(leaf, nn.Parameter):
        return Fixed(leaf)
    return ref_of(leaf) or Fixed(leaf, lost=lost_of(leaf))


def version_of(tensor: Tensor) -> int:
    """The number of changes in place; 0 for tensors of inference mode, which have no such number."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def _works_in_place(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if not args or not isinstance(args[0], Tensor):
        return False
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True


_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "pow", "mod", "matmul"))}


def autocast() -> dict[str, torch.dtype]:
    """Device -> type, where autocast is on."""
    return {kind: torch.get_autocast_dtype(kind) for kind in _DEVICES if torch.is_autocast_enabled(kind)}


def _wants_state() -> bool:
    return any(watch.wants_state for watch in _watches)


def _random_state() -> RandomState:
    on_devices = torch.cuda.is_available() and torch.cuda.is_initialized()
    return RandomState(torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_devices else [])


def _buffers_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return [
        (inside, name, buffer.detach().clone())
        for inside in module.modules()
        for name, buffer in inside._buffers.items()
        if buffer is not None
    ]


def _name(function: Any) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "a function")
