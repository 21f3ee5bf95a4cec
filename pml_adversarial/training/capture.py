"""Finds the way from inputs to the embeddings of each batch, and checks now and then that it is the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from .pixels import PixelSpace
from .replay import Replay
from .tracing import Call, Fixed, Ref, Step, Watch, ref_of

Models = nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module] | Callable[..., Any]
"""A module, several modules, the ``models`` of a PML trainer, or a function of inputs."""

CHECK_EVERY = 100
_OPEN_DOOR = "pass the inputs yourself, loss_func(embeddings, labels, inputs=images), with AdversarialLoss(loss, model)."


class InputCapture:
    """Watches modules, and finds how embeddings were made of their inputs.

    Args:
        model: what makes embeddings of inputs; None: any module.
        perturb_input: name of the argument of the model that is perturbed; None: the one of floating point.
    """

    def __init__(self, model: Models | None = None, perturb_input: str | None = None) -> None:
        self.perturb_input = perturb_input
        self._count, self._forms = 0, set[Any]()
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
    ) -> Replay:
        """The way from inputs to embeddings, and to those of a reference after them, in another order if one is given.

        Raises:
            CaptureError: it is not known.
            ReplayError: another way leads to the embeddings that were given.
        """
        if inputs is not None:
            results: list[Ref | Fixed] = [self._told(embeddings, inputs)]
        else:
            results = [self._found(embeddings)]
        if reference is not None:
            results.append(ref_of(reference) or Fixed(reference.detach()))
        replay = Replay(results, pixels, order, self.perturb_input)
        self._check(replay)
        return replay

    def __reduce__(self) -> tuple[Any, ...]:
        return InputCapture, (None, self.perturb_input)  # a copy or pickle holds no model: it watches any module

    def _start(self, model: Models | None) -> None:
        self._function = model
        known = None if model is None or not _has_modules(model) else modules_of(model)
        self._watch = Watch(known)
        self._watch.wants_random_state = True
        self._forms.clear()

    def _told(self, embeddings: Tensor, inputs: Tensor) -> Ref:
        if self._function is None:
            raise CaptureError("inputs=... was given, and no model; expected AdversarialLoss(loss, model).")
        function = in_order(self._function)
        step = Step(function, (inputs,), {})
        step.call = Call([embeddings])
        return Ref(step, 0)

    def _found(self, embeddings: Tensor) -> Ref:
        found = ref_of(embeddings)
        if found is None:
            raise CaptureError(self._explain(embeddings))
        return found

    def _check(self, replay: Replay) -> None:
        self._count += 1
        due = replay.form not in self._forms or self._count % CHECK_EVERY == 0
        if due and replay.check():
            self._forms.add(replay.form)
        self._watch.wants_random_state = replay.form not in self._forms or (self._count + 1) % CHECK_EVERY == 0

    def _explain(self, embeddings: Tensor) -> str:
        """What was seen of these embeddings, and what to do."""
        seen = {how: ", ".join(sorted(names)) for how, names in self._watch.seen.items()}
        if embeddings.grad_fn is None:
            return (
                "The embeddings are a tensor of their own (a leaf of autograd's graph), so it is not known which inputs gave them. If they "
                f"were computed without gradient first, as for large batches, {_OPEN_DOOR}"
            )
        if "made_by" in vars(embeddings):
            return (
                "The embeddings were changed in place, in a way that is not seen (through a view of them, or under no_grad). Use an operation "
                f"that makes a new tensor; or {_OPEN_DOOR}"
            )
        if function := _own_function(embeddings):
            return (
                f"Between the model and the loss the embeddings went through {function}, a function of autograd of your own, and it is not known what it does. "
                f"Call it inside of a module; or {_OPEN_DOOR}"
            )
        if seen["with gradient"]:
            return (
                f"{seen['with gradient']} ran with gradient, and these embeddings were not made of what it returned. Pass embeddings of this forward pass; or {_OPEN_DOOR}"
            )
        if seen["not watched"]:
            return (
                f"{seen['not watched']} ran, and the model that was named did not. Name the module that the loop calls, AdversarialLoss(loss, model); or {_OPEN_DOOR}"
            )
        if seen["without gradient"]:
            return f"{seen['without gradient']} ran without gradient (no_grad), so its inputs are not known. To freeze it, set requires_grad_(False) on its parameters in place of no_grad; or {_OPEN_DOOR}"
        return (
            "No module ran with gradient since this loss was made. Make the loss before the forward pass; or "
            f"{_OPEN_DOOR}"
        )


def _own_function(embeddings: Tensor) -> str | None:
    """The name of an autograd function in Python that led to the embeddings, before any other that it hides."""
    todo, seen = [embeddings.grad_fn], set[Any]()
    while todo:
        node: Any = todo.pop(0)
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return type(node).__name__.removesuffix("Backward")
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return None


def _has_modules(model: Models) -> bool:
    return isinstance(model, nn.Module | Mapping) or not callable(model)


def modules_of(model: Any) -> tuple[nn.Module, ...]:
    """The modules of ``model`` in forward order.

    Raises:
        CaptureError: it is no module, sequence of modules, or dict with a "trunk".
    """
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList | nn.ModuleDict):
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


def in_order(model: Models) -> Callable[..., Any]:
    """One callable of a model or of modules in forward order."""
    if not _has_modules(model):
        return cast(Callable[..., Any], model)
    modules = modules_of(model)
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
