"""Finds the inputs that gave embeddings and the modules that they passed, and embeds other inputs in the same way."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import CaptureError

# Older releases of torch do not pass the keyword arguments of a call to global hooks.
_WITH_KWARGS: Any = {"with_kwargs": True} if "with_kwargs" in signature(register_module_forward_hook).parameters else {}
# Here torch notes which global hooks want them. It does not remove the note when the hook is removed.
_ASK_FOR_KWARGS: dict[int, bool] = getattr(nn.modules.module, "_global_forward_hooks_with_kwargs", {})

# Before torch 2.5, a compiled graph keeps the buffers of its first call, and in an attack these are copies.
_COMPILES_BUFFERS_IN = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5)

Models = nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module]


class Edge(NamedTuple):
    """A tensor's place in autograd's graph: a node and the number of its output. The tensor may be gone already."""

    node: Any
    output_nr: int


class Call(NamedTuple):
    """One forward pass of a watched module.

    Attributes:
        module: the module that was called.
        arguments: a tensor argument is kept as the tensor or as its edge, any other argument as its type. None: the
            output was one of the arguments.
        output: the output, detached. It shares memory and version counter with the output, but keeps no graph alive.
        version: the output's version counter after the call; a change in place increases it.
    """

    module: nn.Module
    arguments: tuple[Tensor | Edge | type, ...] | None
    output: Tensor
    version: int


class Source(NamedTuple):
    """The inputs ``(N, ...)`` that gave embeddings, and which columns of the model's output the embeddings are."""

    inputs: Tensor
    columns: slice


class _Token:
    """A key for an edge of autograd's graph. The node holds it, because a node cannot be referenced weakly."""


class _Tap:
    """A forward hook that remembers which call gave which output.

    It remembers a call as long as the output exists, or as long as the output's graph exists: after outputs were
    concatenated, the graph may be all that is left of them. A backward pass through the graph ends it. A copied or
    pickled model carries a tap that does nothing, because no wrapper watches the copy.
    """

    def __init__(self) -> None:
        self.calls: WeakTensorKeyDictionary | None = WeakTensorKeyDictionary()
        self.by_token: weakref.WeakKeyDictionary[_Token, Call] = weakref.WeakKeyDictionary()
        self.paused = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        kwargs, output = _with_kwargs(rest)
        if self.calls is None or self.paused or not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return
        # No output is kept here, nor a container that could hold one: the entry would keep its own key alive.
        arguments = tuple(a if isinstance(a, Tensor) else type(a) for a in (*args, *kwargs.values()))
        passed_through = any(argument is output for argument in arguments)
        call = Call(module, None if passed_through else arguments, output.detach(), output._version)
        self.calls[output] = call
        if output.grad_fn is not None:
            # For the same reason, a tensor of the graph is kept as its edge.
            inputs = None if passed_through else tuple(_edge_of(a) or a for a in arguments)
            self.by_token[_token(output.grad_fn, output.output_nr)] = call._replace(arguments=inputs)

    def call_of(self, output: Tensor | Edge) -> Call | None:
        """The call that gave this tensor, or the tensor at this edge of autograd's graph; None if it is not known."""
        calls = cast(WeakTensorKeyDictionary, self.calls)
        if isinstance(output, Tensor):
            return calls.get(output)
        token = output.node and output.node.metadata.get((_Token, output.output_nr))
        known = self.by_token.get(token) if token else None
        return known or next((call for tensor, call in calls.items() if _edge_of(tensor) == output), None)

    def take_over(self, other: _Tap, module: nn.Module) -> None:
        """Copies what another tap remembers of the calls of a module."""
        for mine, theirs in ((self.calls, other.calls), (self.by_token, other.by_token)):
            for key, call in cast(Any, theirs).items():
                if call.module is module:
                    cast(Any, mine)[key] = call

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_tap, ()


@cache
def _untraced() -> None:
    """Tells torch.compile to leave the taps alone: it cannot trace their weak dictionaries.

    It runs with the first capture and not with the import, because it imports the compiler, which takes as long as the
    rest of torch.
    """
    _Tap.__call__ = torch.compiler.disable(_Tap.__call__)  # type: ignore[method-assign]


def _inert_tap() -> _Tap:
    tap = _Tap()
    tap.calls = None
    return tap


