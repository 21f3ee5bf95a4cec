"""Embeds other inputs in the way in which the embeddings of a batch were made.

A trace is followed back from the embeddings to the tensors that are perturbed, see `trace` and `sources`. Which row of
which tensor an embedding depends on is found by experiment, see `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from math import prod
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..errors import CaptureError, InputError, ReplayError
from . import generators
from .isolation import depends_on_mode, isolated, own_modules, preserved, random_kept, seed_all
from .nested import mapped, outputs_in, places_in
from .pixels import PixelSpace
from .rerun import (
    Held,
    Outputs,
    Resolve,
    Take,
    apply,
    apply_as_before,
    checkpoints_of,
    holding,
    module_of,
    name_of,
    output_replaced,
    recomputed_in,
    recorded,
    rerun,
    value_of,
)
from .rows import Rows, find_rows
from .side_effects import generators_of, undone
from .sources import INNER, Choice, Sources
from .trace import Fixed, Ref, Step, autocast, steps_to
from .tracing import paused
from .tuples import rank_in_group
from .watch import marks_of, modes_of, submodules_of, switches_of, way_of, way_of_modules, weights_of

ALL = frozenset({"tensor", "list", "inner"})
"""What `Replay.picks` is where all that may have rows has them."""

_APART = 0.05  # rows that are embedded together differ by more; an observer of ranges, for quantisation, by less


class Replay:
    """The way from inputs to embeddings.

    Args:
        results: what together are the embeddings ``(N, D)``, in the order of their rows.
        pixels: how inputs become pixels.
        order: ``(N,)`` the order in which the rows of the results are the embeddings; None: as they are.
        choice: what of the inputs is perturbed.
        chunk: how many rows are embedded at a time; None: all. Of a chunk, nothing but the embeddings is kept for the
            backward pass, in which it is embedded again.
        limit: rows from here on are taken as if their inputs were not known; None: no such rows.
        modules: modules that run inside of functions of the trace.
        may_mix_from: a row from here on may depend on several inputs. They then count as unknown. None: no row may.

    Attributes:
        modules: the modules that were called.
        inputs: ``(P, ...)`` in [0, 1], the inputs of the rows whose inputs are known, in order.
        known_rows: ``(P,)`` these rows; None where they are the first ones.
        picks: which other arguments, with as many rows as the inputs, belong to them row by row.
        sorts: whether rows are embedded in the order of the batch, which packed sequences may want.
        kept_in_mode: modules that keep their mode in the attack, see `keep_modes`.

    Raises:
        CaptureError: there is no way back to inputs, or more than one.
        InputError: the inputs are no pixels.
        ReplayError: the model changed its mode since.
    """

    def __init__(
        self,
        results: Sequence[Ref | Fixed],
        pixels: PixelSpace,
        order: Tensor | None = None,
        choice: Choice = Choice(),  # noqa: B008
        chunk: int | None = None,
        limit: int | None = None,
        modules: Iterable[nn.Module] = (),
        may_mix_from: int | None = None,
    ) -> None:
        self._results, self._pixels, self._order, self._chunk = results, pixels, order, chunk
        self._autocast, self._limit = autocast(), limit
        self._steps = steps_to(results)
        called = [step.function for step in self._steps if isinstance(step.function, nn.Module)]
        self.modules = tuple(dict.fromkeys([*called, *modules]))
        self._inside = [module for module in self.modules if module not in called]
        self._stays_as_now = all(step.autocast == self._autocast for step in self._steps)
        self._exchanged: list[str] = []
        self._check_modes()
        self._find_swapped()
        self._sources = Sources(self._steps, results, choice)
        self._at = choice.at
        self.picks, self.sorts, self._attacks = ALL, False, False
        self.kept_in_mode: list[nn.Module] = []
        self._raised = ""
        self._held: Held = {}
        self._rows: Rows = find_rows(self._steps, self._run, self._sources, self._is_plain, may_mix_from)
        self._held = self._rows.held
        self.inputs, self.known_rows = self._known()

    def embed(self, inputs: Tensor, rows: Tensor | None = None) -> Tensor:
        """Embeds inputs in place of those of some rows.

        Args:
            inputs: ``(K, ...)`` in [0, 1].
            rows: ``(K,)`` the rows whose place they take; None: all with known inputs, in order.

        Returns:
            ``(K, D)``.
        """
        if rows is None or not self.sorts:
            return self._embed_in_order(inputs, rows)
        order = rows.argsort(stable=True)
        return self._embed_in_order(inputs[order], rows[order])[order.argsort()]

    def _embed_in_order(self, inputs: Tensor, rows: Tensor | None) -> Tensor:
        if self._chunk is None or len(inputs) <= self._chunk:
            return self._embed(inputs, rows)
        if rows is None:
            rows = self._all_known(inputs.device)
        parts = zip(inputs.split(self._chunk), rows.split(self._chunk), strict=True)
        if torch.is_grad_enabled():
            own = generators_of(self._submodules)
            return torch.cat([checkpoint(self._embeds_apart(own), *part, use_reentrant=False) for part in parts])
        return torch.cat([self._embed(*part) for part in parts])

    def again(self, seed: int | None = None) -> Tensor:
        """``(N, D)`` the clean inputs, embedded again, as they were the first time as far as that is known.

        Args:
            seed: of random numbers whose state is not known; None: the present state.
        """
        with torch.no_grad(), paused(), preserved(*self.modules, learns=not self.is_told), random_kept():
            if seed is not None:
                self._seed(seed)
            if self._chunk is None or self.takes_rows_beside:  # which rows a chunk takes of these is not known yet
                return self._run(apply_as_before)
            whole = self._run(recorded)
            known = self._all_known(whole.device)
            return whole.index_copy(0, known, self.embed(self.inputs, known).to(whole.dtype))

    def knows_first(self, count: int) -> bool:
        """Whether the inputs of the first rows are known."""
        return self.known_rows is None and len(self.inputs) >= count

    def keep_modes(self, keep: bool = True) -> None:
        """Lets the user's own modules keep their mode, where the model gives other outputs in eval mode."""
        self.kept_in_mode = own_modules(*self.modules) if keep else []

    @property
    def form(self) -> Any:
        """What two replays have in common that embed in the same way. It can be hashed."""
        number = {step: place for place, step in enumerate(self._steps)}

        def kind(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return number[leaf.step], leaf.place
            return (leaf.value.dtype, leaf.value.ndim) if isinstance(leaf, Fixed) else type(leaf)

        steps = [(way_of(step), *map(kind, step.leaves)) for step in self._steps]
        return *steps, *self._with_rows, *(way_of_modules(submodules_of(module)) for module in self._inside)

    @property
    def takes_rows_beside(self) -> bool:
        """Whether modules take other arguments that may have one row for each input."""
        return any(self._with_rows)

    @property
    def is_told(self) -> bool:
        """Whether it is known in which state each step began."""
        return self._chunk is None and all(step.random_state is not None for step in self._steps)

    @property
    def was_switched(self) -> list[str]:
        """What is otherwise now than after the calls of modules, in words."""
        found = {
            f"{name}, of which weights, submodules or hooks were changed or exchanged": None for name in self._exchanged
        }
        for step in self._calls:
            call, inside = step.call, submodules_of(step.function) if isinstance(step.function, nn.Module) else []
            if call is None or not call.modes:
                continue
            now = switches_of(inside)
            for (owner, name), value in call.switches.items():
                other = now.get((owner, name), value)
                if other is not value and other != value:
                    named = owner if isinstance(owner, str) else type(inside[owner]).__name__
                    how = f"was {value!r} and is {other!r}" if repr(value) != repr(other) else "was changed"
                    found[f"{named}.{name}, which {how}"] = None
        return list(found)

    def first_difference(self, tolerance: float) -> str:
        """The first call that gives something else now, in words."""
        found: list[str] = []

        def compare(step: Step, resolve: Resolve) -> Outputs:
            outputs = apply_as_before(step, resolve)
            if step.call is not None:
                calls.append(step)
                apart = max(map(difference, outputs, step.call.outputs), default=0.0)
                if apart > tolerance and not found:
                    found.append(f"{name_of(step)} (call {len(calls)} of {total})")
            return outputs

        calls: list[Step] = []
        total = sum(step.call is not None for step in self._steps)
        with torch.no_grad(), paused(), preserved(*self.modules), random_kept():
            self._run(compare)
        return found[0] if found else "What was done to the outputs"

    def check_beside(self, embeddings: Sequence[Tensor]) -> None:
        """Checks what is held fixed beside what is followed, see `Sources.check_beside`."""
        self._sources.check_beside(self._steps, embeddings)

    def check_rows(self, again: Tensor) -> None:
        """Checks that inputs can be embedded without those of the other rows, in another order, and have a gradient.

        It finds out, too, whether arguments that have as many rows as the inputs belong to them row by row, whether
        rows have to stay in order, and whether the model gives other outputs in eval mode. If so, the user's own
        modules keep their mode in the attack.

        Args:
            again: ``(N, D)`` the clean inputs, embedded again in the model's own mode.

        Raises:
            CaptureError: embeddings have no gradient with respect to the inputs.
            ReplayError: rows are not embedded each on its own, or the model gives other outputs in eval mode.
        """
        expected = self._in_eval_mode(again) if depends_on_mode(*self.modules) else again
        known = self._all_known(self.inputs.device)
        half = torch.arange(len(known) - 1, -1, -2, device=known.device)
        some = known[torch.cat([half, half])[: len(known)]]  # as many rows as the model knows
        with isolated(*self.modules, but=self.kept_in_mode), random_kept(), paused():
            compared = [some] if self._rows.apart else [known, some]
            if "inner" in self._with_rows:  # the size may be that of the batch by chance
                compared.append(known[: (len(known) + 1) // 2])
            ways = self._may_pick
            for self.sorts, self.picks in product((False, True), ways):
                if self.sorts and not self._raised:
                    break
                if all(self._is_same(rows, expected, len(ways) > 1) for rows in compared):
                    return
            if difference(self._whole(seed=1), self._whole(seed=2)) > _APART:
                self.sorts, self.picks = False, ALL  # the model draws random numbers, in eval mode too
                return
        raise ReplayError(
            f"{self._names} embeds some rows of the batch otherwise than all of them, in eval mode too; expected a "
            "model whose inputs have one row for each embedding, and that embeds each row on its own. If rows are not "
            "the first dimension, as in a recurrent model without batch_first, pass the inputs with the rows first: "
            "loss_func(embeddings, labels, inputs=x.transpose(0, 1)), with AdversarialLoss(loss, lambda x: "
            "model(x.transpose(0, 1))). If the model mixes rows, as graphs do, let a module of your own do that part, "
            "whose forward(embeddings, labels) then calls the loss: AdversarialLoss(that module, rest of the model)."
            f"{self._raised}"
        )

    def _in_eval_mode(self, again: Tensor) -> Tensor:
        """``(N, D)`` the clean inputs as the attack sees them, with the user's own modules in their mode if need be.

        Many models return a score beside the embedding in train mode alone, so the outputs stand elsewhere.
        """
        found: list[str] = []
        for keep in (False, True):
            self.keep_modes(keep)
            with isolated(*self.modules, but=self.kept_in_mode), random_kept(), paused():
                try:
                    whole = self._whole(seed=0, read=_outputs_as_before)
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception as error:  # a model, or what the loop does with its outputs, may raise anything
                    found.append(str(error))
                    continue
            if whole.shape == again.shape:
                return whole
            found.append(f"the embeddings are {tuple(whole.shape)}, not {tuple(again.shape)}")
        raise ReplayError(
            f"{self._names} does not give in eval mode what it gives in the loop: {found[0]}. The attack sees the "
            "model in eval mode; expected outputs that stand in the same places in both modes. Return the same from "
            "forward() in both, or let the loop call the part of the model that gives the embeddings."
        )

    def _whole(self, seed: int, read: Callable[[Step, Any], Outputs] = lambda _, given: outputs_in(given)) -> Tensor:
        """``(N, D)`` the clean inputs, embedded again in the present mode."""
        with torch.no_grad(), preserved(*self.modules):  # some learn ranges from what they see, in eval mode too
            self._seed(seed)
            return self._run(lambda step, resolve: apply(step, resolve, read=partial(read, step)))

    def _seed(self, seed: int) -> None:
        """Seeds the global random number generators, and those that modules hold."""
        seed_all(seed)
        for generator in generators_of(self._submodules):
            generators.seed(generator, seed)

    def _is_same(self, rows: Tensor, expected: Tensor, may_fail: bool) -> bool:
        """Whether some rows are embedded as among all."""
        places = rows if self.known_rows is None else torch.searchsorted(self.known_rows, rows)
        inputs = self.inputs[places].clone().requires_grad_()
        with preserved(*self.modules), torch.enable_grad():
            try:
                found = self.embed(inputs, rows)
            except CaptureError:
                raise
            except Exception as error:  # a model may raise anything where arguments do not fit together
                if may_fail:
                    self._raised = f" With some rows it raised: {error}"
                    return False
                raise
            if not found.requires_grad or self._gradient(found, inputs) is None:
                raise self._no_gradient
        return difference(found, expected[rows]) <= _APART

    def _gradient(self, found: Tensor, inputs: Tensor) -> Tensor | None:
        try:
            return torch.autograd.grad(found.sum(), inputs, allow_unused=True)[0]
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a hook on a tensor may raise, as those of Lightning Fabric do
            raise CaptureError(
                f"A backward pass through {self._names}, other than that of the loop, raises: {error} The attack needs "
                "such passes. If this is a wrapper, such as Fabric's, pass the inputs, loss_func(embeddings, labels, "
                "inputs=x), with AdversarialLoss(loss, function), where function(x) runs the model inside of the "
                "wrapper in the same precision."
            ) from error

    @property
    def _no_gradient(self) -> CaptureError:
        return CaptureError(
            f"{self._names} has no gradient with respect to its inputs: inside of it or in the loop, something is "
            "computed under no_grad, detached, or rounded. To freeze a part of the model, set requires_grad_(False) "
            "on its parameters in place of no_grad and detach. To perturb what the frozen part gives, name it: "
            "AdversarialLoss(loss, model, at=model.frozen, bounds=(low, high)). To a miner, pass the embeddings "
            "without detach; it mines without gradient."
        )

    @property
    def _may_pick(self) -> list[frozenset[str]]:
        """Ways to pick rows of what modules took beside the sources: of all first, of nothing last."""
        found = frozenset(self._with_rows) - {""}
        fewer = [found - {"inner"}, found & {"tensor"}, frozenset[str]()] if found else []
        return [ALL, *dict.fromkeys(some for some in fewer if some != found)]

    @cached_property
    def _with_rows(self) -> tuple[str, ...]:
        """Of all arguments beside the sources, in order: how they may have one row for each input."""
        sources = {id(source.value): len(source.value) for source in self._sources.all}
        counts, found = set(sources.values()), list[str]()

        def look(value: Any) -> Any:
            is_source = isinstance(value, Fixed) and id(value.value) in sources
            found.append("" if is_source else _kind_of_rows(value, counts))
            return value

        for step in self._calls:
            for argument in (*step.args, *step.kwargs.values()):
                if isinstance(argument, Ref | Fixed):
                    look(argument)
                else:
                    mapped(argument, look, look)
        return tuple(found)

    @property
    def _submodules(self) -> list[nn.Module]:
        return [inner for outer in self.modules for inner in outer.modules()]

    @property
    def _names(self) -> str:
        return ", ".join(dict.fromkeys(map(name_of, self._calls)))

    @property
    def _calls(self) -> list[Step]:
        return [step for step in self._steps if step.call is not None]

    def _check_modes(self) -> None:
        for step in self._calls:
            modes = step.call.modes  # type: ignore[union-attr]
            if modes and modes != modes_of(submodules_of(step.function)):
                raise ReplayError(
                    f"{name_of(step)} changed its mode (train or eval) between the forward pass and the loss, so its "
                    "embeddings would be others now. Compute the loss before you call .eval() or .train()."
                )
        if self._chunk is not None:
            for module in self._submodules:
                if isinstance(module, _BatchNorm) and module.training:
                    raise InputError(
                        f"chunk={self._chunk}, and {type(module).__name__} is in train mode, so that it would take its "
                        "statistics from each chunk; expected statistics that stay. Freeze it: set it to eval mode "
                        "after model.train()."
                    )

    def _find_swapped(self) -> None:
        for step in self._calls:
            weights = step.call.weights if step.call is not None else None
            if step.call is None or weights is None:
                continue
            now = weights_of(submodules_of(step.function))
            step.call.find_swapped(module_of(step.function), now)
            kept = now.modules == weights.modules and now.hooks == weights.hooks
            if not kept or marks_of(weights.parameters) != weights.marks:
                self._exchanged.append(name_of(step))

    @property
    def _is_plain(self) -> bool:
        """Whether the embeddings are the output of modules alone, one after the other."""
        if len(self._sources) > 1 or len(self._results) > 1 or self._order is not None or self._limit is not None:
            return False
        total = len(self._sources.all[0].value)
        return all(
            step.call is not None and len(step.refs) <= 1 and all(len(o) == total for o in step.call.outputs if o.ndim)
            for step in self._steps
        )

    def _all_known(self, device: torch.device) -> Tensor:
        return torch.arange(len(self.inputs), device=device) if self.known_rows is None else self.known_rows

    # How the steps are taken again

    def _apply(self, step: Step, resolve: Resolve, some: Resolve | None = None) -> Outputs:
        """Takes a step under the autocast of the loop, or of the attack, where that has set another one."""
        outputs = apply(step, resolve, self._stays_as_now or autocast() != self._autocast, some)
        if step.hooks and not self._attacks:
            _hook(step, outputs)
        return outputs

    def _run(self, take: Take) -> Tensor:
        results = rerun(self._steps, self._results, holding(take, self._held) if self._held else take)
        whole = results[0] if len(results) == 1 else torch.cat(results)
        return whole if self._order is None else whole[self._order]

    def _embed(self, inputs: Tensor, rows: Tensor | None) -> Tensor:
        self._attacks = inputs.requires_grad
        modules = self._submodules if torch.is_grad_enabled() else []
        with paused(), checkpoints_of(modules, inputs.requires_grad) if modules else nullcontext():
            if self._rows.apart:
                given = self._pixels.to_inputs(inputs, self._sources.all[0].value.dtype)
                found = self._run(partial(self._take_some, given, rows))
            else:
                found = self._embed_among_clean(inputs, self._all_known(inputs.device) if rows is None else rows)
        if self._attacks and len(found) and torch.is_grad_enabled() and not found.requires_grad:
            raise self._no_gradient
        return found

    def _embeds_apart(self, own: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """Embeds one chunk; the second time, in the backward pass of the caller, with the same random numbers."""
        began: list[Any] = []

        def embed(inputs: Tensor, rows: Tensor) -> Tensor:
            with undone(self._submodules), generators.begun_at(own, began) if began else nullcontext():
                began.extend(map(generators.state_of, own))
                return self._embed(inputs, rows)

        return embed

    def _take_some(self, inputs: Tensor, rows: Tensor | None, step: Step, resolve: Resolve) -> Outputs:
        """Takes a step with some rows of the only source alone."""
        return self._apply(step, resolve) if step.call is None else self._apply_to(step, resolve, 0, inputs, rows)

    def _embed_among_clean(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Takes the steps at full size: a turn for the first copy of each input, one for the second, and so on."""
        source, row = self._rows.source[rows], self._rows.row[rows]
        turn = rank_in_group(source * max(len(source.value) for source in self._sources.all) + row)
        if not len(rows):
            return self._run(recorded)[:0]
        given = self._given(inputs, source, row)
        found, order = list[Tensor](), turn.argsort(stable=True)
        for count in turn.bincount().tolist():
            mine = order[sum(map(len, found)) :][:count]
            found.append(self._run(partial(self._take_among_clean, given, mine))[rows[mine]])
        return torch.cat(found)[order.argsort()]

    def _given(self, inputs: Tensor, source: Tensor, row: Tensor) -> list[_Given]:
        """What modules give for inputs, of each source apart."""
        found = []
        for number, held in enumerate(self._sources.all):
            mine = (source == number).nonzero().flatten()
            value = held.value
            own = self._pixels.to_inputs(_unpadded(inputs[mine], value), value.dtype) if len(mine) else inputs[:0]
            outputs = {}
            for step, argument in held.places if len(mine) else ():
                outputs[step, argument] = self._apply_to(step, value_of, number, own, row[mine])
            found.append(_Given(mine, row[mine], own, outputs))
        return found

    def _take_among_clean(self, given: Sequence[_Given], mine: Tensor, step: Step, resolve: Resolve) -> Outputs:
        """Takes a step at full size; of a source, the outputs of these rows stand among the clean ones."""
        if step.call is None or step.refs:

            def changed(leaf: Any) -> Any:
                number = self._sources.holding(leaf)
                if number is None:
                    return resolve(leaf)
                found = given[number]
                return found.among(leaf.value, _with_graph_of(leaf.value, found.inputs, found.row), mine)

            return self._apply(step, changed)
        outputs = list(step.call.outputs)
        for place, output in enumerate(outputs):
            number, argument = self._sources.of_output(step, place), self._sources.argument_of_output(step, place)
            if number is not None and argument is not None and (step, argument) in given[number].outputs:
                outputs[place] = given[number].among(output, given[number].outputs[step, argument][place], mine)
        return outputs

    def _apply_to(self, step: Step, resolve: Resolve, number: int, inputs: Tensor, rows: Tensor | None) -> Outputs:
        """Applies a module to other inputs; of arguments with one row for each input, to the rows that belong to it."""
        source = self._sources.all[number].value
        count = len(source)

        def some(value: Any) -> Any:
            """Of an argument with one row for each input, the rows that belong to the inputs."""
            if rows is None or _kind_of_rows(value, {count}) not in self.picks:
                return value
            if isinstance(value, list | tuple | range):
                kind = tuple if isinstance(value, tuple) else list
                return kind([value[row] for row in rows.tolist()])
            if isinstance(value, Fixed):
                chosen = rows.to(value.value.device)  # lengths stay on the CPU
                return Fixed(value.value.index_select(value.value.shape.index(count), chosen))
            return value[rows.cpu().numpy()]

        def changed(leaf: Any) -> Any:
            if isinstance(leaf, Fixed) and leaf.value is source:
                return _with_graph_of(source, inputs, rows)
            return resolve(some(leaf))

        if self._sources.at(step, INNER) != number:
            return self._apply(step, changed, some)
        replaced = partial(output_replaced, self._at, inputs)  # type: ignore[arg-type]
        with replaced(), recomputed_in(lambda: replaced):
            return self._apply(step, changed, some)

    def _known(self) -> tuple[Tensor, Tensor | None]:
        pixels = [
            self._pixels.to_pixels(_without_graph(source.value), _fine(source.value.dtype))
            for source in self._sources.all
        ]
        if self._rows.in_order and self._limit is None:
            return pixels[0], None
        starts = torch.tensor([0, *map(len, pixels)]).cumsum(0).to(self._rows.row)
        pixels = [found for found in pixels if len(found)] or pixels[:1]
        if len({found.shape[1:] for found in pixels}) > 1:
            width = max(prod(found.shape[1:]) for found in pixels)
            flat = [found.reshape(len(found), prod(found.shape[1:])) for found in pixels]
            pixels = [pad(found, (0, width - found.shape[1])) for found in flat]
        source, row = self._rows.source, self._rows.row
        known = (source[: self._limit] >= 0).nonzero().flatten()
        if not len(known):
            if any(o.is_floating_point() and not o.isfinite().all() for s in self._calls for o in s.call.outputs):  # type: ignore[union-attr]
                raise InputError(
                    f"{self._names} gave NaN or infinite values, so it cannot be found out which inputs the embeddings "
                    "come from; expected finite weights and inputs. A lower learning rate may help."
                )
            raise self._no_gradient
        inputs = torch.cat(pixels)[starts[source[known]] + row[known]]
        first = torch.equal(known, torch.arange(len(known), device=known.device))
        return inputs, None if first else known


@dataclass(frozen=True, eq=False)
class _Given:
    """What modules gave for the inputs of one source.

    Attributes:
        places: ``(K,)`` which of all inputs these are.
        row: ``(K,)`` the rows of the source in whose place they stand.
        inputs: ``(K, ...)`` as the modules take them.
        outputs: (step, argument) -> outputs.
    """

    places: Tensor
    row: Tensor
    inputs: Tensor
    outputs: Mapping[tuple[Step, int], Outputs]

    def among(self, clean: Tensor, values: Tensor, some: Tensor) -> Tensor:
        """Clean values ``(n, ...)`` with ``values`` ``(K, ...)`` in their places, of those inputs that are ``some``."""
        now = torch.isin(self.places, some)
        return clean.index_copy(0, self.row[now], values[now].to(clean.dtype))


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value. Values that are not finite are left out."""
    one, other = one.detach(), other.detach()
    finite = other.isfinite()
    apart = (one.to(other.dtype) - other)[finite].abs() if one.shape == other.shape else torch.full((1,), torch.inf)
    if not len(apart):
        return 0.0
    size = other[finite].abs().max().clamp(min=torch.finfo(other.dtype).tiny) if finite.any() else 1.0
    return float(apart.max().nan_to_num(torch.inf) / size)


def tolerance(embeddings: Tensor) -> float:
    """By which `difference` rounding makes the same embeddings differ, as a share of their size."""
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        return 0.05
    coarse = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32  # ten bits of a product
    return 0.01 if embeddings.is_cuda and coarse else 1e-3


def _outputs_as_before(step: Step, given: Any) -> Outputs:
    """The outputs of a module, where they stand in what it returned as they did in the loop."""
    places, before = places_in(given), None if step.call is None else step.call.places
    if before is not None and places != before:
        now, then = (", ".join(map(_place, some)) or "none" for some in (places, before))
        raise ValueError(f"{name_of(step)} gives its tensors as {now}, and not as {then}")
    return outputs_in(given)


def _place(place: tuple[Any, ...]) -> str:
    return "output" + "".join(f"[{key!r}]" for key in place)


def _hook(step: Step, outputs: Outputs) -> None:
    """Registers the hooks that the user registered on what a step gave, and did not remove."""
    for place, handle in step.hooks:
        hook = (handle.hooks_dict_ref() or {}).get(handle.id)
        if hook is not None and outputs[place].requires_grad:
            outputs[place].register_hook(hook)


def _fine(dtype: torch.dtype) -> torch.dtype:
    """The type in which inputs are attacked. A coarser one could not hold what an attack adds to them."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize else dtype


def _with_graph_of(source: Tensor, inputs: Tensor, rows: Tensor | None) -> Tensor:
    """Inputs ``(K, ...)`` that are rows of the source, changed by constants: what made the source learns from them."""
    if not source.requires_grad or not torch.is_grad_enabled() or inputs.requires_grad:
        return inputs
    of_rows = source if rows is None else source.index_select(0, rows)
    return inputs + (of_rows - of_rows.detach())


def _without_graph(value: Tensor) -> Tensor:
    return value.detach() if value.requires_grad else value


def _kind_of_rows(value: Any, counts: Container[int]) -> str:
    """Of an argument that came from outside and has as many rows as inputs: "tensor" or "list"; "" of others.

    "inner" are tensors in which rows are another dimension than the first, as in the states of recurrent modules.
    """
    if isinstance(value, Fixed):
        having = [d for d, size in enumerate(value.value.shape) if size in counts]
        if isinstance(value.value, nn.Parameter) or not having:
            return ""
        return "tensor" if having[0] == 0 else "inner" if len(having) == 1 else ""
    has_rows = type(value) in (list, tuple, range) or (isinstance(value, numpy.ndarray) and value.ndim)
    return "list" if has_rows and len(value) in counts else ""


def _unpadded(inputs: Tensor, like: Tensor) -> Tensor:
    """Inputs of one of several shapes, from rows that are padded to the longest."""
    if inputs.shape[1:] == like.shape[1:]:
        return inputs
    return inputs[:, : prod(like.shape[1:])].reshape(-1, *like.shape[1:])
