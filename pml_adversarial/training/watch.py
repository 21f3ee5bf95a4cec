"""Asks for traces: notes the calls of the outermost modules, and marks what they give, see `tracing`.

One hook before all modules begins a note when an outermost module is called, and takes itself out of the way until that
has ended, so that modules inside cost nothing.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy

from .nested import mapped, outputs_in, places_in, tensors_in
from .side_effects import Values, note_changed_buffers
from .trace import Call, Ref, Step, Weights, version_of
from .tracing import (
    Traced,
    before_change,
    here,
    hook_taken_out,
    hooks,
    mark_lost,
    note,
    random_state,
    step_of,
    threads,
    wants_state,
    watches,
)

_PLAIN = {bool, int, float, str, type(None)}
_SHORT, _NOT_KEPT = 16, object()
_OF_MODULES = frozenset(vars(nn.Module()))
_FEW_CALLS = 8  # after as many, traces of tensors without gradient are given up
_MANY_CALLS, _LOSSES, _LARGE = 64, 4, 2**26  # those of frozen modules stay longer, if they hold fewer bytes than this
_kinds: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


class Watch:
    """Asks for traces, as long as it lives.

    Args:
        modules: what is noted are calls of these modules, of their submodules, of modules that hold them, and of
            modules that take what was noted. None: all calls.
        inner: a submodule. What it gives while another module runs it is kept. None: no submodule.

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
        watches.add(self)
        _kinds.clear()
        threads.add(threading.get_ident())
        if not hooks:
            hooks.append(nn_module.register_module_forward_pre_hook(_begin))

    def knows(self, module: nn.Module) -> bool:
        """Whether calls of the module are noted for this watch."""
        return self.known is None or any(id(m) in self.known for m in module.modules())

    def forget(self) -> None:
        """Forgets what was seen. Traces without gradient are given up when the next module runs."""
        for names in self.seen.values():
            names.clear()
        here.brief.losses += 1
        here.frozen.losses += 1


def _begin(module: nn.Module, args: Sequence[Any]) -> None:
    """The hook before any module: begins to note the call of an outermost one."""
    if torch.compiler.is_compiling():  # first, so that torch.compile sees nothing else
        return
    if here.paused or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return
    if not watches:
        if hooks:
            hooks.pop().remove()
        return
    if _kind_of(module) == "holds a wrapper":
        return
    # Torch tells a hook of all modules no keyword arguments, and the hooks of the module itself are told too late.
    kwargs = sys._getframe(1).f_locals.get("kwargs", {})
    noting = _start(module, args, kwargs)
    if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks of its own
        noting.undo = [nn_module.register_module_forward_hook(noting.end, always_call=True).remove]
    else:
        handles = (
            module.register_forward_pre_hook(noting.enter),
            module.register_forward_hook(noting.end, always_call=True),
        )
        noting.undo, noting.keys = [handle.remove for handle in handles], [handle.id for handle in handles]


def _note_compiled(module: nn.Module) -> Callable[[], None]:
    """Notes the calls of a module that was compiled in place, which no hook sees. Returns what undoes it."""
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        if here.paused or torch.compiler.is_compiling() or _kind_of(module) == "holds a wrapper":
            return compiled(*args, **kwargs)
        noting, output = _start(module, args, kwargs), None
        try:
            output = compiled(*args, **kwargs)
        finally:
            noting.end(module, args, output)
        return output

    vars(module)["_compiled_call_impl"] = call
    kept = weakref.ref(module)

    def undo() -> None:
        if (held := kept()) is not None and vars(held).get("_compiled_call_impl") is call:
            vars(held)["_compiled_call_impl"] = compiled

    return undo


