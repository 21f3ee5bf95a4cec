"""Embeds other inputs in the way in which the embeddings of a batch were made, and checks that this is the way.

A trace is followed back from the embeddings to the inputs of the modules, see `tracing`. Which row of which input an
embedding depends on is found by experiment: where an input's row becomes NaN, so do the embeddings that depend on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import CaptureError
from .isolation import preserved
from .pixels import PixelSpace
from .plan import take
from .tracing import Fixed, Ref, Step, Traced, autocast_state, leaves, mapped, paused, tensors_in
from .tuples import rank_in_group

Outputs = list[Tensor]
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
        source: ``(N,)`` number of the source, -1 where no input is known.
        row: ``(N,)`` row of the source.
        in_order: whether embedding i depends on row i of the only source, for all rows of it.
        apart: whether the trace may be run with some rows alone.
    """

    source: Tensor
    row: Tensor
    in_order: bool
    apart: bool


class Replay:
    """The way from inputs to embeddings ``(N, D)``."""

    def __init__(self, embeddings: Sequence[Tensor], pixels: PixelSpace, perturb_input: str | None = None) -> None:
        self._results = [tensor.made_by for tensor in embeddings]  # type: ignore[attr-defined]
        self._given = [tensor.detach() for tensor in embeddings]
        self._steps = steps_to(self._results)
        self._pixels = pixels
        self.modules = tuple(dict.fromkeys(step.function for step in self._steps if step.is_module))
        self._origins: dict[tuple[Step, int], int] = {}
        self._sources = self._find_sources(perturb_input)
        self._at = {
            (step, leaf): number for number, source in enumerate(self._sources) for step, leaf in source.places
        }
        self.rows = self._find_rows()
        self.inputs = self._known_inputs()

    def embed(self, inputs: Tensor, rows: Tensor | None = None) -> Tensor:
        """Embeds inputs in place of those of some rows.

        Args:
            inputs: ``(K, ...)`` in [0, 1].
            rows: ``(K,)`` the embeddings that they are for; None: all with known inputs, in order.

        Returns:
            ``(K, D)``.
        """
        with paused():
            if self.rows.apart:
                picked = None if rows is None else take(self.rows.row, rows)
                return torch.cat(self._run(partial(self._run_part, inputs, picked)))
            if rows is None:
                rows = (self.rows.source >= 0).nonzero().flatten()
            given = self._source_outputs(inputs, rows)
            turn = rank_in_group(rows)
            parts, order = [], []
            for number in range(int(turn.max()) + 1 if len(rows) else 0):
                mine = (turn == number).nonzero().flatten()
                whole = torch.cat(self._run(partial(self._run_whole, given, rows, mine)))
                parts.append(whole[rows[mine]])
                order.append(mine)
            return torch.cat(parts)[torch.cat(order).argsort()]

    def difference(self) -> float:
        """How far the clean inputs, embedded again, are from the embeddings that were given, relative to their size."""
        with torch.no_grad(), paused(), preserved(*self.modules), _random_state_kept():
            again = self._run(_run_again)
        far = max(float((one - other).abs().max()) for one, other in zip(again, self._given, strict=True))
        return far / max(max(float(one.abs().max()) for one in self._given), 1e-12)

    # How the trace is run

    def _run(self, run: Run) -> Outputs:
        made: dict[Step, Outputs] = {}

        def resolved(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return made[leaf.step][leaf.place]
            return leaf.value if isinstance(leaf, Fixed) else leaf

        for step in self._steps:
            made[step] = run(step, mapped(step.args, resolved), mapped(step.kwargs, resolved))
        return [made[result.step][result.place] for result in self._results]

    def _run_part(self, inputs: Tensor, rows: Tensor | None, step: Step, args: Any, kwargs: Any) -> Outputs:
        """Runs a step with some rows of the only source alone."""
        if not step.is_module:
            return apply(step, args, kwargs)
        count = len(self._sources[0].value)
        taken = self._pixels.to_inputs(inputs)
        args, kwargs = self._with_inputs(step, args, kwargs, {0: taken}, rows, count)
        return apply(step, args, kwargs)

    def _with_inputs(
        self, step: Step, args: Any, kwargs: Any, inputs: Mapping[int, Tensor], rows: Tensor | None, count: int
    ) -> tuple[Any, Any]:
        """The arguments of a step with other inputs; of arguments of one row for each input, the rows that belong."""
        number = iter(range(10**9))
        refs = [isinstance(leaf, Ref) for leaf in leaves((step.args, step.kwargs))]

        def changed(leaf: Any) -> Any:
            place = next(number)
            source = self._at.get((step, place))
            if source in inputs:
                return inputs[source]
            if rows is not None and not refs[place] and isinstance(leaf, Tensor) and _has_rows(leaf, count):
                return leaf[rows]
            return leaf

        return mapped((args, kwargs), changed)

    def _source_outputs(self, inputs: Tensor, rows: Tensor) -> dict[Step, tuple[Tensor, Tensor, Outputs]]:
        """For each step that takes a source: which of the rows are its own, their place in it, and its outputs of them."""
        found = {}
        of_source, row = self.rows.source[rows], self.rows.row[rows]
        for number, source in enumerate(self._sources):
            mine = (of_source == number).nonzero().flatten()
            if not len(mine):
                continue
            own = self._pixels.to_inputs(_unpadded(inputs[mine], source.value))
            for step, _ in source.places:
                args, kwargs = mapped((step.args, step.kwargs), lambda v: v.value if isinstance(v, Fixed) else v)
                args, kwargs = self._with_inputs(step, args, kwargs, {number: own}, row[mine], len(source.value))
                found[step] = mine, row[mine], apply(step, args, kwargs)
        return found

    def _run_whole(
        self, given: Mapping[Step, tuple[Tensor, Tensor, Outputs]], rows: Tensor, mine: Tensor, step: Step, args: Any, kwargs: Any
    ) -> Outputs:
        """Runs a step at full size: of what takes a source, the outputs of the perturbed rows among the clean ones."""
        if not any(step is place for source in self._sources for place, _ in source.places):
            return apply(step, args, kwargs)
        if step not in given:
            return list(step.outputs)
        of_rows, row, outputs = given[step]
        now = torch.isin(of_rows, mine)
        return [
            clean.index_copy(0, row[now], new[now].to(clean.dtype)) if clean.is_floating_point() and clean.ndim else clean
            for clean, new in zip(step.outputs, outputs, strict=True)
        ]

    # What is found out about the trace

    def _find_sources(self, perturb_input: str | None) -> list[Source]:
        places: dict[int, list[tuple[Step, int]]] = {}
        values: dict[int, Tensor] = {}
        for step in self._steps:
            if not step.is_module or step.refs:
                continue
            for leaf in _candidates(step, perturb_input):
                value = list(leaves((step.args, step.kwargs)))[leaf].value
                places.setdefault(id(value), []).append((step, leaf))
                values[id(value)] = value
                break
        return [Source(values[key], tuple(found)) for key, found in places.items()]

    def _find_rows(self) -> Rows:
        sizes = [len(source.value) for source in self._sources]
        device = self._given[0].device
        total, count = sum(sizes), sum(map(len, self._given))
        simple = len(sizes) == 1 and len(self._results) == 1 and all(s.is_module for s in self._steps)
        if simple and all(len(o) == total for s in self._steps for o in s.outputs if o.ndim):
            return Rows(torch.zeros(count, dtype=torch.long), torch.arange(count), True, True)
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        bits = max(1, (total - 1).bit_length())
        with torch.no_grad(), paused():
            is_nan = torch.stack([
                torch.cat([r.flatten(1).isnan().any(1) for r in self._run(partial(self._run_nan, bit, value, starts))])
                for bit in range(bits)
                for value in (0, 1)
            ]).unflatten(0, (bits, 2))
        zero, one = is_nan[:, 0], is_nan[:, 1]
        several = (zero & one).any(0)
        if several.any():
            raise CaptureError(f"row {int(several.nonzero()[0])} comes from several inputs")
        known = (zero | one).any(0)
        number = (one * (2 ** torch.arange(bits, device=one.device))[:, None]).sum(0)
        start = torch.tensor(starts, device=device)
        source = torch.where(known, (number[:, None] >= start).sum(1) - 1, -1)
        row = number - start[source.clamp(min=0)]
        in_order = len(sizes) == 1 and count == total and bool((row == torch.arange(count, device=device)).all())
        return Rows(source, row, in_order, in_order and len(self._results) == 1 and self._runs_apart())

    def _run_nan(self, bit: int, value: int, starts: list[int], step: Step, args: Any, kwargs: Any) -> Outputs:
        """Runs a step with NaN in the rows whose number has this value of a bit; modules keep rows apart."""
        if not step.is_module:
            return apply(step, args, kwargs)
        holds = None
        for number, (source, start) in enumerate(zip(self._sources, starts, strict=True)):
            if any(step is place for place, _ in source.places):
                numbers = start + torch.arange(len(source.value), device=source.value.device)
                holds = (numbers >> bit) & 1 == value
        refs = [isinstance(leaf, Ref) for leaf in leaves((step.args, step.kwargs))]
        for is_ref, leaf in zip(refs, leaves((args, kwargs)), strict=True):
            if is_ref:
                found = leaf.flatten(1).isnan().any(1)
                holds = found if holds is None else holds | found
        if holds is None:
            return list(step.outputs)
        return [_with_nan(output, holds) for output in step.outputs]

    def _runs_apart(self) -> bool:
        """Whether the functions of the trace give the same with some rows alone: tried with rows in another order."""
        count = len(self._sources[0].value)
        some = torch.arange(count - 1, -1, -2, device=self._given[0].device)
        some = torch.cat([some, some[:1]])

        def part(step: Step, args: Any, kwargs: Any) -> Outputs:
            if step.is_module:
                return [o[some] if o.ndim else o for o in step.outputs]
            return apply(step, args, kwargs)

        def whole(step: Step, args: Any, kwargs: Any) -> Outputs:
            return list(step.outputs) if step.is_module else apply(step, args, kwargs)

        with torch.no_grad(), paused():
            try:
                alone, beside = self._run(part), self._run(whole)
            except Exception:  # a function of the caller's may raise anything on other rows
                return False
        return all(a.shape == b[some].shape and torch.allclose(a, b[some], 1e-3, 1e-5) for a, b in zip(alone, beside, strict=True))

    def _known_inputs(self) -> Tensor:
        if self.rows.in_order:
            return self._pixels.to_pixels(self._sources[0].value.detach())
        pixels = [self._pixels.to_pixels(source.value.detach()) for source in self._sources]
        if len({p.shape[1:] for p in pixels}) > 1:
            width = max(p[0].numel() for p in pixels)
            pixels = [nn.functional.pad(p.flatten(1), (0, width - p[0].numel())) for p in pixels]
        start = torch.tensor([0, *map(len, pixels)]).cumsum(0).to(self.rows.row)
        known = self.rows.source >= 0
        return torch.cat(pixels)[start[self.rows.source[known]] + self.rows.row[known]]


def steps_to(results: Sequence[Ref]) -> list[Step]:
    """The steps that led to the results, in their order."""
    found: dict[int, Step] = {}
    todo = [result.step for result in results]
    while todo:
        step = todo.pop()
        if step.number not in found:
            found[step.number] = step
            todo.extend(ref.step for ref in step.refs)
    return [found[number] for number in sorted(found)]


def apply(step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outputs:
    """Takes a step again, with other arguments."""
    with _autocast_as(step):
        if step.in_place:
            first = args[0].clone()
            step.function(first, *args[1:], **kwargs)
            return [first]
        function = step.function.module if isinstance(step.function, DistributedDataParallel) else step.function
        if step.swapped:
            return tensors_in(torch.func.functional_call(function, dict(step.swapped), tuple(args), dict(kwargs)))
        return tensors_in(function(*args, **kwargs))


def _run_again(step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outputs:
    if step.random_state is not None:
        torch.set_rng_state(step.random_state[0])
        if step.random_state[1] is not None:
            torch.cuda.set_rng_state_all(step.random_state[1])
    return apply(step, args, kwargs)


def _random_state_kept():
    return torch.random.fork_rng()


def _autocast_as(step: Step) -> ExitStack:
    stack, now = ExitStack(), dict(autocast_state())
    then = dict(step.autocast)
    for kind in {*now, *then}:
        if now.get(kind) != then.get(kind):
            stack.enter_context(torch.autocast(kind, enabled=kind in then, dtype=then.get(kind)))
    return stack


def _candidates(step: Step, name: str | None) -> Iterator[int]:
    """Numbers of the arguments that may be perturbed, the best one first."""
    for number, leaf in enumerate(leaves((step.args, step.kwargs))):
        if isinstance(leaf, Fixed) and leaf.value.is_floating_point() and leaf.value.ndim > 1:
            yield number


def _has_rows(value: Tensor, count: int) -> bool:
    return value.ndim > 0 and len(value) == count and not isinstance(value, nn.Parameter)


def _unpadded(inputs: Tensor, like: Tensor) -> Tensor:
    if inputs.shape[1:] == like.shape[1:]:
        return inputs
    return inputs[:, : like[0].numel()].reshape(-1, *like.shape[1:])


def _with_nan(output: Tensor, rows: Tensor) -> Tensor:
    if not (output.is_floating_point() and output.ndim and len(output) == len(rows)):
        return output
    return output.masked_fill(rows.view(-1, *[1] * (output.ndim - 1)), torch.nan)
