"""Remembers how tensors were made: which modules gave them, and what was done to their outputs since.

While a `Watch` lives, the outputs of the outermost modules become `Traced`, a class of tensors that notes each further
operation. So the embeddings that reach a loss tell how they were made of the modules' inputs. Nothing is noted inside a
module: its call is one step of the trace.

A tensor with gradient holds its trace, as it holds its graph. A number, or a tensor without gradient, holds it weakly,
so that sums and memories that live for long do not grow; the steps themselves stay for the present iteration and the
last one. Those of frozen modules stay for some more, since one iteration may have many of them, and several losses.
What a module gives under ``no_grad`` is only marked with the name of the module.
"""

from __future__ import annotations

import copy
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .nested import mapped, tensors_in
from .trace import Fixed, RandomState, Ref, Step, steps_to, version_of

_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "mod", "matmul"))}


_DETACH = {"detach", "detach_"}


class WantsTraces(Protocol):
    """Who asks for traces, see `watch.Watch`."""

    wants_state: bool
    known: set[int] | None
    seen: dict[str, set[str]]


class Kept:
    """Steps that gave tensors without gradient, which hold them weakly. They stay while these and the next are kept.

    Attributes:
        steps: those of the present generation.
        older: those of the one before.
        generation: how often ``steps`` was begun.
        calls: number of outermost calls of modules since then.
        losses: number of losses since then.
        size: bytes of what these modules took, where this counts.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.older: list[Step] = []
        self.generation = self.calls = self.losses = self.size = 0

    def begin(self, calls: int, losses: int) -> None:
        """Begins with the call of a module, in another generation after so many calls or losses."""
        self.calls += 1
        if self.calls > calls or self.losses >= losses:
            self.older, self.steps = self.steps, []
            self.generation += 1
            self.calls, self.losses, self.size = 1, 0, 0


class Here(threading.local):
    """Of this thread.

    Attributes:
        paused: whether nothing is noted, inside a module or a replay.
        inner: see `Call`; None outside of modules.
        frozen: steps of modules without gradient, and what was made of these alone.
        brief: other steps that gave tensors without gradient, such as what was detached, and losses.
    """

    def __init__(self) -> None:
        self.paused = False
        self.inner: dict[nn.Module, list[Any]] | None = None
        self.frozen, self.brief = Kept(), Kept()


here = Here()
watches: weakref.WeakSet[WantsTraces] = weakref.WeakSet()
"""All that ask for traces now."""

hooks: list[Any] = []
"""The handle of the hook before each module, if there is one."""

threads: set[int] = set()
"""Threads that run modules."""


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
            return Tensor.__repr__(self, tensor_contents=tensor_contents)  # type: ignore[call-arg]

    def __format__(self, spec: str) -> str:
        with plain([self]):
            return Tensor.__format__(self, spec)

    def __deepcopy__(self, memo: Any) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return copy.deepcopy(self._without_trace() if self.is_leaf else self.view_as(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self._without_trace().__reduce_ex__(protocol)

    def _without_trace(self) -> Tensor:
        plain = self.detach().requires_grad_(self.requires_grad)
        if self.is_leaf:
            plain.grad = self.grad
        return plain

    @property
    def _is_param(self) -> bool:
        """``nn.Parameter`` sets it on the tensor that it made of this one, which becomes a parameter like others."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        vars(self).clear()
        self.__class__ = nn.Parameter  # type: ignore[assignment]


class _Weak(NamedTuple):
    """A trace that others keep.

    Attributes:
        step: what made the tensor.
        place: which of its outputs this is.
        name: of the step.
        kept: who keeps it.
        generation: in which the first of the steps was taken that led to it.
    """

    step: weakref.ref[Step]
    place: int
    name: str
    kept: Kept
    generation: int


