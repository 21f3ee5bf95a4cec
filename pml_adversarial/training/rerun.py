"""Takes the steps of a trace again, see `tracing`: as they were taken, or with other arguments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from .nested import mapped, outputs_in, tensors_in
from .side_effects import OWN, restore_attributes
from .trace import Fixed, Ref, Step, autocast

Outputs = Sequence[Tensor]
Resolve = Callable[[Any], Any]
"""An argument as a step holds it -> what is passed to the function."""
Take = Callable[[Step, Resolve], Outputs]
"""Takes one step. What the steps before it gave now is known to the function that comes with it."""
Held = Mapping[Step, Mapping[int, Tensor]]
"""What stays of the outputs of steps: step -> place -> value."""


def rerun(steps: Sequence[Step], results: Sequence[Ref | Fixed], take: Take) -> list[Tensor]:
    """Takes all steps, each with what the steps before it gave now, and returns the results."""
    made: dict[Step, Outputs] = {}

    def resolved(leaf: Any) -> Any:
        return made[leaf.step][leaf.place] if isinstance(leaf, Ref) else value_of(leaf)

    for step in steps:
        made[step] = take(step, resolved)
    return [resolved(result) for result in results]


def holding(take: Take, held: Held) -> Take:
    """Takes steps likewise, and gives what is held in place of what they gave."""

    def taken(step: Step, resolve: Resolve) -> Outputs:
        outputs = take(step, resolve)
        return [held[step].get(place, o) for place, o in enumerate(outputs)] if step in held else outputs

    return taken


def value_of(leaf: Any) -> Any:
    """An argument as it was given, if no step gave it."""
    return leaf.value if isinstance(leaf, Fixed) else leaf


def apply(
    step: Step,
    resolve: Resolve = value_of,
    autocast_as_now: bool = False,
    some: Resolve | None = None,
    read: Callable[[Any], Outputs] = outputs_in,
) -> Outputs:
    """Takes a step as it was taken, with the same swapped parameters.

    Args:
        step: the step.
        resolve: an argument as the step holds it -> what is passed.
        autocast_as_now: whether the autocast of now counts, and not that of the step.
        some: a list or tuple among the arguments -> one with other items, which are resolved then; None: it stays.
        read: what a module returned -> its outputs.
    """
    with ExitStack() if autocast_as_now or autocast() == step.autocast else _autocast_of(step):
        args = [_filled(argument, resolve, some) for argument in step.args]
        kwargs = {name: _filled(argument, resolve, some) for name, argument in step.kwargs.items()}
        if step.in_place:
            first = args[0].clone()
            step.function(first, *args[1:], **kwargs)
            return [first]
        if step.call is None:
            with torch.no_grad() if step.cuts_gradient else nullcontext():
                return tensors_in(step.function(*args, **kwargs))
        function = module_of(step.function)
        if step.call.swapped:
            return read(torch.func.functional_call(function, step.call.swapped, tuple(args), kwargs))
        return read(function(*args, **kwargs))


def module_of(function: Any) -> Any:
    """The function itself, or the module inside of `DistributedDataParallel`, whose own passes count."""
    return function.module if isinstance(function, DistributedDataParallel) else function


def _filled(argument: Any, resolve: Resolve, some: Resolve | None) -> Any:
    return resolve(argument) if isinstance(argument, Ref | Fixed) else mapped(argument, resolve, some)


def apply_as_before(step: Step, resolve: Resolve) -> Outputs:
    """As `apply`, from the state in which the step began the first time, where that is known."""
    if step.random_state is not None:
        torch.set_rng_state(step.random_state.on_cpu)
        for number, state in enumerate(step.random_state.on_devices):
            torch.cuda.set_rng_state(state, number)
        if step.random_state.others is not None:
            numpy.random.set_state(step.random_state.others[0])  # noqa: NPY002
            random.setstate(step.random_state.others[1])
    for module, name, value in step.call.buffers if step.call is not None else ():
        module._buffers[name] = value.clone()
    for put_back in step.call.changed_state if step.call is not None else ():
        put_back()
    return apply(step, resolve)


def recorded(step: Step, resolve: Resolve) -> Outputs:
    """Takes a step without running a module: what it gave is known."""
    return apply(step, resolve) if step.call is None else step.call.outputs


@contextmanager
def checkpoints_take_gradients() -> Iterator[None]:
    """Inside, reentrant activation checkpoints are others, since ``torch.autograd.grad`` cannot pass reentrant ones."""

    def apply_other(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    with _exchanged(CheckpointFunction, "apply", staticmethod(apply_other)):
        yield


@contextmanager
def recomputed_in(context: Callable[[], Callable[[], AbstractContextManager[Any]]]) -> Iterator[None]:
    """Lets activation checkpoints of the forward passes inside compute again, in the backward pass, in a context.

    Args:
        context: is asked when a checkpoint computes for the first time, and gives what makes the context of later ones.
    """
    frame: Any = checkpoints._CheckpointFrame  # of torch: there is one for each checkpoint that is not reentrant
    make, call = frame.__init__, CheckpointFunction.apply

    def make_other(self: Any, compute_again: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        make(self, _within(context(), compute_again), *args, **kwargs)

    def call_other(function: Callable[..., Any], *args: Any) -> Any:
        again = _within(context(), function)
        turns = iter([function])
        return call(lambda *given: next(turns, again)(*given), *args)

    with _exchanged(frame, "__init__", make_other), _exchanged(CheckpointFunction, "apply", staticmethod(call_other)):
        yield


@contextmanager
def checkpoints_of(modules: Iterable[nn.Module], take_gradients: bool) -> Iterator[None]:
    """Lets activation checkpoints compute again with the attributes that modules had when they computed first.

    The forward passes inside may have set them. Afterwards attributes are what they were.

    Args:
        modules: all submodules too.
        take_gradients: whether reentrant ones are others, see `checkpoints_take_gradients`.
    """
    held = list(map(vars, modules))
    before = list(map(dict, held))

    def state() -> Callable[[], AbstractContextManager[None]]:
        return partial(_with_attributes, held, [_changed(now, was) for now, was in zip(held, before, strict=True)])

    with recomputed_in(state), checkpoints_take_gradients() if take_gradients else nullcontext():
        yield


def _not_of_torch(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in OWN}


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _not_of_torch(now).items() if before.get(name) is not value}


@contextmanager
def _with_attributes(held: Sequence[dict[str, Any]], others: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    before = list(map(_not_of_torch, held))
    for attributes, values in zip(held, others, strict=True):
        attributes.update(values)
    try:
        yield
    finally:
        for attributes, values in zip(held, before, strict=True):
            restore_attributes(attributes, values, OWN)


def _within(context: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with context():
            return function(*args)

    return call


@contextmanager
def _exchanged(kind: Any, name: str, other: Any) -> Iterator[None]:
    """Inside, a class has another attribute."""
    own = vars(kind).get(name)
    setattr(kind, name, other)
    try:
        yield
    finally:
        if own is None:
            delattr(kind, name)
        else:
            setattr(kind, name, own)


@contextmanager
def output_replaced(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Inside, the module gives another output. What it computes still gets the gradient, as if a constant was added."""

    def replace(_: nn.Module, args: Any, computed: Tensor) -> Tensor:
        return output + (computed - computed.detach()) if computed.requires_grad else output

    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def name_of(step: Step) -> str:
    """The module or function, as the user knows it."""
    if step.call is not None or isinstance(step.function, nn.Module):
        return type(step.function).__name__
    return getattr(step.function, "__name__", "a function")


def _autocast_of(step: Step) -> ExitStack:
    stack, now = ExitStack(), autocast()
    for kind in now.keys() | step.autocast.keys():
        if now.get(kind) != step.autocast.get(kind):
            stack.enter_context(torch.autocast(kind, enabled=kind in step.autocast, dtype=step.autocast.get(kind)))
    return stack
