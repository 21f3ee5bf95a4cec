"""Which inputs gave these embeddings, and through which modules."""

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

# Older releases of torch do not tell global hooks the keyword arguments of a call.
_WITH_KWARGS: Any = {"with_kwargs": True} if "with_kwargs" in signature(register_module_forward_hook).parameters else {}
# Where torch notes which global hooks want them, and forgets to remove the note with the hook.
_ASK_FOR_KWARGS: dict[int, bool] = getattr(nn.modules.module, "_global_forward_hooks_with_kwargs", {})

# Before 2.5, compiled graphs hold the buffers that they met first, and in an attack those are copies.
_COMPILES_BUFFERS_IN = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5)

Models = nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module]


class Edge(NamedTuple):
    """Where autograd's graph has a tensor that need not exist any more: the node and which of its outputs."""

    node: Any
    output_nr: int


class Call(NamedTuple):
    """One forward pass: the module, what went in (None: what came out), what came out, and its version.

    What went in is kept as tensors, edges, or the type of anything else. What came out is detached: it shares memory
    and version counter with the output, but does not keep its graph.
    """

    module: nn.Module
    arguments: tuple[Tensor | Edge | type, ...] | None
    output: Tensor
    version: int


class Source(NamedTuple):
    """Where embeddings come from: the inputs, and which columns of the model's output they are."""

    inputs: Tensor
    columns: slice


class _Token:
    """Stands for an edge of autograd's graph, whose nodes cannot be referenced weakly. It lives on the node."""


class _Tap:
    """A forward hook that remembers which call gave which output.

    It does so for as long as the output lives, or its graph until that is walked backward: of outputs that were
    concatenated nothing else may be left. A copied or pickled model carries an inert tap: the copy is nobody's
    to watch.
    """

    def __init__(self) -> None:
        self.calls: WeakTensorKeyDictionary | None = WeakTensorKeyDictionary()
        self.by_token: weakref.WeakKeyDictionary[_Token, Call] = weakref.WeakKeyDictionary()
        self.paused = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        kwargs, output = _with_kwargs(rest)
        if self.calls is None or self.paused or not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return
        # Kept, an output, or a container that may come to hold it, would keep itself alive.
        arguments = tuple(a if isinstance(a, Tensor) else type(a) for a in (*args, *kwargs.values()))
        passed_through = any(argument is output for argument in arguments)
        call = Call(module, None if passed_through else arguments, output.detach(), output._version)
        self.calls[output] = call
        if output.grad_fn is not None:
            # For the same reason an edge in place of a tensor that is in the graph.
            inputs = None if passed_through else tuple(_edge_of(a) or a for a in arguments)
            self.by_token[_token(output.grad_fn, output.output_nr)] = call._replace(arguments=inputs)

    def call_of(self, output: Tensor | Edge) -> Call | None:
        """The call that gave this tensor, or the tensor that autograd's graph has there."""
        calls = cast(WeakTensorKeyDictionary, self.calls)
        if isinstance(output, Tensor):
            return calls.get(output)
        token = output.node and output.node.metadata.get((_Token, output.output_nr))
        known = self.by_token.get(token) if token else None
        return known or next((call for tensor, call in calls.items() if _edge_of(tensor) == output), None)

    def take_over(self, other: _Tap, module: nn.Module) -> None:
        """Remembers what another tap knows of the calls of a module."""
        for mine, theirs in ((self.calls, other.calls), (self.by_token, other.by_token)):
            for key, call in cast(Any, theirs).items():
                if call.module is module:
                    cast(Any, mine)[key] = call

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_tap, ()


@cache
def _untraced() -> None:
    """Keeps compilers out of the taps, whose weak dictionaries they cannot follow.

    Asked for late, since it imports what takes as long to import as all the rest of torch.
    """
    _Tap.__call__ = torch.compiler.disable(_Tap.__call__)  # type: ignore[method-assign]


def _inert_tap() -> _Tap:
    tap = _Tap()
    tap.calls = None
    return tap


