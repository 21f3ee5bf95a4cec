"""What is remembered of how tensors were made: a trace of steps, each of which gave some tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .nested import leaves

_numbers = count()
_DEVICES = ("cpu", "cuda")


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
    """Of the global random number generators: torch's on the CPU and on each device, and numpy's and Python's."""

    on_cpu: Tensor
    on_devices: list[Tensor]
    others: tuple[Any, Any] | None


class Step:
    """One step of a trace: what was called, and with which arguments.

    Attributes:
        function: a module, or a function of torch.
        args: positional arguments, with `Ref` and `Fixed` in place of tensors.
        kwargs: keyword arguments, likewise.
        in_place: whether the function changes its first argument.
        number: grows from step to step.
        autocast: device -> type, where autocast was on.
        cuts_gradient: whether no gradient flows from the outputs back to the arguments.
        first_frozen: in which generation the first of the steps was taken that led to it, where all of them were
            without gradient, see `tracing.Kept`; None: others led to it.
        hooks: (place of an output, handle of a hook that the user registered on it).
        random_state: before the step, where a `Watch` wanted to know it.
        call: what is known of the call of a module; None for a function.
        chosen: place of an output -> its value, for whole numbers and truth values, such as an order of rows.
    """

    __slots__ = (
        "__weakref__",
        "_leaves",
        "args",
        "autocast",
        "call",
        "chosen",
        "cuts_gradient",
        "first_frozen",
        "function",
        "hooks",
        "in_place",
        "kwargs",
        "number",
        "random_state",
    )

    def __init__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], in_place: bool = False) -> None:
        self.function, self.in_place, self.number = function, in_place, next(_numbers)
        self.args, self.kwargs = tuple(args), dict(kwargs)
        self.autocast = autocast()
        self.cuts_gradient = False
        self.first_frozen: int | None = None
        self.hooks: list[tuple[int, RemovableHandle]] = []
        self.random_state: RandomState | None = None
        self.call: Call | None = None
        self.chosen: dict[int, Tensor] = {}
        self._leaves: list[Any] | None = None

    @property
    def leaves(self) -> list[Any]:
        """All that the arguments hold and that is no container, in order."""
        if self._leaves is None:
            self._leaves = list(leaves((self.args, self.kwargs)))
        return self._leaves

    @property
    def refs(self) -> list[Ref]:
        """The arguments that other steps gave."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Ref)]


class Weights(NamedTuple):
    """What a module and its submodules hold.

    Attributes:
        modules: those that hold tensors that can be exchanged.
        parameters: theirs, in order.
        buffers: likewise.
        marks: of the parameters, see `watch.marks_of`.
        hooks: the numbers that torch gave to the hooks on submodules.
    """

    modules: list[nn.Module]
    parameters: Sequence[Tensor | None]
    buffers: Sequence[Tensor | None]
    marks: list[int]
    hooks: list[int]


class Call:
    """What is known of the call of a module.

    Attributes:
        outputs: the tensors that it gave, detached, in the order of `outputs_in`.
        places: where they stood in what it gave, see `nested.places_in`; None: that is not known.
        modes: the ``training`` flags of its submodules.
        switches: what may switch it, as it was after the call, see `watch.switches_of`.
        weights: what it held after the call; None: that is not known.
        swapped: name -> tensor, parameters and buffers that it does not have now, as ``torch.func.functional_call`` had
            put them into it, see `find_swapped`.
        changed: whether the module changed an argument in place.
        buffers: (module, name, a copy of the buffer before the call), where a `Watch` wanted to know them.
        changed_state: functions that put back what else the call changed, see `side_effects.Values`.
        inner: submodule -> what it gave, for submodules that a `Watch` wanted to know about.
    """

    __slots__ = (
        "buffers",
        "changed",
        "changed_state",
        "inner",
        "modes",
        "outputs",
        "places",
        "swapped",
        "switches",
        "weights",
    )

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        self.outputs = [output.detach() for output in outputs]
        self.places: list[tuple[Any, ...]] | None = None
        self.modes: tuple[bool, ...] = ()
        self.switches: dict[tuple[int | str, str], Any] = {}
        self.weights: Weights | None = None
        self.swapped: dict[str, Tensor] = {}
        self.changed = False
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []
        self.changed_state: list[Callable[[], Any]] = []
        self.inner: dict[nn.Module, list[Any]] = {}

    def find_swapped(self, module: nn.Module, now: Weights) -> None:
        """Finds out which parameters and buffers the module does not have now, as it had them in the call.

        Buffers are looked at in torch's own layers, which do not exchange them themselves.
        """
        if self.weights is None or self.weights.modules != now.modules:
            return
        names = iter([(m, name) for m in now.modules for name in m._parameters])
        changed = [
            (*place, one)
            for place, one, other in zip(names, self.weights.parameters, now.parameters, strict=True)
            if one is not other and one is not None
        ]
        of_buffers = [(m, name) for m in now.modules for name in m._buffers]
        for (owner, name), one, other in zip(of_buffers, self.weights.buffers, now.buffers, strict=True):
            if one is not other and one is not None and type(owner).__module__.startswith("torch.nn."):
                changed.append((owner, name, one.clone()))
        if changed:
            prefix = {inside: f"{name}." if name else "" for name, inside in module.named_modules()}
            self.swapped = {prefix[owner] + name: tensor for owner, name, tensor in changed}


def steps_to(results: Sequence[Ref | Fixed]) -> list[Step]:
    """The steps that led to the results, in their order."""
    found: dict[int, Step] = {}
    todo = [result.step for result in results if isinstance(result, Ref)]
    while todo:
        step = todo.pop()
        if step.number not in found:
            found[step.number] = step
            todo.extend(ref.step for ref in step.refs)
    return [found[number] for number in sorted(found)]


def autocast() -> dict[str, torch.dtype]:
    """Device -> type, where autocast is on."""
    return {kind: torch.get_autocast_dtype(kind) for kind in _DEVICES if torch.is_autocast_enabled(kind)}


def version_of(tensor: Tensor) -> int:
    """The number of changes in place; 0 for tensors of inference mode, which have no such number."""
    try:
        return tensor._version
    except RuntimeError:
        return 0
