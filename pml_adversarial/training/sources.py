"""Which tensors are perturbed: inputs that modules took, or what a module inside of the model gave."""

from __future__ import annotations

import inspect
import logging
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CaptureError, InputError
from .graph import call_inside, is_made_of, is_of_data, nodes_of, own_function
from .isolation import preserved, random_kept
from .nested import leaves
from .rerun import apply, checkpoints_take_gradients, name_of, value_of
from .trace import Call, Fixed, Ref, Step, version_of
from .tracing import paused
from .watch import way_of

logger = logging.getLogger("pml_adversarial")

INNER = -1
"""Stands for the number of an argument where the output of an inner module is perturbed."""


class Choice(NamedTuple):
    """What the user wants to be perturbed.

    Attributes:
        argument: name of an argument of the model; None: the first tensor of floating point.
        at: an inner module whose output is perturbed in place of inputs; None: inputs.
    """

    argument: str | None = None
    at: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor that is perturbed.

    Attributes:
        value: ``(n, ...)`` as the modules took it.
        places: where it stands: (step, number of the argument among the leaves of all arguments, or `INNER`).
    """

    value: Tensor
    places: tuple[tuple[Step, int], ...]


class Sources:
    """The tensors that are perturbed, and which outputs of modules come from them.

    Args:
        steps: all steps of a trace.
        results: what the trace leads to.
        choice: what the user wants to be perturbed.

    Raises:
        CaptureError: there is nothing to perturb, or it stands further back than the trace goes.
        InputError: the choice names nothing that is there.
    """

    def __init__(self, steps: Sequence[Step], results: Sequence[Ref | Fixed], choice: Choice) -> None:
        self._choice = choice
        self._origins: dict[tuple[Step, int], int] = {}
        _check_unchanged(steps)
        self.all = self._found(
            [*(ref for step in steps for ref in step.refs), *(r for r in results if isinstance(r, Ref))]
        )
        if not self.all:
            raise _nothing_to_perturb(steps, choice)
        self._by_value = {id(source.value): number for number, source in enumerate(self.all)}
        self._numbers = {place: number for number, source in enumerate(self.all) for place in source.places}

    def __len__(self) -> int:
        return len(self.all)

    def at(self, step: Step, argument: int) -> int | None:
        """The number of the source that stands at a place, from which outputs come; None: no source."""
        return self._numbers.get((step, argument))

    def holding(self, leaf: Any) -> int | None:
        """The number of the source that an argument is; None: it is none."""
        return self._by_value.get(id(leaf.value)) if isinstance(leaf, Fixed) else None

    def of_output(self, step: Step, place: int) -> int | None:
        """The number of the source that an output of a module comes from; None: it comes from none."""
        origin = self._origins.get((step, place))
        return None if origin is None else self._numbers[step, origin]

    def argument_of_output(self, step: Step, place: int) -> int | None:
        """The number of the argument that an output of a module comes from, or `INNER`."""
        return self._origins.get((step, place))

    def check_beside(self, steps: Sequence[Step], embeddings: Sequence[Tensor]) -> None:
        """Looks at tensors with gradient that steps took beside what is followed. They are held fixed.

        Args:
            steps: all steps of the trace.
            embeddings: what it leads to, with their graph.

        Raises:
            CaptureError: one of them was made of what is perturbed, and not by a step of the trace.
        """
        fixed = [(step, leaf.value) for step in steps for leaf in step.leaves if self._is_beside(leaf)]
        if not fixed:
            return
        without = [value.grad_fn for _, value in fixed]
        others = {node for one in embeddings for node in nodes_of(one, without)}
        inputs = [source.value for source in self.all]
        for step, value in fixed:
            made = is_made_of(value, inputs, others)
            if made:
                raise CaptureError(_of_the_inputs(step, value))
            if made is None:
                logger.warning(
                    f"Beside what is followed, {name_of(step)} took a tensor {tuple(value.shape)} that was computed "
                    "with gradient, of data with as many rows as the inputs. It is held fixed. If it was made of the "
                    "inputs, perturbed rows have the clean one: let a module return it, or name all modules, "
                    "AdversarialLoss(loss, [first, second]), or none."
                )

    def _is_beside(self, leaf: Any) -> bool:
        is_followed = not isinstance(leaf, Fixed) or isinstance(leaf.value, nn.Parameter) or leaf.value.grad_fn is None
        return not is_followed and self.holding(leaf) is None

    def _found(self, refs: Sequence[Ref]) -> list[Source]:
        values: dict[int, Tensor] = {}
        places: dict[int, dict[tuple[Step, int], None]] = {}
        for step, place in dict.fromkeys((ref.step, ref.place) for ref in refs):
            if step.call is None:
                continue
            if self._choice.at is not None:
                origin, value = INNER, _inner_output(step, step.call, self._choice.at)
            elif step.refs:
                continue
            else:
                origin, leaf = _origin_of(step, place, self._choice.argument)
                value = None
                if leaf is not None:
                    value = leaf.value
                    _check_leaf(step, leaf)
            if value is None:
                continue
            _check_rows(step, value, step.call.outputs[place])
            self._origins[step, place] = origin
            values[id(value)] = value
            places.setdefault(id(value), {})[step, origin] = None
        return [Source(values[key], tuple(found)) for key, found in places.items()]


def _inner_output(step: Step, call: Call, at: nn.Module) -> Tensor | None:
    given = call.inner.get(at, [])
    if not given:
        return None
    if len(given) > 1 or not isinstance(given[0], Tensor):
        found = f"ran {len(given)} times" if len(given) > 1 else f"gave {type(given[0]).__name__}"
        raise CaptureError(
            f"at={type(at).__name__}(...) {found} in one forward pass of {name_of(step)}; expected one tensor from one "
            "call. Call the model once for each of its inputs, or name a module that runs once and gives a tensor."
        )
    if step.refs:
        raise CaptureError(
            f"at={type(at).__name__}(...) is inside of {name_of(step)}, which took what other modules gave; expected a "
            "module that takes the data. Put both into one module, such as nn.Sequential(trunk, head), and call that."
        )
    return given[0]


def _origin_of(step: Step, place: int, name: str | None) -> tuple[int, Fixed | None]:
    """The number of the argument that is perturbed for an output of a module, and the argument; None: there is none.

    Of several that can be, it is the one that is named, or else the first one that the output depends on.
    """
    given = step.leaves
    candidates = [number for number, leaf in enumerate(given) if _can_be_perturbed(leaf)]
    candidates = [number for number in candidates if given[number].value.ndim > 1] or candidates
    arguments = _arguments(step)
    if name is not None:
        named = {id(leaf) for leaf in leaves({**_by_key(arguments), **arguments}.get(name))}
        candidates = [number for number in candidates if id(given[number]) in named]
        if not candidates:
            raise InputError(
                f"perturb_input={name!r}, and {name_of(step)} took {_listed(arguments)}; expected the name of an "
                "argument of its forward(), or a key of a dict among them, that holds a tensor of floating point with "
                "one row for each embedding."
            )
    if len(candidates) > 1:
        order = {id(leaf): number for number, leaf in enumerate(leaves(arguments))}
        candidates.sort(key=lambda number: order.get(id(given[number]), sys.maxsize))
        depends = _dependence(step, candidates)[place]
        candidates = [number for number in candidates if number in depends] or candidates
    if not candidates:
        return 0, None
    chosen = given[candidates[0]]
    if len({id(given[number].value) for number in candidates}) > 1:
        _tell_choice(step, arguments, chosen)
    elif name is None and any(_is_data_of_whole_numbers(leaf, chosen.value) for leaf in given):
        raise InputError(
            f"{name_of(step)} took {_listed(arguments)}; the whole numbers look like the data, which cannot be "
            f"perturbed as they are, and floating point is only what stands beside them. {_cure_for(given)} If "
            f"{_name_in(arguments, chosen)} is to be perturbed, say so: perturb_input={_name_in(arguments, chosen)!r}."
        )
    return candidates[0], chosen


def _can_be_perturbed(leaf: Any) -> bool:
    if not isinstance(leaf, Fixed) or isinstance(leaf.value, nn.Parameter):
        return False
    return leaf.value.is_floating_point() and leaf.value.ndim > 0


def _is_data_of_whole_numbers(leaf: Any, chosen: Tensor) -> bool:
    """Whether an argument may be what is embedded, such as images in uint8, and the one that can be perturbed not."""
    if not isinstance(leaf, Fixed) or leaf.value.is_floating_point() or leaf.value.dtype is torch.bool:
        return False
    is_as_large = leaf.value.ndim > 1 and len(leaf.value) == len(chosen) and leaf.value.numel() >= chosen.numel()
    return is_as_large and (leaf.value.is_complex() or bool((leaf.value > 1).any()))  # 0 and 1 are a mask


def _cure_for(given: Sequence[Any]) -> str:
    """What to do about data without gradient, by its type."""
    types = {leaf.value.dtype for leaf in given if isinstance(leaf, Fixed) and not leaf.value.is_floating_point()}
    if torch.uint8 in types:
        return "Convert images with `images.float() / 255` before they enter the model."
    if any(kind.is_complex for kind in types):
        return (
            "Pass complex numbers as pairs of real ones, model(torch.view_as_real(x)), and let the model begin with "
            "torch.view_as_complex."
        )
    if types:
        return (
            "Whole numbers, such as token ids, have no gradient. Perturb what they become, such as the token "
            "embeddings: AdversarialLoss(loss, model, at=model.embedding, bounds=(low, high))."
        )
    return "Pass the inputs yourself: loss_func(embeddings, labels, inputs=x), with AdversarialLoss(loss, function)."


def _arguments(step: Step) -> dict[str, Any]:
    """Name of an argument -> value, in the order in which ``forward`` names them."""
    function: Any = step.function
    while isinstance(function, nn.Module) and _passes_on(function):
        function = getattr(function, "_orig_mod", None) or function.module
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        found = dict(inspect.signature(function).bind(*step.args, **step.kwargs).arguments)
    except (TypeError, ValueError):  # it has no signature, as modules of TorchScript
        return {**{str(number): value for number, value in enumerate(step.args)}, **step.kwargs}
    further = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    return {**found, **{key: value for name in further for key, value in found.pop(name, {}).items()}}


def _by_key(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same with what dicts hold, by the names of their keys, in place of the dicts."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        is_named = isinstance(value, Mapping) and all(isinstance(key, str) and key not in arguments for key in value)
        found.update(value if is_named else {name: value})
    return found


def _passes_on(module: nn.Module) -> bool:
    """Whether a module hands all arguments on to the one that it wraps, as DataParallel and torch.compile do."""
    return isinstance(getattr(module, "_orig_mod", None) or getattr(module, "module", None), nn.Module)


def _listed(arguments: Mapping[str, Any]) -> str:
    """Names of arguments with their tensors."""
    named = _by_key(arguments).items()
    held = {name: [v.value for v in leaves(value) if isinstance(v, Fixed)] for name, value in named}
    return ", ".join(f"{name}: {', '.join(map(_form, values)) or '-'}" for name, values in held.items()) or "nothing"


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _name_in(arguments: Mapping[str, Any], chosen: Any) -> str:
    return next(name for name, value in _by_key(arguments).items() if any(leaf is chosen for leaf in leaves(value)))


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _tell_choice(step: Step, arguments: Mapping[str, Any], chosen: Any) -> None:
    function = step.function
    if not isinstance(function, nn.Module) or function in _told:
        return
    _told.add(function)
    name = _name_in(arguments, chosen)
    logger.warning(
        f"{name_of(step)} took {_listed(arguments)}. {name} is perturbed, and the others are held fixed. Choose with "
        f"perturb_input={name!r}."
    )


_dependences: weakref.WeakKeyDictionary[Any, dict[Any, list[set[int]]]] = weakref.WeakKeyDictionary()


def _dependence(step: Step, candidates: list[int]) -> list[set[int]]:
    """For each output of a module, the candidates that it depends on: those with respect to which it has a gradient."""
    known = _dependences.setdefault(step.function, {})
    key = (*candidates, way_of(step))  # a flag may say which one counts
    if key not in known:
        inputs = {number: step.leaves[number].value.detach().clone().requires_grad_() for number in candidates}
        by_leaf = {id(step.leaves[number]): value for number, value in inputs.items()}
        modules = [step.function] if isinstance(step.function, nn.Module) else []
        with (
            paused(),
            preserved(*modules, learns=True),
            random_kept(),
            torch.enable_grad(),
            checkpoints_take_gradients(),
        ):
            outputs = apply(step, lambda leaf: by_leaf.get(id(leaf), value_of(leaf)))
            known[key] = [_depends_on(output, inputs) for output in outputs]
    return known[key]


def _depends_on(output: Tensor, inputs: Mapping[int, Tensor]) -> set[int]:
    if not output.requires_grad:
        return set()
    found = torch.autograd.grad(output.sum(), list(inputs.values()), retain_graph=True, allow_unused=True)
    return {number for number, gradient in zip(inputs, found, strict=True) if gradient is not None}


def _check_leaf(step: Step, leaf: Fixed) -> None:
    """Refuses what is no input: features of another module."""
    value, before = leaf.value, leaf.lost
    if before:
        raise CaptureError(
            f"{name_of(step)} took features that {before} computed under no_grad, or in an earlier step, or that were "
            f"detached, so the inputs stand further back and are not known. To freeze {before}, set "
            "requires_grad_(False) on its parameters in place of no_grad or detach, and run it in each step. If "
            "they are to be held fixed, name the argument that is perturbed, perturb_input='x'. "
            "To perturb the features themselves, pass them: loss_func(embeddings, labels, inputs=features), with "
            "AdversarialLoss(loss, head, bounds=(low, high))."
        )
    if value.grad_fn is None:
        return
    if function := own_function(value):
        raise CaptureError(
            f"{name_of(step)} took features that went through {function}, a function of autograd in Python, and it is "
            f"not known what it does. {call_inside(function)}"
        )
    if not is_of_data(value):
        raise CaptureError(
            f"{name_of(step)} took features that were computed with gradient, by modules that are not watched or "
            "before the loss was made, inside of a module, where a hook or an attribute kept them, or by the loop with "
            "parameters of its own, as in model(x + prompt). Name all modules, AdversarialLoss(loss, [trunk, head]), "
            "or none, make the loss before the forward pass, and let a module return what the loop takes. Of what the "
            "loop does itself, make a function: loss_func(embeddings, labels, inputs=x), with "
            "AdversarialLoss(loss, lambda x: model(x + prompt))."
        )


def _of_the_inputs(step: Step, value: Tensor) -> str:
    if function := own_function(value):
        how = f"by {function}, a function of autograd in Python, of which is not known what it does. "
        cure = call_inside(function)
    else:
        how = (
            "in a way that is not followed: by a module that is not named, by a function of TorchScript, or inside of "
            "a module, where a hook or an attribute kept it. "
        )
        cure = (
            "Name all modules, AdversarialLoss(loss, [first, second]), or none; let a module return what the loop "
            "takes; and write functions in plain torch."
        )
    return (
        f"Beside what is followed, {name_of(step)} took a tensor {tuple(value.shape)} that was made of the inputs too, "
        f"{how}The perturbed rows would have the clean one. {cure} Or make a function of what the loop does: "
        "loss_func(embeddings, labels, inputs=x), with AdversarialLoss(loss, function)."
    )


def _check_rows(step: Step, value: Tensor, output: Tensor) -> None:
    """Refuses a module that gives other rows than it takes."""
    if output.ndim and len(value) == len(output):
        return
    inputs = [leaf.value for leaf in step.leaves if _can_be_perturbed(leaf)]
    if output.ndim and len(inputs) > 1 and len(output) == sum(map(len, inputs)):
        raise CaptureError(
            f"{name_of(step)} gave {tuple(output.shape)}, rows of several inputs one after the other; expected one row "
            "for each row of one input. Let the loop call what embeds each of the inputs, and put their rows together "
            "there: torch.cat([model.first(x), model.second(y)])."
        )
    raise CaptureError(
        f"{name_of(step)} gave {tuple(output.shape)} for inputs {tuple(value.shape)}; expected one row for each "
        "input. Pass the inputs yourself, one row for each embedding: loss_func(embeddings, labels, inputs=x), "
        "with AdversarialLoss(loss, function)."
    )


def _check_unchanged(steps: Sequence[Step]) -> None:
    """Refuses a trace whose tensors were changed in place since they were used."""
    for step in steps:
        if step.call is not None and step.call.changed:
            raise CaptureError(
                f"{name_of(step)} changed its input in place, so the inputs that it was given are gone. Let it work on "
                "a copy, as in `x = x - mean` for `x -= mean` or with inplace=False in its first layer."
            )
        for leaf in step.leaves:
            if isinstance(leaf, Fixed) and version_of(leaf.value) != leaf.version:
                raise CaptureError(
                    f"A tensor {tuple(leaf.value.shape)} that {name_of(step)} took was changed in place since, such as "
                    "a buffer that was filled anew. Compute the loss before it is changed, or give the model a copy, "
                    "model(x.clone())."
                )


def _nothing_to_perturb(steps: Sequence[Step], choice: Choice) -> CaptureError | InputError:
    calls = [step for step in steps if step.call is not None]
    called = ", ".join(name_of(step) for step in calls)
    if choice.at is not None:
        kind = type(choice.at).__name__
        return CaptureError(
            f"at={kind}(...), and no {kind} that is this one ran inside of {called}; expected a module of the model "
            "that the loop calls. A copy, a compiled or a scripted module holds others: name the one that runs."
        )
    if not calls:
        held = [leaf.value for step in steps for leaf in step.leaves if isinstance(leaf, Fixed)]
        function = next(filter(None, map(own_function, held)), None)
        seen = f" They went through {function}, a function of autograd. {call_inside(function)}" if function else ""
        return CaptureError(
            f"The embeddings were made by {', '.join(map(name_of, steps))}, and not of what a module gave.{seen} Or "
            "pass the inputs yourself, loss_func(embeddings, labels, inputs=x), with AdversarialLoss(loss, function)."
        )
    arguments = "; ".join(f"{name_of(step)} took {_listed(_arguments(step))}" for step in calls if not step.refs)
    cure = _cure_for([leaf for step in calls for leaf in step.leaves])
    return InputError(f"{arguments}; expected a tensor of floating point, with one row for each input. {cure}")
