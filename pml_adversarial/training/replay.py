"""Embeds other inputs in the way in which the embeddings of a batch were made, and checks that this is the way.

A trace is followed back from the embeddings to the inputs of the modules, see `tracing`. Which row of which input an
embedding depends on is found by experiment: where an input's row becomes NaN, so do the embeddings that depend on it.
"""

from __future__ import annotations

import inspect
import sys
import weakref

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from ..errors import CaptureError, ReplayError
from .isolation import preserved
from .nested import leaves, mapped, tensors_in
from .pixels import PixelSpace
from .tracing import Fixed, Ref, Step, autocast, paused, version_of
from .tuples import rank_in_group

Outputs = Sequence[Tensor]
Run = Callable[[Step, Sequence[Any], Mapping[str, Any]], Outputs]


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor of inputs that modules took.

    Attributes:
        value: ``(n, ...)`` as the modules took it.
        places: where it stands: (step, number of the argument among the leaves of all arguments).
    """

    value: Tensor
    places: tuple[tuple[Step, int], ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Which row of which source each embedding depends on.

    Attributes:
        source: ``(N,)`` number of the source; -1 where no input is known.
        row: ``(N,)`` row of the source.
        in_order: whether embedding i depends on row i of the only source, and all rows of it are embedded.
        apart: whether the steps may be taken with some of the rows alone.
    """

    source: Tensor
    row: Tensor
    in_order: bool = False
    apart: bool = False


