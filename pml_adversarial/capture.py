"""Which inputs gave these embeddings, and through which modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import CaptureError

# Older releases of torch do not tell global hooks the keyword arguments of a call.
_WITH_KWARGS: Any = {"with_kwargs": True} if "with_kwargs" in signature(register_module_forward_hook).parameters else {}

Models = nn.Module | Iterable[nn.Module] | Mapping[str, nn.Module]


class Call(NamedTuple):
    """One forward pass: the module, what went in (None: what came out), and the version of what came out."""

    module: nn.Module
    arguments: tuple[Any, ...] | None
    version: int


class _Tap:
    """A forward hook that remembers which call gave which output, for as long as the output lives.

    A copied or pickled model carries an inert tap: the copy is nobody's to watch.
    """

    def __init__(self) -> None:
        self.calls: WeakTensorKeyDictionary | None = WeakTensorKeyDictionary()
        self.paused = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.calls is None or self.paused or not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return
        arguments = (*args, *kwargs.values())
        passed_through = any(argument is output for argument in arguments)  # kept, the key would keep itself alive
        self.calls[output] = Call(module, None if passed_through else arguments, output._version)

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_tap, ()


def _inert_tap() -> _Tap:
    tap = _Tap()
    tap.calls = None
    return tap


class InputCapture:
    """Watches a chain of modules and tells which inputs gave a tensor of embeddings.

    Embeddings are recognised by identity, never by value: what is done to them after the last module (a
    normalisation, a cast, a concatenation) has to be moved into a module. Passes without gradient are
    ignored. Without a model, every module is watched until the first embeddings are asked for, and the chain
    that led to them is kept.

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
        """The input batch that the watched modules turned into exactly this tensor.

        Raises:
            CaptureError: no watched forward pass gave it, or one gave it that cannot be repeated.
        """
        if not self.modules:
            self._bind(embeddings)
        tensor = embeddings
        for tap in reversed(self._taps):
            tensor = self._input_of(tap, tensor)
        return tensor.detach()

    def embed(self, inputs: Tensor) -> Tensor:
        """The watched modules, one after the other.

        Of a `DistributedDataParallel` its module: the wrapper itself would talk to the other ranks in each pass. Its
        hooks sit on the parameters, so gradients are averaged all the same.
        """
        with self._paused():
            for module in self.modules:
                inputs = module.module(inputs) if isinstance(module, DistributedDataParallel) else module(inputs)
        return inputs

    def knows(self, embeddings: Tensor) -> bool:
        """Whether ``inputs_of`` has an answer."""
        try:
            self.inputs_of(embeddings)
        except CaptureError:
            return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return InputCapture, ()  # copies and pickles hold no model: they find their chain anew

    def _start(self, modules: tuple[nn.Module, ...]) -> None:
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
        calls = _calls(self._taps[0])
        chain: list[nn.Module] = []
        tensor: Any = embeddings
        while isinstance(tensor, Tensor) and tensor in calls:
            chain.insert(0, calls[tensor].module)
            tensor = _only_tensor(calls[tensor], tensor)
        if not chain:
            raise CaptureError(_unknown("a module that ran with gradient since this wrapper was made"))
        self.watch(chain)
        for module, tap in zip(self.modules, self._taps, strict=True):
            for output, call in calls.items():
                if call.module is module:
                    _calls(tap)[output] = call

    def _input_of(self, tap: _Tap, output: Tensor) -> Tensor:
        calls = _calls(tap)
        if output not in calls:
            raise CaptureError(_unknown(f"the watched {_names(self.modules)}"))
        call = calls[output]
        if output._version != call.version:
            raise CaptureError(
                f"The output of {type(call.module).__name__} was changed in place after its forward pass; "
                "expected the tensor as the module returned it. Use an operation that makes a new tensor "
                "inside the model, or put the in-place module into the model that is watched."
            )
        return _only_tensor(call, output)

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
    """Of nested modules that return one tensor, the outermost finishes last and its call stays."""

    def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        kwargs, output = rest if _WITH_KWARGS else ({}, *rest)
        if not any(argument is output for argument in (*args, *kwargs.values())):
            tap(module, args, kwargs, output)

    return hook


def _only_tensor(call: Call, output: Tensor) -> Tensor:
    arguments = (output,) if call.arguments is None else call.arguments
    if len(arguments) != 1 or not isinstance(arguments[0], Tensor):
        raise CaptureError(
            f"{type(call.module).__name__} was called with {[type(argument).__name__ for argument in arguments]}; "
            "expected one tensor of inputs, by position. Wrap the model in a module that takes the images alone."
        )
    return arguments[0]


def _calls(tap: _Tap) -> WeakTensorKeyDictionary:
    return cast(WeakTensorKeyDictionary, tap.calls)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _names(modules: Iterable[nn.Module]) -> str:
    return " -> ".join(type(module).__name__ for module in modules)


def _unknown(expected: str) -> str:
    return (
        f"The inputs behind these embeddings are not known: expected a tensor that {expected} returned, with "
        "gradient, and that was not changed since. Pass the model's output itself (normalise or cast inside the "
        "model, embed one concatenated batch instead of concatenating embeddings, do not detach), or name the "
        "model: AdversarialLoss(loss, model)."
    )