class InputCapture:
    """Watches a chain of modules and finds the inputs that gave a tensor of embeddings.

    It recognises embeddings by identity or by autograd's graph, never by value. Embeddings may be an output of the last
    module, several of its outputs concatenated by rows, or a range of an output's columns. Any other operation on them
    (a normalisation, a cast) has to be moved into a module. Forward passes without gradient are ignored.

    Without ``model``, it watches every module until the first embeddings arrive, and from then on the chain of modules
    that led to them.

    Args:
        model: a module, modules in forward order, a PML trainer's ``models`` dict, or None.
    """

    def __init__(self, model: Models | None = None) -> None:
        self.modules: tuple[nn.Module, ...] = ()
        self._taps: list[_Tap] = []
        self._release: Callable[[], Any]
        self._start(() if model is None else chain_of(model))

    def watch(self, model: Models) -> None:
        """Watches ``model`` from now on, and no longer what was watched before."""
        modules = chain_of(model)
        self._release()
        self._start(modules)

    def inputs_of(self, embeddings: Tensor) -> Tensor:
        """The inputs ``(N, ...)`` that gave these embeddings, see `source_of`."""
        return self.source_of(embeddings).inputs

    def source_of(self, embeddings: Tensor, needed: Tensor | None = None) -> Source:
        """Finds where embeddings come from.

        Args:
            embeddings: ``(N, D)``: an output of the watched modules, several concatenated by rows, or columns of one.
            needed: ``(N,)`` bool, the rows whose inputs are asked for; None: all. The other rows may be a tensor
                without gradient, as those of a momentum encoder are.

        Raises:
            CaptureError: no watched forward pass gave the embeddings, or that pass cannot be repeated.
        """
        if not self.modules:
            self._bind(embeddings)
        if self._taps[-1].call_of(embeddings) is not None:
            return Source(_rows(self._trace(embeddings).detach(), needed), slice(None))
        parts = _parts(embeddings)
        if not parts:
            raise self._not_known()
        if type(embeddings.grad_fn) is not _concatenation():
            return Source(_rows(self._trace(parts[0]).detach(), needed), self._columns(embeddings, parts[0]))
        known = parts if needed is None else [part for part in parts if part.node is not None]
        inputs = [self._trace(part).detach() for part in known]
        if len(known) == len(parts):
            self._check_rows(embeddings, known, inputs)
            return Source(_rows(torch.cat(inputs), needed), slice(None))
        return Source(self._inputs_needed(embeddings, parts, inputs, cast(Tensor, needed)), slice(None))

    def embed(self, inputs: Tensor) -> Tensor:
        """Passes inputs ``(K, ...)`` through the watched modules, one after the other.

        Of a `DistributedDataParallel` it calls the module inside: the wrapper would communicate with the other ranks in
        each pass. Gradients are averaged nevertheless, since that is done by hooks on the parameters.
        """
        with self._paused():
            for module in self.modules:
                inputs = module.module(inputs) if isinstance(module, DistributedDataParallel) else module(inputs)
        return inputs

    def knows(self, embeddings: Tensor, columns: slice | None = None) -> bool:
        """Whether `source_of` finds the inputs of these embeddings, and finds ``columns`` if they are given."""
        try:
            found = self.source_of(embeddings).columns
        except CaptureError:
            return False
        return columns is None or columns == found

    def __reduce__(self) -> tuple[Any, ...]:
        return InputCapture, ()  # a copy or pickle holds no model: it finds its chain of modules at its first call

    def _start(self, modules: tuple[nn.Module, ...]) -> None:
        _untraced()
        if _COMPILES_BUFFERS_IN:
            _check_compiled(modules)
        self.modules = modules
        self._taps = [_Tap() for _ in modules or (None,)]
        if modules:
            handles = [
                module.register_forward_hook(tap, with_kwargs=True)
                for module, tap in zip(modules, self._taps, strict=True)
            ]
        else:
            handles = [register_module_forward_hook(_outermost(self._taps[0]), **_WITH_KWARGS)]
        self._release = weakref.finalize(self, _remove, handles)

    def _bind(self, embeddings: Tensor) -> None:
        """Finds the chain of outermost modules that led to the embeddings, and watches it from now on."""
        search = self._taps[0]
        chain: list[nn.Module] = []
        output: Any = embeddings if search.call_of(embeddings) else next(iter(_parts(embeddings)), None)
        while isinstance(output, Tensor | Edge) and (call := search.call_of(output)):
            chain.insert(0, call.module)
            output = _only_tensor(call, output)
        if not chain:
            raise CaptureError(_unknown("a module that ran with gradient since this wrapper was made"))
        if isinstance(output, Edge) or output.grad_fn is not None:
            raise CaptureError(
                f"{_names(chain)} gave these embeddings from a tensor that was itself computed with gradient, so the "
                "images stand further back than the chain of modules can be followed. Expected modules of which each "
                "takes the unchanged output of the one before; name the model: AdversarialLoss(loss, model)."
            )
        self.watch(chain)
        for module, tap in zip(self.modules, self._taps, strict=True):
            tap.take_over(search, module)

    def _trace(self, output: Tensor | Edge) -> Tensor:
        """Goes from an output of the last module back to the input of the first module."""
        for tap in reversed(self._taps):
            output = _only_tensor(self._call_of(tap, output), output)
        if isinstance(output, Edge):
            raise self._not_known()
        return output

    def _call_of(self, tap: _Tap, output: Tensor | Edge) -> Call:
        call = tap.call_of(output)
        if call is None:
            raise self._not_known()
        if call.output._version != call.version:
            raise CaptureError(
                f"The output of {type(call.module).__name__} was changed in place after its forward pass; "
                "expected the tensor as the module returned it. Inside the model, use an operation that makes a new "
                "tensor, or make the module that works in place a part of the watched model."
            )
        return call

    def _inputs_needed(self, embeddings: Tensor, parts: list[Edge], inputs: list[Tensor], needed: Tensor) -> Tensor:
        """The inputs of the needed rows, where one of the parts has no gradient and takes the rows that are left."""
        lengths = iter(map(len, inputs))
        missing = len(embeddings) - sum(map(len, inputs))
        if not inputs or len(parts) != len(inputs) + 1 or missing < 0:
            raise self._not_known()
        self._check_rows(embeddings, [part for part in parts if part.node is not None], inputs, missing)
        known = [torch.full((missing if p.node is None else next(lengths),), p.node is not None) for p in parts]
        is_known, needed = torch.cat(known), needed.cpu()
        if (needed & ~is_known).any():
            raise self._not_known()
        return torch.cat(inputs)[needed[is_known].to(inputs[0].device)]

    def _check_rows(self, embeddings: Tensor, parts: list[Edge], inputs: list[Tensor], missing: int = 0) -> None:
        """Refuses embeddings that are not the rows of the parts in order, and inputs that cannot be concatenated."""
        outputs = [self._call_of(self._taps[-1], part).output for part in parts]
        whole = (sum(map(len, outputs)) + missing, *embeddings.shape[1:]) == embeddings.shape
        whole = whole and all(output.shape[1:] == embeddings.shape[1:] for output in outputs)
        if not whole or embeddings._version or any(out.dtype != embeddings.dtype for out in outputs):
            raise self._not_known()
        if len({(batch.shape[1:], batch.dtype, batch.device) for batch in inputs}) > 1:
            found = ", ".join(f"{tuple(batch.shape)} {batch.dtype} on {batch.device}" for batch in inputs)
            raise CaptureError(
                f"The embeddings were concatenated from calls with inputs of {found}; expected inputs that can be "
                "concatenated too, since their perturbed copies are embedded as one batch. Compute one loss per call."
            )

    def _columns(self, embeddings: Tensor, part: Edge) -> slice:
        """Which columns of the output the embeddings are: both are views of the same memory."""
        output = self._call_of(self._taps[-1], part).output
        same_rows = embeddings.ndim == output.ndim == 2 and len(embeddings) == len(output)
        step, offset = output.stride(-1), embeddings.storage_offset() - output.storage_offset()
        if (
            not same_rows
            or embeddings.dtype != output.dtype
            or embeddings.untyped_storage().data_ptr() != output.untyped_storage().data_ptr()
            or embeddings.stride() != output.stride()
            or not step
            or offset % step
            or not 0 <= offset // step <= output.shape[1] - embeddings.shape[1]
        ):
            raise self._not_known()
        return slice(offset // step, offset // step + embeddings.shape[1])

    def _not_known(self) -> CaptureError:
        return CaptureError(_unknown(f"the watched {_names(self.modules)}"))

    @contextmanager
    def _paused(self) -> Iterator[None]:
        before = [tap.paused for tap in self._taps]
        for tap in self._taps:
            tap.paused = True
        try:
            yield
        finally:
            for tap, paused in zip(self._taps, before, strict=True):
                tap.paused = paused


def chain_of(model: Models) -> tuple[nn.Module, ...]:
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


def _outermost(tap: _Tap) -> Any:
    """A global hook that keeps the call of the outermost module.

    Where nested modules return the same tensor, the outermost returns last, so its call replaces the others. Modules
    inside a compiled module are not watched: a hook would split the compiled graph.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if torch.compiler.is_compiling():
            return
        kwargs, output = _with_kwargs(rest)
        if not any(argument is output for argument in (*args, *kwargs.values())):
            tap(module, args, kwargs, output)

    return hook


def _with_kwargs(rest: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """The keyword arguments and the output of a call, from the last arguments of a hook.

    A hook that is removed while its module runs, for example by the garbage collector, gets no keyword arguments.
    """
    kwargs, output = rest if len(rest) == 2 else ({}, *rest)
    return kwargs, output


def _token(node: Any, output_nr: int) -> _Token:
    """The token of an edge. A backward pass through the graph removes it."""
    metadata, key = node.metadata, (_Token, output_nr)
    if key not in metadata:
        metadata[key] = _Token()
        node.register_prehook(lambda gradients: metadata.pop(key, None) and None)
    return cast(_Token, metadata[key])


def _edge_of(value: Any) -> Edge | None:
    return Edge(value.grad_fn, value.output_nr) if isinstance(value, Tensor) and value.grad_fn is not None else None


def _rows(inputs: Tensor, needed: Tensor | None) -> Tensor:
    return inputs if needed is None else inputs[needed.to(inputs.device)]


def _parts(embeddings: Tensor) -> list[Edge]:
    """The edges of the tensors that were concatenated, or of the tensor that was indexed; else an empty list."""
    node: Any = embeddings.grad_fn
    if type(node) is _concatenation():
        return [Edge(*part) for part in cast(Any, node).next_functions]
    part = Edge(node, embeddings.output_nr)
    while type(part.node) in _ranges():  # one node for each dimension that was indexed
        part = Edge(*part.node.next_functions[0])
    return [] if part.node is node else [part]


@cache
def _concatenation() -> type:
    """The class of the nodes that torch.cat adds to the graph; the class has no public name."""
    with torch.inference_mode(False), torch.enable_grad():
        return type(torch.cat([torch.empty(1, requires_grad=True)]).grad_fn)


@cache
def _ranges() -> set[type]:
    """As `_concatenation`, for the operations that return a range of columns."""
    with torch.inference_mode(False), torch.enable_grad():
        row = torch.empty(1, 2, requires_grad=True).clone()
        return {type(part.grad_fn) for part in (row[:, :1], row[:, :], row.split(1, 1)[0], row.split([1, 1], 1)[0])}


def _only_tensor(call: Call, output: Tensor | Edge) -> Tensor | Edge:
    arguments = (output,) if call.arguments is None else call.arguments
    if len(arguments) != 1 or not isinstance(arguments[0], Tensor | Edge):
        raise CaptureError(
            f"{type(call.module).__name__} was called with {[_kind(argument) for argument in arguments]}; "
            "expected one tensor of inputs, by position. Wrap the model in a module that takes the images alone."
        )
    return arguments[0]


def _kind(argument: Any) -> str:
    kind = argument if isinstance(argument, type) else Tensor
    return kind.__name__


def _check_compiled(modules: Iterable[nn.Module]) -> None:
    compiled = [m for module in modules for m in module.modules() if isinstance(m, torch._dynamo.OptimizedModule)]
    if any(True for module in compiled for _ in module.buffers()):
        raise CaptureError(
            f"torch {torch.__version__} compiles the buffers of a module (such as BatchNorm's statistics) into the "
            "graph, so an attack would always use those of the first step. Expected torch 2.5 or newer, or a model "
            "that is not compiled."
        )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
        _ASK_FOR_KWARGS.pop(handle.id, None)


def _names(modules: Iterable[nn.Module]) -> str:
    return " -> ".join(type(module).__name__ for module in modules)


def _unknown(expected: str) -> str:
    return (
        f"The inputs behind these embeddings are not known: expected a tensor that {expected} returned with gradient, "
        "several such tensors concatenated by rows, or a range of the columns of one, unchanged since. Pass the "
        "model's output itself (normalise or cast inside the model, compute the loss before the backward pass, do not "
        "detach), or name the model: AdversarialLoss(loss, model)."
    )
