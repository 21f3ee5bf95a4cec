"""Finds the way from inputs to the embeddings of each batch, and checks now and then that it is the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CaptureError, InputError, ReplayError
from .graph import call_inside, own_function
from .isolation import check_compiled
from .modules import modules_run_by
from .pixels import PixelSpace
from .replay import ALL, Replay, difference, tolerance
from .sources import Choice
from .trace import Call, Fixed, Ref
from .tracing import Traced, lost_of, ref_of, step_of
from .watch import Watch

Models = nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module] | Callable[..., Any]
"""A module, several modules, the ``models`` of a PML trainer, or a function of inputs."""

logger = logging.getLogger("pml_adversarial")

CHECK_EVERY = 100
"""Steps from one check of the replay to the next."""

_OPEN_DOOR = "pass the inputs yourself, loss_func(embeddings, labels, inputs=x), with AdversarialLoss(loss, model)."


@dataclass
class _Known:
    """What was found out about a form of the loop, see `Replay`.

    Attributes:
        picks: that of the replay.
        sorts: likewise.
        keeps_modes: whether modules keep their mode in the attack.
        steps: how many there were.
    """

    picks: frozenset[str] = ALL
    sorts: bool = False
    keeps_modes: bool = False
    steps: int = 0


class InputCapture:
    """Watches modules, and finds how embeddings were made of their inputs.

    Args:
        model: what makes embeddings of inputs; None: any module.
        choice: what of the inputs is perturbed.
        chunk: how many rows are embedded at a time; None: all.
    """

    def __init__(self, model: Models | None = None, choice: Choice = Choice(), chunk: int | None = None) -> None:  # noqa: B008
        self.choice, self.chunk = choice, chunk
        self._count, self._forms = 0, dict[Any, _Known]()
        self._start(model)

    def watch(self, model: Models) -> None:
        """Watches ``model`` from now on, and no longer what was watched before."""
        self._start(model)

    def replay(
        self,
        pixels: PixelSpace,
        embeddings: Tensor,
        reference: Tensor | None = None,
        order: Tensor | None = None,
        inputs: Tensor | None = None,
        limit: int | None = None,
    ) -> Replay:
        """The way from inputs to embeddings, and to those of a reference after them, in another order if one is given.

        In the first step, whenever the form of the loop changes, and each `CHECK_EVERY` steps it is checked that it
        leads to the embeddings that were given, and that each row can be embedded without the others. Training may
        change this: a part that mixes rows may begin with weights of 0. What a model makes of rows may depend on the
        values of other arguments that have rows, such as lengths. So if there are any, this is checked again, also in
        the 2nd, 4th, 8th ... step of a form.

        Args:
            pixels: how inputs become pixels.
            embeddings: ``(N, D)``.
            reference: ``(R, D)``, or None.
            order: ``(N + R,)``, or None.
            inputs: ``(N, ...)`` the inputs, where the caller passed them; None: they are found.
            limit: rows from here on are taken as if their inputs were not known; None: no such rows.

        Raises:
            CaptureError: it is not known.
            InputError: the inputs are no pixels.
            ReplayError: another way leads to the embeddings that were given.
        """
        found = self._found(embeddings) if inputs is None else self._told(embeddings, inputs)
        results: list[Ref | Fixed] = [found]
        if reference is not None:
            made_by = ref_of(reference) if reference.requires_grad else None
            results.append(made_by or Fixed(reference.detach()))
        inside = () if inputs is None else self._modules_inside(inputs)
        may_mix_from = None if reference is None else len(embeddings)
        replay = Replay(results, pixels, order, self.choice, self.chunk, limit, inside, may_mix_from)
        if not any(map(self._watch.knows, replay.modules)) and inputs is None:
            raise CaptureError(self._another(replay.modules))
        check_compiled(replay.modules)
        self._check(replay, embeddings, reference, order, told=inputs is not None)
        self._watch.forget()
        return replay

    def __reduce__(self) -> tuple[Any, ...]:
        return InputCapture, (None, self.choice, self.chunk)  # a copy holds no model: it watches any

    def _start(self, model: Models | None) -> None:
        model = tuple(model) if isinstance(model, Iterator) else model
        self._function = None if model is None else in_order(model)
        self._inside: tuple[nn.Module, ...] | None = None
        known = None if model is None or not _has_modules(model) else modules_of(model)
        check_compiled(known or ())
        self._watch = Watch(known, self.choice.at)
        self._watch.wants_state = True
        self._forms.clear()

    def _told(self, embeddings: Tensor, inputs: Tensor) -> Ref:
        if self._function is None:
            raise CaptureError(
                "inputs=... was given, and it is not known what makes embeddings of them; expected a model, or any "
                "function of inputs: AdversarialLoss(loss, model)."
            )
        if not isinstance(inputs, Tensor) or inputs.shape[:1] != embeddings.shape[:1]:
            found = f"of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
            raise InputError(
                f"inputs is {found}; expected a tensor of one row for each of {len(embeddings)} embeddings."
            )
        step = step_of(self._function, (inputs.detach(),), {})
        step.call = Call([embeddings])
        return Ref(step, 0)

    def _modules_inside(self, inputs: Tensor) -> tuple[nn.Module, ...]:
        """The modules that a function of inputs runs. They are found out once."""
        if self._inside is None:
            self._inside = () if isinstance(self._function, nn.Module) else modules_run_by(self._function, inputs)
        return self._inside

    def _found(self, embeddings: Tensor) -> Ref:
        found = ref_of(embeddings)
        if found is None or (embeddings.requires_grad and embeddings.grad_fn is None):
            raise CaptureError(self._explain(embeddings))
        return found

    def _check(
        self, replay: Replay, embeddings: Tensor, reference: Tensor | None, order: Tensor | None, told: bool
    ) -> None:
        """Embeds the clean inputs again, and compares, where it is time to do so.

        A model that draws random numbers can only be compared from the state in which it began. Where that is not
        known, the next step remembers it.
        """
        self._count += 1
        switched, form, beside = replay.was_switched, replay.form, replay.takes_rows_beside
        known = self._forms.get(form, _Known())
        known.steps += 1
        replay.picks, replay.sorts = known.picks, known.sorts
        if known.keeps_modes:
            replay.keep_modes()
        if form not in self._forms or switched or _is_due(self._count, known.steps, beside):
            if form not in self._forms:
                replay.check_beside([embeddings] if reference is None else [embeddings, reference])
            given = embeddings.detach() if reference is None else torch.cat([embeddings, reference]).detach()
            given = given if order is None else given[order]
            again = replay.again(seed=0)
            limit = tolerance(given)
            apart = difference(again, given)
            if apart > limit and (replay.is_told or difference(replay.again(seed=1), again) <= limit):
                raise ReplayError(_what_differs(replay, apart, limit, switched, told))
            replay.check_rows(again)
            if apart > limit and told:
                logger.warning(
                    "The model draws random numbers, so it cannot be checked whether inputs=... are those of the "
                    "embeddings, in their order."
                )
            if apart <= limit or told:
                known.picks, known.sorts, known.keeps_modes = replay.picks, replay.sorts, bool(replay.kept_in_mode)
                self._forms[form] = known
        self._watch.wants_state = form not in self._forms or _is_due(self._count + 1, known.steps + 1, beside)

    def _another(self, names: Iterable[nn.Module] | str) -> str:
        if not isinstance(names, str):
            names = ", ".join(type(module).__name__ for module in names)
        return (
            f"{names} gave these embeddings, and the model that was named did not. Name the module that the loop "
            f"calls, AdversarialLoss(loss, model), or none; or {_OPEN_DOOR}"
        )

    def _explain(self, embeddings: Tensor) -> str:
        """What was seen of these embeddings, and what to do."""
        seen = {how: ", ".join(sorted(names)) for how, names in self._watch.seen.items()}
        if not embeddings.requires_grad:
            return (
                "The embeddings were computed without gradient (under no_grad, or detached), so it is not known which "
                "inputs gave them. Compute them with gradient; or call .eval() on the wrapper, which then attacks "
                f"nothing; or {_OPEN_DOOR}"
            )
        if embeddings.grad_fn is None:
            return (
                "The embeddings are a tensor of their own (a leaf of autograd's graph), so it is not known which "
                "inputs gave them. Pass what the model returned, without detach. If you hand gradients on yourself, as "
                "GradCache does, pass the inputs, loss_func(embeddings, labels, inputs=x), with AdversarialLoss(loss, "
                "function), where function(x) makes the embeddings, such as `lambda x: model({'images': x})`, and set "
                "gradients to zero before loss.backward(), not after it, since the perturbed rows reach the model "
                "there."
            )
        if lost := lost_of(embeddings):
            return (
                f"{lost} ran under no_grad, so its inputs are not kept. To freeze it, set requires_grad_(False) on its "
                "parameters in place of no_grad. If an activation checkpoint ran it so, use use_reentrant=False; or "
                f"{_OPEN_DOOR}"
            )
        if function := own_function(embeddings):
            return (
                f"Between the model and the loss the embeddings went through {function}, a function of autograd in "
                f"Python, and it is not known what it does. {call_inside(function)} Or {_OPEN_DOOR}"
            )
        if type(embeddings) not in (Tensor, Traced):
            return (
                f"The embeddings are a {type(embeddings).__name__}, a tensor of a class of its own, which cannot be "
                f"followed. Give the model plain tensors, model(x.as_subclass(torch.Tensor)); or {_OPEN_DOOR}"
            )
        if "origin" in vars(embeddings):
            return (
                "The embeddings were changed in place, through a view of them or under no_grad, so what was done to "
                f"them is not known. Use an operation that makes a new tensor; or {_OPEN_DOOR}"
            )
        if seen["with gradient"]:
            return (
                f"{seen['with gradient']} ran with gradient since this loss was made, and these embeddings were not "
                "made of what it returned, or in a way that cannot be followed: inside of it, where a hook or an "
                "attribute kept them, or through a PackedSequence, TorchScript or torch.func.vmap. If they are older "
                "than the loss, make the loss before the forward pass; if they were made of something else, pass what "
                f"the model returned; or {_OPEN_DOOR}"
            )
        if seen["not watched"]:
            return self._another(seen["not watched"])
        ran = f"{seen['without gradient']} ran under no_grad, and no" if seen["without gradient"] else "No"
        return (
            f"{ran} module ran with gradient since this loss was made, as far as can be seen. Make the loss before the "
            "forward pass. If the model is compiled by model.compile(), name it, AdversarialLoss(loss, model), after "
            "it was compiled. If torch.compile compiles the whole step, let it compile the model alone. Where none "
            f"helps, {_OPEN_DOOR}"
        )


def _is_due(step: int, of_form: int, takes_rows_beside: bool) -> bool:
    """Whether a form that is known is checked in this step, the ``of_form``-th of the form."""
    return step % CHECK_EVERY == 0 or (takes_rows_beside and of_form.bit_count() == 1)


def _what_differs(replay: Replay, apart: float, limit: float, switched: list[str], told: bool) -> str:
    start = f"The clean inputs, embedded again, differ from the embeddings by {apart:.2g} of their size, so an attack "
    if told:
        return (
            f"{start}would be on other embeddings. With inputs=..., expected inputs in the order of the embeddings, "
            "and a model that makes exactly these embeddings of them, in the mode that it is in. If the loop does more "
            "than the model, such as F.normalize, give a function that does it too: "
            "AdversarialLoss(loss, lambda x: F.normalize(model(x)))."
        )
    where = f"{start}would be on another model. {replay.first_difference(limit)} gives something else now."
    last = (
        "Where none can be mended, pass the inputs yourself, loss_func(embeddings, labels, inputs=x), with "
        "AdversarialLoss(loss, function), where function(x) makes exactly these embeddings."
    )
    if switched:
        return (
            f"{where} Likely cause: {'; '.join(switched)}. Pass what switches the model as an argument of its "
            f"forward(), or compute the loss before the switch. {last}"
        )
    return (
        f"{where} Likely causes: weights or buffers were changed since the forward pass (compute the loss first); the "
        "model changes its input in place (let it work on a copy); what it gives depends on something outside of its "
        f"arguments, such as an attribute, a counter or a global switch (pass it as an argument of forward()). {last}"
    )


def _has_modules(model: Models) -> bool:
    return isinstance(model, nn.Module | Mapping) or not callable(model)


def modules_of(model: Any) -> tuple[nn.Module, ...]:
    """The modules of ``model`` in forward order.

    Raises:
        CaptureError: it is no module, sequence of modules, or dict with a "trunk".
    """
    if isinstance(model, nn.Module) and not holds_alone(model):
        return (model,)
    if isinstance(model, Mapping | nn.ModuleDict):
        named = cast(Mapping[str, nn.Module], model)
        if "trunk" not in named:
            raise CaptureError(
                f"model is a dict with the keys {sorted(named)}; expected a trainer's models with a 'trunk' and, "
                "if there is one, an 'embedder'. Pass the modules in forward order instead."
            )
        return tuple(named[name] for name in ("trunk", "embedder") if name in named)
    modules = tuple(model) if isinstance(model, Iterable) else (model,)
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise CaptureError(
            f"model is {type(model).__name__} of {[type(m).__name__ for m in modules]}; expected a torch.nn.Module, "
            "modules in forward order, or the models dict of a PML trainer."
        )
    return modules


def holds_alone(module: nn.Module) -> bool:
    """Whether a module is a list or a dict of modules, and cannot be called."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward


def in_order(model: Models) -> Callable[..., Any]:
    """One callable of a model or of modules in forward order."""
    if not _has_modules(model):
        return partial(cast(Callable[..., Any], model))  # an object of ours, which can be hashed
    modules = modules_of(model)
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