class Replay:
    """The way from inputs to embeddings.

    Args:
        results: what together are the embeddings ``(N, D)``, in the order of their rows.
        pixels: how inputs become pixels.
        order: ``(N,)`` the order in which the rows of the results are the embeddings; None: as they are.
        perturb_input: name of the argument of the model that is perturbed; None: the one of floating point.

    Attributes:
        modules: the modules that were called.
        inputs: ``(P, ...)`` in [0, 1], the inputs of the rows whose inputs are known, in order.
        num_known: ``P``; these rows come first.

    Raises:
        CaptureError: there is no way back to inputs, or more than one.
        InputError: the inputs are no pixels.
    """

    def __init__(
        self,
        results: Sequence[Ref | Fixed],
        pixels: PixelSpace,
        order: Tensor | None = None,
        perturb_input: str | None = None,
    ) -> None:
        self._results, self._pixels, self._order = results, pixels, order
        self._steps = steps_to(results)
        self.modules = tuple(dict.fromkeys(s.function for s in self._steps if isinstance(s.function, nn.Module)))
        self._origins: dict[tuple[Step, int], int] = {}
        self._sources = self._find_sources(perturb_input)
        self._numbers = {place: number for number, source in enumerate(self._sources) for place in source.places}
        self._check_unchanged()
        self._rows = self._find_rows()
        self.inputs = self._known_inputs()
        self.num_known = len(self.inputs)

    def embed(self, inputs: Tensor, rows: Tensor | None = None) -> Tensor:
        """Embeds inputs in place of those of some rows.

        Args:
            inputs: ``(K, ...)`` in [0, 1].
            rows: ``(K,)`` the rows whose place they take; None: all with known inputs, in order.

        Returns:
            ``(K, D)``.
        """
        with paused():
            if self._rows.apart:
                return self._run(partial(self._run_some, inputs, rows))[0]
            return self._embed_among_clean(inputs, rows)

    def again(self) -> Tensor:
        """``(N, D)`` the clean inputs, embedded again; with the random numbers of the first time where they are known."""
        with torch.no_grad(), paused(), preserved(*self.modules), torch.random.fork_rng():
            return self._whole(self._run(_run_as_before))

    def _given(self) -> Tensor:
        """``(N, D)`` the embeddings as they were given."""
        with torch.no_grad(), paused(), preserved():
            return self._whole(self._run(lambda s, a, k: s.call.outputs if s.call is not None else apply(s, a, k)))

    @property
    def form(self) -> Any:
        """What two replays have in common that embed in the same way. It can be hashed."""
        number = {step: place for place, step in enumerate(self._steps)}

        def kind(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return number[leaf.step], leaf.place
            return (leaf.value.dtype, leaf.value.ndim) if isinstance(leaf, Fixed) else type(leaf)

        return tuple(
            (step.function, step.call and step.call.modes, *map(kind, leaves((step.args, step.kwargs))))
            for step in self._steps
        )

    def check(self) -> bool:
        """Embeds the clean inputs again, and compares with the embeddings that were given.

        Returns:
            False where this has to wait for the next step, since the model may draw random numbers, and it is not known which ones it drew.

        Raises:
            ReplayError: they differ.
        """
        given = self._given()
        again = self.again()
        found = _difference(again, given)
        if found <= _tolerance(given.dtype):
            return True
        told = all(step.call is None or step.call.random_state is not None for step in self._steps)
        if not told and _difference(self.again(), again) > _tolerance(given.dtype):
            return False
        raise ReplayError(
            f"{' -> '.join(name_of(s) for s in self._steps)}: the clean inputs, embedded again, differ from the embeddings by {found:.2g} of their size."
        )

    def _embed_among_clean(self, inputs: Tensor, rows: Tensor | None) -> Tensor:
        """Takes the steps at full size: a turn for the first copy of each row, one for the second, and so on."""
        if rows is None:
            rows = torch.arange(self.num_known, device=inputs.device)
        given, turn, found = self._outputs_of(inputs, rows), rank_in_group(rows), []
        order = turn.argsort(stable=True)
        for count in turn.bincount().tolist():
            mine = order[sum(map(len, found)) :][:count]
            found.append(self._whole(self._run(partial(self._run_among_clean, given, mine)))[rows[mine]])
        return torch.cat(found)[order.argsort()]

    def _whole(self, results: Outputs) -> Tensor:
        whole = results[0] if len(results) == 1 else torch.cat(list(results))
        return whole if self._order is None else whole[self._order]

    # How steps are taken again

    def _run(self, run: Run) -> list[Tensor]:
        made: dict[Step, Outputs] = {}

        def resolved(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return made[leaf.step][leaf.place]
            return leaf.value if isinstance(leaf, Fixed) else leaf

        for step in self._steps:
            made[step] = run(step, mapped(step.args, resolved), mapped(step.kwargs, resolved))
        return [resolved(result) for result in self._results]

    def _run_some(self, inputs: Tensor, rows: Tensor | None, step: Step, args: Any, kwargs: Any) -> Outputs:
        """Takes a step with some rows of the only source alone."""
        if step.call is not None:
            args, kwargs = self._with_inputs(step, args, kwargs, 0, self._pixels.to_inputs(inputs), rows)
        return apply(step, args, kwargs)

    def _with_inputs(
        self, step: Step, args: Any, kwargs: Any, number: int, inputs: Tensor, rows: Tensor | None
    ) -> tuple[Any, Any]:
        """The arguments with other inputs; of arguments with one row for each input, the rows that belong to them."""
        count = len(self._sources[number].value)
        kinds = enumerate(leaves((step.args, step.kwargs)))

        def changed(leaf: Any) -> Any:
            place, kind = next(kinds)
            if self._numbers.get((step, place)) == number:
                wants_gradient = kind.value.requires_grad and torch.is_grad_enabled() and not inputs.requires_grad
                return inputs.detach().requires_grad_() if wants_gradient else inputs
            fixed = isinstance(kind, Fixed) and not isinstance(leaf, nn.Parameter)
            return leaf[rows] if rows is not None and fixed and leaf.ndim and len(leaf) == count else leaf

        return mapped((args, kwargs), changed)

    def _outputs_of(self, inputs: Tensor, rows: Tensor) -> dict[tuple[Step, int], tuple[Tensor, Tensor, Outputs]]:
        """For each place of a source: which of the rows are its own, of which rows of the source, and the outputs."""
        found = {}
        sources, row = self._rows.source[rows], self._rows.row[rows]
        for number, source in enumerate(self._sources):
            mine = (sources == number).nonzero().flatten() if len(self._sources) > 1 else torch.arange(len(rows))
            if not len(mine):
                continue
            own = self._pixels.to_inputs(_unpadded(inputs[mine], source.value))
            for step, place in source.places:
                given = mapped((step.args, step.kwargs), lambda leaf: leaf.value if isinstance(leaf, Fixed) else leaf)
                args, kwargs = self._with_inputs(step, *given, number, own, row[mine])
                found[step, place] = mine, row[mine], apply(step, args, kwargs)
        return found

    def _run_among_clean(
        self, given: Mapping[tuple[Step, int], Any], mine: Tensor, step: Step, args: Any, kwargs: Any
    ) -> Outputs:
        """Takes a step at full size; of a source, the outputs of these rows stand among the clean ones."""
        if step.call is None or step.refs:
            return apply(step, args, kwargs)
        outputs = list(step.call.outputs)
        for place, output in enumerate(outputs):
            key = step, self._origins.get((step, place), -1)
            if key in given:
                rows, row, new = given[key]
                now = torch.isin(rows, mine)
                outputs[place] = output.index_copy(0, row[now], new[place][now].to(output.dtype))
        return outputs

    # What is found out about the steps

    def _find_sources(self, perturb_input: str | None) -> list[Source]:
        refs = [ref for step in self._steps for ref in step.refs]
        refs += [result for result in self._results if isinstance(result, Ref)]
        values: dict[int, Tensor] = {}
        places: dict[int, list[tuple[Step, int]]] = {}
        for ref in refs:
            step = ref.step
            if step.call is None or step.refs or (step, ref.place) in self._origins:
                continue
            origin = origin_of(step, ref.place, perturb_input)
            if origin is None:
                continue
            value = list(leaves((step.args, step.kwargs)))[origin].value
            _check_input(step, value, len(step.call.outputs[ref.place]))
            self._origins[step, ref.place] = origin
            values[id(value)] = value
            if (step, origin) not in places.setdefault(id(value), []):
                places[id(value)].append((step, origin))
        if not values:
            raise self._nothing_to_perturb()
        return [Source(values[key], tuple(found)) for key, found in places.items()]

    def _nothing_to_perturb(self) -> CaptureError:
        called = [s for s in self._steps if s.call is not None and not s.refs]
        taken = [f"{leaf.value.dtype} {tuple(leaf.value.shape)}" for s in called for leaf in leaves((s.args, s.kwargs)) if isinstance(leaf, Fixed)]
        return CaptureError(f"{', '.join(type(s.function).__name__ for s in called)} took {taken}; expected floating point")

    def _check_unchanged(self) -> None:
        for step in self._steps:
            if step.call is not None and step.call.modes and step.call.modes != modes_of(step.function):
                raise ReplayError(
                    f"{name_of(step)} changed its mode (train or eval) between the forward pass and the loss, so its embeddings "
                    "would be others now. Compute the loss before you call .eval() or .train()."
                )
            if step.call is not None and step.call.changed:
                raise CaptureError(
                    f"{type(step.function).__name__} changed its input in place, so the inputs that it was given are gone. Let it "
                    "work on a copy, as in `x = x - mean` for `x -= mean` or with inplace=False."
                )
            for leaf in leaves((step.args, step.kwargs)):
                if isinstance(leaf, Fixed) and version_of(leaf.value) != leaf.version:
                    raise CaptureError(
                        f"A tensor {tuple(leaf.value.shape)} that {name_of(step)} took was changed in place since, such as a "
                        "buffer that was filled anew. Compute the loss before, or give the model a copy."
                    )

    def _find_rows(self) -> Rows:
        sizes = [len(source.value) for source in self._sources]
        total, device = sum(sizes), self._sources[0].value.device
        if self._is_plain_call(total):
            return Rows(torch.zeros(total, dtype=torch.long), torch.arange(total), True, True)
        starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        bits = max(1, (total - 1).bit_length())
        with torch.no_grad(), paused():
            is_nan = torch.stack([self._nan_rows(bit, value, starts) for bit in range(bits) for value in (0, 1)])
        zero, one = is_nan[::2], is_nan[1::2]
        if (zero & one).any():
            raise self._rows_mix(int((zero & one).any(0).nonzero()[0]))
        known = (zero | one).any(0)
        number = (one * (2 ** torch.arange(bits, device=one.device))[:, None]).sum(0)
        starts = starts.to(number.device)
        source = (number[:, None] >= starts).sum(1) - 1
        row = number - starts[source]
        source = torch.where(known, source, -1)
        in_order = len(sizes) == 1 and total == len(row) and torch.equal(row, torch.arange(total, device=row.device))
        return Rows(source, row, in_order, in_order and len(self._results) == 1 and self._order is None and self._takes_some())

    def _is_plain_call(self, total: int) -> bool:
        """Whether the embeddings are the output of modules alone, one after the other."""
        if len(self._sources) > 1 or len(self._results) > 1 or self._order is not None:
            return False
        return all(
            step.call is not None and len(step.refs) <= 1 and all(len(o) == total for o in step.call.outputs if o.ndim)
            for step in self._steps
        )

    def _rows_mix(self, row: int) -> CaptureError:
        return CaptureError(f"Embedding {row} depends on several inputs.")

    def _nan_rows(self, bit: int, value: int, starts: Tensor) -> Tensor:
        whole = self._whole(self._run(partial(self._run_with_nan, bit, value, starts)))
        return whole.flatten(1).isnan().any(1)

    def _run_with_nan(self, bit: int, value: int, starts: Tensor, step: Step, args: Any, kwargs: Any) -> Outputs:
        """Takes a step with NaN in the rows whose number has this value of a bit. Modules keep rows apart."""
        if step.call is None:
            return apply(step, args, kwargs)
        if step.refs:
            pairs = zip(leaves((step.args, step.kwargs)), leaves((args, kwargs)), strict=True)
            taken = [leaf for kind, leaf in pairs if isinstance(kind, Ref)]
            is_nan = torch.stack([leaf.flatten(1).isnan().any(1) for leaf in taken]).any(0)
            return [_with_nan(output, is_nan) for output in step.call.outputs]
        outputs = list(step.call.outputs)
        for place, output in enumerate(outputs):
            number = self._numbers.get((step, self._origins.get((step, place), -1)))
            if number is not None:
                rows = starts[number] + torch.arange(len(output))
                outputs[place] = _with_nan(output, ((rows >> bit) & 1 == value).to(output.device))
        return outputs

    def _takes_some(self) -> bool:
        """Whether functions give the same of some rows alone. It is tried with every other row, from the last one."""
        count = len(self._sources[0].value)
        some = torch.arange(count - 1, -1, -2, device=self._rows_device())
        some = torch.cat([some, some[:1]])

        def alone(step: Step, args: Any, kwargs: Any) -> Outputs:
            return apply(step, args, kwargs) if step.call is None else [o[some] if o.ndim else o for o in step.call.outputs]

        def beside(step: Step, args: Any, kwargs: Any) -> Outputs:
            return apply(step, args, kwargs) if step.call is None else step.call.outputs

        with torch.no_grad(), paused():
            try:
                found, expected = self._run(alone)[0], self._run(beside)[0][some]
            except Exception:  # a function of the caller's may raise anything on other rows
                return False
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-5)

    def _rows_device(self) -> torch.device:
        return next(step.call.outputs[0].device for step in self._steps if step.call is not None)

    def _known_inputs(self) -> Tensor:
        pixels = [self._pixels.to_pixels(source.value.detach()) for source in self._sources]
        if self._rows.in_order:
            return pixels[0]
        if len({found.shape[1:] for found in pixels}) > 1:
            width = max(found[0].numel() for found in pixels)
            pixels = [pad(found.flatten(1), (0, width - found[0].numel())) for found in pixels]
        starts = torch.tensor([0, *map(len, pixels)]).cumsum(0).to(self._rows.row)
        known = self._rows.source >= 0
        num_known = int(known.sum())
        if not known[:num_known].all():
            raise CaptureError("rows with known inputs do not come first")
        return torch.cat(pixels)[starts[self._rows.source[:num_known]] + self._rows.row[:num_known]]


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


def apply(step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outputs:
    """Takes a step again, with other arguments."""
    with _autocast_of(step):
        if step.in_place:
            first = args[0].clone()
            step.function(first, *args[1:], **kwargs)
            return [first]
        function = step.function.module if isinstance(step.function, DistributedDataParallel) else step.function
        if step.call is not None and step.call.swapped:
            return tensors_in(torch.func.functional_call(function, step.call.swapped, tuple(args), dict(kwargs)))
        return tensors_in(function(*args, **kwargs))


def _run_as_before(step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outputs:
    """Takes a step again with the random numbers of the first time."""
    if step.call is not None and step.call.random_state is not None:
        on_cpu, on_devices = step.call.random_state
        torch.set_rng_state(on_cpu)
        for number, state in enumerate(on_devices):
            torch.cuda.set_rng_state(state, number)
    return apply(step, args, kwargs)


def _autocast_of(step: Step) -> ExitStack:
    stack, now = ExitStack(), autocast()
    for kind in now.keys() | step.autocast.keys():
        if now.get(kind) != step.autocast.get(kind):
            stack.enter_context(torch.autocast(kind, enabled=kind in step.autocast, dtype=step.autocast.get(kind)))
    return stack


def origin_of(step: Step, place: int, name: str | None) -> int | None:
    """The number of the argument that is perturbed for an output of a module; None if no argument can be.

    Of several that can be, it is the one that is named, or else the first one that the output depends on.
    """
    given = list(leaves((step.args, step.kwargs)))
    candidates = [number for number, leaf in enumerate(given) if _can_be_perturbed(leaf)]
    if name is not None:
        named = {id(leaf) for leaf in leaves(_arguments(step).get(name))}
        candidates = [number for number in candidates if id(given[number]) in named]
    if len(candidates) < 2:
        return next(iter(candidates), None)
    depends = _dependence(step, candidates)[place]
    return next((number for number in candidates if number in depends), candidates[0])


def _can_be_perturbed(leaf: Any) -> bool:
    if not isinstance(leaf, Fixed) or isinstance(leaf.value, nn.Parameter):
        return False
    return leaf.value.is_floating_point() and leaf.value.ndim > 1


def _arguments(step: Step) -> Mapping[str, Any]:
    """Name of an argument -> value."""
    function = step.function.forward if isinstance(step.function, nn.Module) else step.function
    try:
        return inspect.signature(function).bind(*step.args, **step.kwargs).arguments
    except (TypeError, ValueError):  # it has no signature, as modules in other languages
        return step.kwargs


_dependences: weakref.WeakKeyDictionary[Any, dict[Any, list[set[int]]]] = weakref.WeakKeyDictionary()


def _dependence(step: Step, candidates: list[int]) -> list[set[int]]:
    """For each output of a module, the candidates that it depends on: those with respect to which it has a gradient."""
    known = _dependences.setdefault(step.function, {})
    key = *candidates, len(step.call.outputs) if step.call else 0
    if key not in known:
        numbers, inputs = iter(range(sys.maxsize)), {}

        def with_gradient(leaf: Any) -> Any:
            number = next(numbers)
            if number in candidates:
                inputs[number] = leaf.value.detach().clone().requires_grad_()
                return inputs[number]
            return leaf.value if isinstance(leaf, Fixed) else leaf

        modules = [step.function] if isinstance(step.function, nn.Module) else []
        with paused(), preserved(*modules), torch.random.fork_rng(), torch.enable_grad():
            outputs = apply(step, *mapped((step.args, step.kwargs), with_gradient))
            known[key] = [_depends_on(output, inputs) for output in outputs]
    return known[key]


def _depends_on(output: Tensor, inputs: Mapping[int, Tensor]) -> set[int]:
    if not output.requires_grad:
        return set()
    found = torch.autograd.grad(output.sum(), list(inputs.values()), retain_graph=True, allow_unused=True)
    return {number for number, gradient in zip(inputs, found, strict=True) if gradient is not None}


def _check_input(step: Step, value: Tensor, rows: int) -> None:
    """Refuses what is no input: features of another module; and a module that gives other rows than it takes."""
    base = value if value._base is None else value._base
    before = vars(value).get("without_gradient_from") or vars(base).get("without_gradient_from")
    if before or value.grad_fn is not None:
        found = f"{before} computed without gradient" if before else "was computed with gradient, by modules that are not watched"
        raise CaptureError(
            f"{name_of(step)} took features that {found}, so the inputs stand further back. To perturb those, name all modules, "
            "AdversarialLoss(loss, [trunk, head]), and freeze the trunk with requires_grad_(False) in place of no_grad. "
        )
    if len(value) != rows:
        raise CaptureError(f"{name_of(step)} gave {rows} rows for {len(value)} inputs; expected one row for each input.")


def modes_of(module: nn.Module) -> tuple[bool, ...]:
    """The ``training`` flags of all submodules."""
    return tuple(submodule.training for submodule in module.modules())


def name_of(step: Step) -> str:
    """The module or function, as the user knows it."""
    return type(step.function).__name__ if step.call is not None else getattr(step.function, "__name__", "a function")


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value. Values that are not finite are left out."""
    apart = (one - other)[other.isfinite()].abs()
    if not len(apart):
        return 0.0
    size = other[other.isfinite()].abs().max().clamp(min=torch.finfo(other.dtype).tiny)
    return float(apart.max().nan_to_num(torch.inf) / size)


def _tolerance(dtype: torch.dtype) -> float:
    return 0.05 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def _unpadded(inputs: Tensor, like: Tensor) -> Tensor:
    """Inputs of one of several shapes, from rows that are padded to the longest."""
    if inputs.shape[1:] == like.shape[1:]:
        return inputs
    return inputs[:, : like[0].numel()].reshape(-1, *like.shape[1:])


def _with_nan(output: Tensor, rows: Tensor) -> Tensor:
    if not (output.is_floating_point() and output.ndim and len(output) == len(rows)):
        return output
    return output.masked_fill(rows.view(-1, *[1] * (output.ndim - 1)), torch.nan)