def _start(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Noting:
    threads.add(threading.get_ident())
    given = _tensors_of((args, kwargs))
    here.brief.begin(_FEW_CALLS, 1)
    here.frozen.begin(*((_FEW_CALLS, 1) if here.frozen.size > _LARGE else (_MANY_CALLS, _LOSSES)))
    here.frozen.size += sum(tensor.numel() * tensor.element_size() for tensor in given)
    return _Noting(module, args, kwargs, given, _kind_of(module))


class _Noting:
    """The call of an outermost module while it runs. It knows the arguments from before the module's own hooks.

    Lists, dicts and other containers among them are copied, as the module may take items out, or put others in.
    """

    def __init__(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], given: list[Tensor], kind: str
    ) -> None:
        self.module, self.kind, self.given = module, kind, given
        self.args, self.kwargs = _copied(args), _copied(kwargs)
        self.versions = [version_of(tensor) for tensor in self.given]
        wants = wants_state()
        self.random_state = random_state() if wants else None
        self.buffers = _buffers_of(module) if wants else []
        self.values = Values(submodules_of(module)) if wants and torch.is_grad_enabled() else None
        self.inner = here.inner = {}
        self.depth, self.undo, self.keys = 0, list[Callable[[], Any]](), list[int]()
        self.change = before_change(module, args, {}) if _works_in_place(module) and args else None
        self.traced = [tensor for tensor in self.given if type(tensor) is Traced]
        for tensor in self.traced:
            tensor.__class__ = Tensor  # type: ignore[assignment]
        here.paused, self.hook = True, hook_taken_out()  # so that submodules cost nothing
        self.hook.__enter__()

    def __deepcopy__(self, memo: Any) -> _Noting:
        return self

    def enter(self, module: nn.Module, args: Sequence[Any]) -> None:
        """The hook before the module calls itself."""
        self.depth += 1

    def end(self, module: nn.Module, args: Sequence[Any], output: Any) -> None:
        """The hook after the module."""
        if module is not self.module:  # it is a copy, made while the module ran
            for key in self.keys:
                module._forward_hooks.pop(key, None)
                module._forward_pre_hooks.pop(key, None)
            return
        if self.depth:
            self.depth -= 1
            return
        self._close()
        if output is None:  # the module raised
            return
        found = outputs_in(output)
        name = type(module).__name__
        if self.change is not None and found and found[0] is self.args[0]:
            self.change.random_state = self.random_state
            self.change.cuts_gradient = not torch.is_grad_enabled()
            note(found[0], Ref(self.change, 0))
            return
        if self.kind != "watched" and not self.traced:
            if any(map(_is_followed, found)):
                _tell("not watched", name)
        elif not torch.is_grad_enabled():
            if self._is_model(found):
                _tell("without gradient", name)
                for tensor in self._new(found):
                    mark_lost(tensor, name)
        else:
            self._note(name, output, found)

    def _close(self) -> None:
        for step in self.undo:
            step()
        self.hook.__exit__(None, None, None)
        for tensor in self.traced:
            tensor.__class__ = Traced
        here.paused, here.inner = False, None

    def _new(self, found: list[Tensor]) -> list[Tensor]:
        """Without the arguments that the module handed through, which keep the trace that they have."""
        return [tensor for tensor in found if not any(tensor is given for given in self.given)]

    def _is_model(self, found: list[Tensor]) -> bool:
        """Whether a module is more than a step of preparing data, such as a transform of images."""
        if self.traced or any(tensor.requires_grad for tensor in found):
            return True
        if next(self.module.parameters(), None) is not None:
            return True
        return any(watch.known is not None and id(self.module) in watch.known for watch in watches)

    def _note(self, name: str, output: Any, found: list[Tensor]) -> None:
        if not any(map(_is_followed, found)) or not self._is_model(found):
            return
        _tell("with gradient", name)
        step, module = step_of(self.module, self.args, self.kwargs), self.module
        step.random_state = self.random_state
        step.call = call = Call(found)
        call.places = [()] if output is found[0] else places_in(output)
        inside = submodules_of(module)
        call.modes, call.switches, call.weights = modes_of(inside), switches_of(inside), weights_of(inside)
        call.buffers = self.buffers
        if self.values is not None:
            note_changed_buffers(self.buffers)
            call.changed_state = self.values.changed()
        call.inner = {m: [o.detach() if isinstance(o, Tensor) else o for o in given] for m, given in self.inner.items()}
        call.changed = any(version_of(t) != before for t, before in zip(self.given, self.versions, strict=True))
        new = set(map(id, self._new(found)))
        lengths = {len(tensor) for tensor in found if _is_followed(tensor)}
        for place, tensor in enumerate(found):
            if tensor.ndim and len(tensor) in lengths and id(tensor) in new:
                if not _is_followed(tensor):  # a mask, or indices, beside embeddings
                    step.chosen[place] = tensor.detach()
                note(tensor, Ref(step, place))


def _works_in_place(module: nn.Module) -> bool:
    """Whether a layer of torch changes what it takes. It is noted as a function that does so."""
    return getattr(module, "inplace", False) is True and type(module).__module__.startswith("torch.nn.")


def _is_followed(output: Tensor) -> bool:
    """Whether a module that gives this is noted: not where it gives a number, such as a loss, or indices alone."""
    return output.ndim > 0 and (output.is_floating_point() or output.is_complex())


def _tensors_of(arguments: Any) -> list[Tensor]:
    try:
        return tensors_in(arguments)
    except RecursionError:  # a container that holds itself
        return []


def _copied(arguments: Any) -> Any:
    """The same tensors and objects in copies of their containers."""
    try:
        return mapped(arguments, lambda leaf: leaf)
    except (TypeError, RecursionError):  # a container of a class of its own, or one that holds itself
        return arguments


def _keep_inner(module: nn.Module, args: Any, output: Any) -> None:
    if here.inner is not None:
        given = here.inner.setdefault(module, [])
        if not any(output is other for other in given):  # several watches may want to know it
            given.append(output)