class InputCapture:
    """Watches a chain of modules and tells which inputs gave a tensor of embeddings.

    Embeddings are recognised by identity or by autograd's graph, never by value. They may be an output itself,
    several outputs concatenated by rows, or a range of an output's columns. Whatever else is done to them after
    the last module (a normalisation, a cast) has to be moved into a module. Passes without gradient are ignored.
    Without a model, every module is watched until the first embeddings are asked for, and the chain that led to
    them is kept.

    Args:
        model: a module, modules in forward order, a PML trainer's ``models`` dict, or None.
    """

    def __init__(self, model: Models | None = None) -> None:
        self.modules: tuple[nn.Module, ...] = ()
        self._taps: list[_Tap] = []
        self._release: Callable[[], Any]
        self._start(() if model is None else chain_of(model))

    def watch(self, model: Models) -> None:
        """Watches ``model`` from now on instead of what was watched before."""
        modules = chain_of(model)
        self._release()
        self._start(modules)

    def inputs_of(self, embeddings: Tensor) -> Tensor:
        """The input batch that the watched modules turned into these rows, see `source_of`."""
        return self.source_of(embeddings).inputs

    def source_of(self, embeddings: Tensor) -> Source:
        """Where embeddings come from.

        Args:
            embeddings: an output of the watched modules, several concatenated by rows, or columns of one.

        Raises:
            CaptureError: no watched forward pass gave them, or one gave them that cannot be repeated.
        """
        if not self.modules:
            self._bind(embeddings)
        if self._taps[-1].call_of(embeddings) is not None:
            return Source(self._trace(embeddings).detach(), slice(None))
        parts = _parts(embeddings)
        if not parts:
            raise self._not_known()
        inputs = [self._trace(part).detach() for part in parts]
        if type(embeddings.grad_fn) is _concatenation():
            self._check_rows(embeddings, parts, inputs)
            return Source(torch.cat(inputs), slice(None))
        return Source(inputs[0], self._columns(embeddings, parts[0]))

    def embed(self, inputs: Tensor) -> Tensor:
        """The watched modules, one after the other.

        Of a `DistributedDataParallel` its module: the wrapper itself would talk to the other ranks in each pass. Its
        hooks sit on the parameters, so gradients are averaged all the same.
        """
        with self._paused():
            for module in self.modules:
                inputs = module.module(inputs) if isinstance(module, DistributedDataParallel) else module(inputs)
        return inputs

    def knows(self, embeddings: Tensor, columns: slice | None = None) -> bool:
        """Whether `source_of` has an answer, for these columns if any are named."""
        try:
            found = self.source_of(embeddings).columns
        except CaptureError:
            return False
        return columns is None or columns == found

    def __reduce__(self) -> tuple[Any, ...]:
        return InputCapture, ()  # copies and pickles hold no model: they find their chain anew

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
        """Keeps the chain of outermost modules that led to the embeddings."""
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
                "images stand further back than the chain of modules can be followed. Expected modules that take each "
                "other's outputs as they are; name the model: AdversarialLoss(loss, model)."
            )
        self.watch(chain)
        for module, tap in zip(self.modules, self._taps, strict=True):
            tap.take_over(search, module)

    def _trace(self, output: Tensor | Edge) -> Tensor:
        """From an output of the last module back to the input of the first."""
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
                "expected the tensor as the module returned it. Use an operation that makes a new tensor "
                "inside the model, or put the in-place module into the model that is watched."
            )
        return call

    def _check_rows(self, embeddings: Tensor, parts: list[Edge], inputs: list[Tensor]) -> None:
        """Refuses what is not the rows of the parts, one after the other, or has inputs that make no batch."""
        outputs = [self._call_of(self._taps[-1], part).output for part in parts]
        whole = (sum(map(len, outputs)), *embeddings.shape[1:]) == embeddings.shape
        if not whole or embeddings._version or any(out.dtype != embeddings.dtype for out in outputs):
            raise self._not_known()
        if len({(batch.shape[1:], batch.dtype, batch.device) for batch in inputs}) > 1:
            found = ", ".join(f"{tuple(batch.shape)} {batch.dtype} on {batch.device}" for batch in inputs)
            raise CaptureError(
                f"The embeddings were concatenated from calls with inputs of {found}; expected inputs that can be "
                "concatenated too, since their perturbed copies are embedded as one batch. Take one loss per call."
            )

    def _columns(self, embeddings: Tensor, part: Edge) -> slice:
        """Which columns of the output this view of its memory shows."""
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
    """Of nested modules that return one tensor, the outermost finishes last and its call stays.

    What is inside of a compiled module is left to the compiler: it would be cut to pieces.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if torch.compiler.is_compiling():
            return
        kwargs, output = _with_kwargs(rest)
        if not any(argument is output for argument in (*args, *kwargs.values())):
            tap(module, args, kwargs, output)

    return hook


def _with_kwargs(rest: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    """Keyword arguments and output of a call, of what a hook is told.

    A hook that is removed while its module runs, as when garbage is collected, is told no keyword arguments any more.
    """
    kwargs, output = rest if len(rest) == 2 else ({}, *rest)
    return kwargs, output


def _token(node: Any, output_nr: int) -> _Token:
    """The token of an edge, which is gone once the graph was walked backward."""
    metadata, key = node.metadata, (_Token, output_nr)
    if key not in metadata:
        metadata[key] = _Token()
        node.register_prehook(lambda gradients: metadata.pop(key, None) and None)
    return cast(_Token, metadata[key])


def _edge_of(value: Any) -> Edge | None:
    return Edge(value.grad_fn, value.output_nr) if isinstance(value, Tensor) and value.grad_fn is not None else None


def _parts(embeddings: Tensor) -> list[Edge]:
    """What was concatenated, or what the embeddings are a range of; nothing after any other operation."""
    node: Any = embeddings.grad_fn
    if type(node) is _concatenation():
        return [Edge(*part) for part in cast(Any, node).next_functions]
    part = Edge(node, embeddings.output_nr)
    while type(part.node) in _ranges():  # one for each dimension that was indexed
        part = Edge(*part.node.next_functions[0])
    return [] if part.node is node else [part]


@cache
def _concatenation() -> type:
    """The class of the nodes that torch.cat leaves in the graph, which has no public name."""
    with torch.inference_mode(False), torch.enable_grad():
        return type(torch.cat([torch.empty(1, requires_grad=True)]).grad_fn)


@cache
def _ranges() -> set[type]:
    """As `_concatenation`, of the operations that give ranges of columns."""
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
            f"torch {torch.__version__} compiles the buffers of a module (such as BatchNorm's statistics) into it, so "
            "an attack on it would go on using those of its first step. Expected torch from 2.5 on, or the model "
            "uncompiled."
        )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
        _ASK_FOR_KWARGS.pop(handle.id, None)


def _names(modules: Iterable[nn.Module]) -> str:
    return " -> ".join(type(module).__name__ for module in modules)


def _unknown(expected: str) -> str:
    return (
        f"The inputs behind these embeddings are not known: expected a tensor that {expected} returned, with "
        "gradient, several of them concatenated by rows, or a range of one's columns, and nothing changed since. Pass "
        "the model's output itself (normalise or cast inside the model, take the loss before backward, do not "
        "detach), or name the model: AdversarialLoss(loss, model)."
    )