class _Lost(NamedTuple):
    name: str


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run_and_note(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if here.paused:
        return _run(func, args, kwargs)
    name = getattr(func, "__name__", "")
    if name == "register_hook" and (ref := ref_of(args[0])) is not None:
        handle = _run(func, args, kwargs)
        ref.step.hooks.append((ref.place, handle))
        return handle
    in_place = _works_in_place(name, args, kwargs)
    step = before_change(func, args, kwargs) if in_place else None
    before = random_state(of_torch_alone=True) if name != "__get__" and wants_state() else None
    result = _run(func, args, kwargs)
    if not in_place and not isinstance(result, Tensor | tuple | list):  # such as .shape
        return result
    given = [args[0]] if in_place else tensors_in(result)
    found = [(place, tensor) for place, tensor in enumerate(given) if in_place or type(tensor) is Tensor]
    if not found or (in_place and step is None):
        return result
    if (lost := _lost_among((args, kwargs))) is not None:
        for _, tensor in found:
            mark_lost(tensor, lost)
        return result
    is_weak = not any(tensor.requires_grad and tensor.ndim for _, tensor in found)
    step = step or step_of(func, args, kwargs, recent_only=is_weak)
    step.random_state = before
    step.cuts_gradient = (
        name in _DETACH or getattr(func, "__self__", None) is Tensor.data or not torch.is_grad_enabled()
    )
    for place, tensor in found:
        if not in_place and not (tensor.is_floating_point() or tensor.is_complex()):
            step.chosen[place] = tensor.detach()
        note(tensor, Ref(step, place))
    return result


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def before_change(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step | None:
    """The step of a function or module that will change its first argument; None where that stays without trace.

    What others hold of that tensor is copied before. A memory that keeps detached embeddings is not followed.
    """
    target = args[0]
    given = tensors_in((args[1:], kwargs))
    if isinstance(target, nn.Parameter):
        return None
    if type(target) is not Traced and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
        return None
    is_weak = not target.ndim or not (target.requires_grad or any(tensor.requires_grad for tensor in given))
    step = step_of(function, args, kwargs, in_place=True, recent_only=is_weak)
    if isinstance(step.args[0], Fixed):
        step.args = (Fixed(target.clone()), *step.args[1:])
    else:
        made_by, place = step.args[0].step, step.args[0].place
        if made_by.call is not None:
            made_by.call.outputs[place] = made_by.call.outputs[place].clone()
        elif place in made_by.chosen:
            made_by.chosen[place] = made_by.chosen[place].clone()
    return step


def _works_in_place(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if not args or not isinstance(args[0], Tensor):
        return False
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True


def _lost_among(value: Any) -> str | None:
    """The module whose outputs are among these tensors, where all that are traced have lost their trace."""
    traced = [tensor for tensor in tensors_in(value) if type(tensor) is Traced]
    lost = [lost_of(tensor) for tensor in traced]
    return lost[0] if lost and all(name is not None for name in lost) else None


def step_of(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], in_place: bool = False, recent_only: bool = False
) -> Step:
    """A step, with the traces of its arguments in their places.

    Args:
        function: a module, or a function of torch.
        args: positional arguments.
        kwargs: keyword arguments.
        in_place: whether the function changes its first argument.
        recent_only: whether traces without gradient that are older than the present ones are left out, so that what is
            summed up from step to step holds no chain of them.

    What was detached, such as a memory of earlier embeddings, is held fixed beside tensors of later calls, and where a
    module takes it beside data.
    """
    trace_of: Callable[[Any], Any] = _recent_argument if recent_only else _argument
    try:
        if not recent_only:
            given = tensors_in((args, kwargs))
            traced = [tensor for tensor in given if type(tensor) is Traced]
            beside_data = len(traced) < len(given) and isinstance(function, nn.Module) and any(map(_is_data, given))
            if len(traced) > 1 or (traced and beside_data):
                trace_of = _beside(traced, beside_data)
        return Step(function, mapped(tuple(args), trace_of), mapped(dict(kwargs), trace_of), in_place)
    except (TypeError, RecursionError):  # a container of a class of its own, or one that holds itself
        return Step(function, tuple(map(trace_of, args)), {k: trace_of(v) for k, v in kwargs.items()}, in_place)


def _recent_argument(leaf: Any) -> Any:
    origin = vars(leaf).get("origin") if type(leaf) is Traced else None
    if isinstance(origin, _Weak) and origin.generation < origin.kept.generation - (origin.kept is here.frozen):
        return Fixed(leaf, lost=lost_of(leaf) or "an operation")
    return _argument(leaf)


def _is_data(tensor: Tensor) -> bool:
    """Whether a tensor may be the input that is attacked."""
    return type(tensor) is Tensor and tensor.is_floating_point() and tensor.ndim > 0


def _beside(traced: Sequence[Tensor], beside_data: bool) -> Callable[[Any], Any]:
    """What gives the traces of arguments that are traced."""
    steps = {id(t): steps_to([ref]) for t in traced if isinstance(vars(t).get("origin"), _Weak) and (ref := ref_of(t))}
    detached = {key: found for key, found in steps.items() if any(map(_cuts, found))}
    if not detached:
        return _argument
    live = [ref for t in traced if id(t) not in detached and (ref := ref_of(t)) is not None]
    first = min((step.number for step in steps_to(live) if step.call is not None), default=None)
    calls = {key: [step for step in found if step.call is not None] for key, found in detached.items()}
    if first is None:
        fixed = {key: found[-1] for key, found in calls.items() if found} if beside_data else {}
    else:
        fixed = {key: found[-1] for key, found in calls.items() if found and found[-1].number < first}
    return lambda leaf: Fixed(leaf, lost=_name(fixed[id(leaf)].function)) if id(leaf) in fixed else _argument(leaf)


def _cuts(step: Step) -> bool:
    return step.cuts_gradient or (step.call is None and bool(step.chosen))


def _argument(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if type(leaf) is not Traced or isinstance(leaf, nn.Parameter):
        return Fixed(leaf)
    return ref_of(leaf) or Fixed(leaf, lost=lost_of(leaf))


def note(tensor: Tensor, made_by: Ref) -> None:
    """From now on, operations on the tensor are noted."""
    if isinstance(tensor, nn.Parameter):
        return
    step = made_by.step
    if tensor.requires_grad and tensor.ndim:  # sums of losses are often kept, beyond their backward pass
        _mark(tensor, made_by)
        return
    made_of = [ref.step.first_frozen for ref in step.refs]
    if tensor.requires_grad or step.cuts_gradient or None in made_of or (step.call is None and step.chosen):
        kept, first = here.brief, here.brief.generation
    else:
        kept, first = here.frozen, min((one for one in made_of if one is not None), default=here.frozen.generation)
        step.first_frozen = first
    kept.steps.append(step)
    _mark(tensor, _Weak(weakref.ref(step), made_by.place, _name(step.function), kept, first))


def _mark(tensor: Tensor, origin: Any) -> None:
    if type(tensor) in (Tensor, Traced):
        version = version_of(tensor)
        tensor.__class__ = Traced
        tensor.origin, tensor.made_at = origin, version  # type: ignore[attr-defined]


def mark_lost(tensor: Tensor, name: str) -> None:
    """From now on, the tensor and what is made of it are known as what a module gave under ``no_grad``."""
    _mark(tensor, _Lost(name))


def ref_of(tensor: Tensor) -> Ref | None:
    """How a tensor was made; None where that is not known, or where it was changed in place since."""
    origin = vars(tensor).get("origin")
    if origin is None or version_of(tensor) != tensor.made_at:  # type: ignore[attr-defined]
        return None
    if isinstance(origin, _Weak):
        step = origin.step()
        origin = None if step is None else Ref(step, origin.place)
    if not isinstance(origin, Ref) or (origin.step.cuts_gradient and tensor.requires_grad):
        return None  # something that was not noted has given it a gradient
    return origin


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
        tensor.__class__ = Tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for tensor in traced:
            tensor.__class__ = Traced


@contextmanager
def paused() -> Iterator[None]:
    """Inside, nothing is noted in this thread."""
    before, here.paused = here.paused, True
    try:
        with hook_taken_out():
            yield
    finally:
        here.paused = before


@contextmanager
def hook_taken_out() -> Iterator[None]:
    """Inside, no module calls the hook. It stays where other threads run modules too."""
    known = nn_module._global_forward_pre_hooks
    handles = hooks if len(threads) < 2 else []
    taken = [(handle.id, known.pop(handle.id)) for handle in handles if handle.id in known]
    try:
        yield
    finally:
        known.update(taken)


def wants_state() -> bool:
    """Whether anyone wants to know random states and buffers."""
    return any(watch.wants_state for watch in watches)


def random_state(of_torch_alone: bool = False) -> RandomState:
    """The present one. A function of torch draws from torch's generators alone."""
    on_devices = torch.cuda.is_available() and torch.cuda.is_initialized()
    return RandomState(
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if on_devices else [],
        None if of_torch_alone else (numpy.random.get_state(), random.getstate()),  # noqa: NPY002
    )


def _name(function: Any) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "a function")