def _tell(how: str, name: str) -> None:
    for watch in watches:
        watch.seen[how].add(name)


def _kind_of(module: nn.Module) -> str:
    if _kinds.get(module, "other") == "other":  # it may have got another module since
        inside = submodules_of(module)
        if any(getattr(type(m), "wraps_a_loss_or_miner", False) for m in inside):
            kind = "holds a wrapper"
        elif any(watch.known is None or not watch.known.isdisjoint(map(id, inside)) for watch in watches):
            kind = "watched"
        else:
            kind = "other"
        _kinds[module] = kind
    return _kinds[module]


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


class _State(NamedTuple):
    """Of a tensor: which one it is, and its number of changes in place."""

    number: int
    version: int

    def __repr__(self) -> str:
        return "a tensor"


def switches_of(modules: Iterable[nn.Module]) -> dict[tuple[int | str, str], Any]:
    """What may switch modules of the user's own classes: attributes, buffers, and globals that ``forward`` reads.

    Returns:
        (number of a module or name of its class, attribute) -> value. Of tensors it is told whether they are others.
    """
    found: dict[tuple[int | str, str], Any] = {}
    kinds: dict[type, None] = {}
    for number, module in enumerate(modules):
        if not type(module).__module__.startswith("torch."):
            kinds[type(module)] = None
            for name, value in (*vars(module).items(), *module._buffers.items()):
                if name not in _OF_MODULES and (kept := _kept(value)) is not _NOT_KEPT:
                    found[number, name] = kept
    for kind in kinds:
        for name, value in _shared(kind):
            if (kept := _kept(value)) is not _NOT_KEPT:
                found[kind.__name__, name] = kept
    return found


def way_of(step: Step) -> tuple[Any, ...]:
    """What tells one way in which a step works from another: classes, modes, switches, and arguments that are flags."""
    function = step.function
    if step.call is None:
        return (getattr(function, "__name__", type(function).__name__),)
    given = [argument.values() if isinstance(argument, Mapping) else (argument,) for argument in step.args]
    given += [value.values() if isinstance(value, Mapping) else (value,) for value in step.kwargs.values()]
    flags = [_roughly(value) for values in given for value in values if type(value) in _PLAIN]
    inside = () if step.call.weights is None else tuple(map(type, step.call.weights.modules))
    return type(function), step.call.modes, inside, tuple(map(_roughly, step.call.switches.values())), *flags


def way_of_modules(modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """The same of modules as they are now."""
    return modes_of(modules), tuple(map(type, modules)), tuple(map(_roughly, switches_of(modules).values()))


def _roughly(value: Any) -> Any:
    """A value, where it may be a switch. Numbers may be counters or rates, which are others in each step."""
    kind = type(value)
    if kind is int:
        return value if abs(value) < _SHORT else int
    if kind is float:
        return value != 0
    return value if kind in _PLAIN else None


def _shared(kind: type) -> Iterator[tuple[str, Any]]:
    """What all modules of a class look up in one place: its attributes, and globals."""
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        yield from ((name, value) for name, value in vars(owner).items() if not name.startswith("__"))
    if isinstance(forward := getattr(kind, "forward", None), FunctionType):
        known = forward.__globals__
        yield from ((name, known[name]) for name in forward.__code__.co_names if name in known)


def _kept(value: Any) -> Any:
    """A value that can be compared with a later one; `_NOT_KEPT` of objects, and of what is long."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (list, tuple, set, frozenset):
        return kind(value) if len(value) <= _SHORT and all(type(item) in _PLAIN for item in value) else _NOT_KEPT
    if kind is dict:
        return {**value} if len(value) <= _SHORT and all(type(v) in _PLAIN for v in value.values()) else _NOT_KEPT
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return _State(id(value), version_of(value))
    return _NOT_KEPT


def weights_of(modules: Sequence[nn.Module]) -> Weights:
    """What modules hold now. It runs in each step, so it is written for speed."""
    held = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]  # those hold no tensors that stay the same
    parameters = [p for m in held for p in m._parameters.values()]
    inside = modules[1:]  # the first has our own hooks
    hooks_inside = [key for m in inside for hooks in (m._forward_hooks, m._forward_pre_hooks) for key in hooks]
    buffers = [b for m in held for b in m._buffers.values()]
    return Weights(held, parameters, buffers, marks_of(parameters), hooks_inside)


def marks_of(parameters: Iterable[Tensor | None]) -> list[int]:
    """Numbers that are others when a parameter was changed, or got other data."""
    given = [p for p in parameters if p is not None]
    return [p._version for p in given] + [_address(p) for p in given]


def _address(parameter: Tensor) -> int:
    try:
        return parameter.data_ptr()
    except RuntimeError:  # it has no storage, as parameters on the meta device or of some subclasses
        return 0


def _buffers_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return [
        (inside, name, buffer.detach().clone())
        for inside in module.modules()
        for name, buffer in inside._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
