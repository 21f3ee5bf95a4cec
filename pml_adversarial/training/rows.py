"""Finds which row of which tensor each embedding depends on, by experiment.

Where the row of a module's output becomes NaN, or another number, so do the embeddings that depend on it. Modules are
not run for this: they are taken to keep rows apart, which `Replay.check_rows` looks at.

Whole numbers and truth values that are computed from the embeddings, such as an order of rows, may decide which rows
are picked. That, too, is found by experiment: with other numbers, other rows reach the embeddings. Such numbers stay.
Others do not, such as a mask of positive values or the nearest code of each row: they follow the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..errors import CaptureError
from .isolation import random_stream
from .rerun import Held, Outputs, Resolve, Take, apply, holding, name_of, recorded
from .sources import Sources
from .trace import Step
from .tracing import paused

Run = Callable[[Take], Tensor]
"""Takes all steps, and gives all rows of the embeddings."""

Chosen = Callable[[Tensor], Tensor]
"""Numbers of rows -> bool, which of them are changed."""

Change = Callable[[Tensor], Tensor]
"""Outputs of a module -> other values."""

_NAN: tuple[Change, ...] = (lambda output: torch.full_like(output, torch.nan),)
_OTHERS: tuple[Change, ...] = (lambda output: 1.7 * output + 0.31, lambda output: -0.9 * output - 0.17)


@dataclass(frozen=True, eq=False)
class Rows:
    """Which row of which source each embedding depends on.

    Attributes:
        source: ``(N,)`` number of the source; -1 where no input is known.
        row: ``(N,)`` row of the source.
        in_order: whether embedding i depends on row i of the only source, and all rows of it are embedded.
        apart: whether the steps may be taken with some of the rows alone.
        held: what decides which rows are picked.
    """

    source: Tensor
    row: Tensor
    in_order: bool = False
    apart: bool = False
    held: Held = field(default_factory=dict)


def find_rows(
    steps: Sequence[Step], run: Run, sources: Sources, is_plain: bool, may_mix_from: int | None = None
) -> Rows:
    """Which row of which source each embedding depends on.

    Args:
        steps: all steps of a trace.
        run: takes them.
        sources: what is perturbed.
        is_plain: whether the steps are modules alone, one after the other, from one source.
        may_mix_from: an embedding from here on may depend on several rows. It then counts as unknown. None: none may.

    Raises:
        CaptureError: an embedding depends on several rows.
    """
    sizes = [len(source.value) for source in sources.all]
    total, device = sum(sizes), sources.all[0].value.device
    if is_plain:
        none = torch.empty(0, dtype=torch.long)
        return Rows(none, none, True, True)  # nobody asks for them
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    with torch.no_grad(), paused():
        clean = _Experiment(run, sources, starts, {step: step.chosen for step in steps if step.chosen})
        zero, one = clean.by_bits()
        mixed = (zero & one).any(0)
        if mixed[:may_mix_from].any():
            first = int(mixed.nonzero()[0])
            among = [row for row in range(total) if clean.reached(_OTHERS, partial(torch.eq, other=row))[first]]
            raise _several(steps, first, among, total)
        held = _held(steps, partial(_Experiment, run, sources, starts), (zero, one))
    known = (zero | one).any(0) & ~mixed
    number = (one * (2 ** torch.arange(len(one), device=one.device))[:, None]).sum(0)
    starts = starts.to(number.device)
    source = torch.where(known, (number[:, None] >= starts).sum(1) - 1, -1)
    row = number - starts[source]
    in_order = len(sizes) == 1 and total == len(row) and torch.equal(row, torch.arange(total, device=device))
    in_order = in_order and bool(known.all())
    return Rows(
        source, row, in_order, in_order and not held and _takes_some(partial(_drawing_the_same, run), total), held
    )


class _Experiment:
    """Takes steps with other values in some rows of what is perturbed, and sees which embeddings change.

    Args:
        run: takes them.
        sources: what is perturbed.
        starts: for each source the number of its first row.
        held: what stays of the outputs of steps.
    """

    def __init__(self, run: Run, sources: Sources, starts: Tensor, held: Held) -> None:
        self._run, self._sources, self._starts, self._held = run, sources, starts, held
        self._bits = max(1, (sum(len(source.value) for source in sources.all) - 1).bit_length())
        self._before: dict[Step, Outputs] = {}
        keep = holding(recorded, held)

        def remember(step: Step, resolve: Resolve) -> Outputs:
            self._before[step] = keep(step, resolve)
            return self._before[step]

        self._embeddings = _drawing_the_same(run, remember)

    def reached(self, changes: Sequence[Change], chosen: Chosen) -> Tensor:
        """``(N,)`` bool: embeddings that change with the chosen rows."""
        takes = [partial(_take_changed, self._sources, self._before, self._starts, chosen, c) for c in changes]
        found = [_drawing_the_same(self._run, holding(take, self._held)) for take in takes]
        return torch.stack([_differ(new, self._embeddings) for new in found]).any(0)

    def by_bits(self) -> tuple[Tensor, Tensor]:
        """``(bits, N)`` bool: embeddings that change with the rows in whose number a bit is 0, and where it is 1."""
        zero, one = self._by_bits(_NAN)
        if (zero & one).any() or not (zero | one).any(0).all():  # NaN goes through products with 0, and may be removed
            zero, one = self._by_bits(_OTHERS)
        return zero, one

    def _by_bits(self, changes: Sequence[Change]) -> tuple[Tensor, Tensor]:
        def of(value: int) -> Tensor:
            return torch.stack([self.reached(changes, partial(_has_bit, bit, value)) for bit in range(self._bits)])

        return of(0), of(1)


def _drawing_the_same(run: Run, take: Take) -> Tensor:
    with random_stream(0, 0):  # functions such as dropout draw the same each time
        return run(take)


def _held(
    steps: Sequence[Step], experiment: Callable[[Held], _Experiment], clean: tuple[Tensor, Tensor]
) -> dict[Step, dict[int, Tensor]]:
    """What decides which rows are picked: with other numbers, embeddings come from other rows.

    It is tried for all numbers at once that the same function gave, so that a loop over rows does not cost much.
    """
    of_embeddings = {
        s: s.chosen for s in steps if s.chosen and (s.call or any(r.place not in r.step.chosen for r in s.refs))
    }
    alike: dict[tuple[str, int], list[Step]] = {}
    for step, chosen in of_embeddings.items():
        for place in chosen:
            alike.setdefault((name_of(step), place), []).append(step)
    held: dict[Step, dict[int, Tensor]] = {}
    for (_, place), made in alike.items():
        others = {step: {**step.chosen, place: _other(step.chosen[place])} for step in made}
        stay_equal = all(others[step][place].equal(step.chosen[place]) for step in made)
        if stay_equal or _moves(experiment, {**of_embeddings, **others}, clean):
            for step in made:
                held.setdefault(step, {})[place] = step.chosen[place]
    return held


def _other(chosen: Tensor) -> Tensor:
    """Other values, none of them larger than those that are there, as far as there are others."""
    if chosen.dtype is torch.bool or not chosen.numel():
        return ~chosen
    other = chosen.amin() + chosen.amax() - chosen
    return torch.zeros_like(chosen) if other.equal(chosen) else other


def _moves(experiment: Callable[[Held], _Experiment], others: Held, clean: tuple[Tensor, Tensor]) -> bool:
    """Whether embeddings come from other rows then. Those that come from none then are not moved."""
    try:
        found = experiment(others).by_bits()
    except Exception:  # a function may raise anything with other numbers
        return True
    if found[0].shape != clean[0].shape:
        return True
    mixed = (clean[0] & clean[1]).any(0)
    moved = torch.where(mixed, torch.stack(found) != torch.stack(clean), (clean[0] & found[1]) | (clean[1] & found[0]))
    return bool(moved.any())


def _has_bit(bit: int, value: int, rows: Tensor) -> Tensor:
    return (rows >> bit) & 1 == value


def _take_changed(
    sources: Sources,
    before: Mapping[Step, Outputs],
    starts: Tensor,
    chosen: Chosen,
    change: Change,
    step: Step,
    resolve: Resolve,
) -> Outputs:
    """Takes a step with other values in the chosen rows of what is perturbed."""
    if step.cuts_gradient or not any(map(_may_change, before[step])):
        return before[step]
    if step.call is None:
        return apply(step, resolve)
    outputs = list(step.call.outputs)
    taken = [(resolve(ref), before[ref.step][ref.place]) for ref in step.refs]
    for place, output in enumerate(outputs):
        if (number := sources.of_output(step, place)) is not None:
            rows = starts[number] + torch.arange(len(output))
            outputs[place] = _changed(output, chosen(rows).to(output.device), change)
        elif taken and output.ndim:
            differ = [_differ(new, old) for new, old in taken if new.ndim and len(new) == len(output)]
            outputs[place] = _changed(output, torch.stack(differ).any(0), change) if differ else output
    return outputs


def _differ(new: Tensor, old: Tensor) -> Tensor:
    """``(N,)`` bool: rows that have another value."""
    return ((new != old) & ~(new.isnan() & old.isnan())).unsqueeze(1).flatten(1).any(1)


def _changed(output: Tensor, rows: Tensor, change: Change) -> Tensor:
    if not (_may_change(output) and output.ndim and len(output) == len(rows)):
        return output
    return torch.where(rows.view(-1, *[1] * (output.ndim - 1)), change(output), output)


def _may_change(output: Tensor) -> bool:
    return output.is_floating_point() or output.is_complex()


def _takes_some(run: Run, count: int) -> bool:
    """Whether functions give the same of some rows alone. It is tried with every other row, from the last one."""
    some = torch.arange(count - 1, -1, -2)
    some = torch.cat([some, some[:1]])
    if len(some) == count:
        some = torch.cat([some, some[:1]])

    def alone(step: Step, resolve: Resolve) -> Outputs:
        if step.call is None:
            return apply(step, resolve)
        return [o[some.to(o.device)] if o.ndim else o for o in step.call.outputs]

    with torch.no_grad(), paused():
        try:
            found, expected = run(alone), run(recorded)
        except Exception:  # a function of the caller's may raise anything on other rows
            return False
        expected = expected[some.to(expected.device)]
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


def _several(steps: Sequence[Step], row: int, inputs: list[int], total: int) -> CaptureError:
    functions = list(dict.fromkeys(name_of(step) for step in steps if step.call is None))
    between = f" Between model and loss stand {', '.join(functions)}." if functions else ""
    if len(inputs) == total or len(inputs) > 8:
        return CaptureError(
            f"Embedding {row} depends on {len(inputs)} inputs, since rows of the batch are mixed between model and "
            f"loss; expected that each embedding depends on one input.{between} Let the loss do it: "
            "AdversarialLoss(a module whose forward mixes the rows and then calls the loss, model)."
        )
    return CaptureError(
        f"Embedding {row} depends on several inputs: {', '.join(map(str, inputs))}; expected one.{between} Pass all "
        "inputs of an embedding as one: loss_func(embeddings, labels, inputs=torch.stack([first, second], 1)), with "
        "AdversarialLoss(loss, function), where function(inputs) gives the embeddings."
    )
