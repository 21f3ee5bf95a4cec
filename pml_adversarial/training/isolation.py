"""An attack leaves no trace: modules, gradients and random number generators are restored after it."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

import numpy
import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CaptureError
from .side_effects import undone_with_values

# Before torch 2.5, a compiled graph keeps the buffers of its first call, and in an attack these are copies.
_COMPILES_BUFFERS_IN = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5)

_GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15  # Weyl sequence: neighbouring steps get far-apart seeds


@contextmanager
def preserved(*modules: nn.Module, learns: bool = False) -> Iterator[None]:
    """Restores the state of modules and all of their submodules on exit, also after an exception.

    - Buffers: the original tensors come back, so an autograd graph that saved them can still be walked backward.
    - Attributes, the mode among them, and what hooks keep, see `side_effects.undone`.
    - Other tensors and arrays that forward passes change in place, see `side_effects.undone_with_values`.
    - Parameters: the original ones, each with its ``.grad``, ``requires_grad`` and ``.data``, which some losses bind to
      another tensor.

    Args:
        modules: any.
        learns: whether it is found out anew which tensors forward passes change in place.
    """
    submodules = list({id(m): m for module in modules for m in module.modules()}.values())
    places = [(m._parameters, list(m._parameters.items())) for m in submodules if not _is_scripted(m)]
    in_places = [list(map(id, parameters.values())) for parameters, _ in places]
    parameters = list(
        {id(p): p for m in submodules for p in m._parameters.values() if p is not None and not is_lazy(p)}.values()
    )
    states = [(m, vars(m).copy(), m._buffers.copy()) for m in submodules if not _is_scripted(m)]
    scripted = [
        (m, getattr(m, "training", None), [(b, b.detach().clone()) for b in m.buffers()])
        for m in submodules
        if _is_scripted(m)
    ]
    tensors = [(p, p.requires_grad, p.grad, _bound(p)) for p in parameters]
    queues = ExitStack()
    queues.enter_context(undone_with_values(submodules, learns))
    for _, _, copies in scripted:
        queues.enter_context(_versions_kept([buffer for buffer, _ in copies]))
    try:
        for module, _, buffers in states:
            if _enqueues_as_pml(module):
                queues.enter_context(_queue_preserved(cast(CrossBatchMemory, module)))
                continue
            for name, buffer in buffers.items():
                module._buffers[name] = buffer if buffer is None or is_lazy(buffer) else buffer.detach().clone()
        yield
    finally:
        for module, mode, copies in scripted:  # their buffers cannot be exchanged
            if mode is None:
                vars(module).pop("training", None)
            else:
                module.training = mode
            for buffer, before in copies:
                buffer.detach().copy_(before)
        for parameter, _, _, (dtype, pointer, *place) in tensors:
            if (parameter.dtype, parameter.data_ptr()) != (dtype, pointer):
                parameter.data = torch.empty(0, dtype=dtype, device=place[0].device).set_(*place)
        queues.close()
        for module, state, buffers in states:
            vars(module).clear()
            vars(module).update(state)
            module._buffers.clear()
            module._buffers.update(buffers)
        for (parameters_of, entries), ids in zip(places, in_places, strict=True):
            if list(map(id, parameters_of.values())) != ids:
                parameters_of.clear()
                parameters_of.update(entries)
        for parameter, requires_grad, gradient, _ in tensors:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def _versions_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Afterwards the versions of tensors are what they were, so that graphs made before can be walked backward."""
    keep: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for tensor in tensors:
            stack.enter_context(keep(tensor))
        yield


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _bound(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor is bound to. Other than asking for ``.data``, this costs no operation on the device."""
    place = tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
    return tensor.dtype, tensor.data_ptr(), *place


def _enqueues_as_pml(module: nn.Module) -> bool:
    """Whether the module is a `CrossBatchMemory` that writes to its memory in PML's ``add_to_memory`` alone."""
    kind: Any = type(module)
    pml = CrossBatchMemory
    return isinstance(module, pml) and (kind.forward, kind.add_to_memory) == (pml.forward, pml.add_to_memory)


@contextmanager
def _queue_preserved(memory: CrossBatchMemory) -> Iterator[None]:
    """Whatever is enqueued inside, after it the memory holds what it held before.

    Only the rows that are written are kept and written back, as the memory may be large. The version of its tensors is
    set back too: graphs made before can still be walked backward, and those made inside, of rows that are gone, raise.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    enqueue = memory.add_to_memory

    def keep_and_enqueue(self: CrossBatchMemory, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        rows = (self.queue_idx + torch.arange(batch_size, device=labels.device)) % self.memory_size
        if self is memory:
            kept.extend((tensor, rows, tensor[rows]) for tensor in (self.embedding_memory, self.label_memory))
            enqueue(embeddings, labels, batch_size)
        else:  # a copy of the memory, which carries this function along
            CrossBatchMemory.add_to_memory(self, embeddings, labels, batch_size)

    with _versions_kept((memory.embedding_memory, memory.label_memory)):
        memory.add_to_memory = MethodType(keep_and_enqueue, memory)
        try:
            yield
        finally:
            for tensor, rows, before in reversed(kept):
                tensor[rows] = before


@contextmanager
def isolated(*modules: nn.Module, but: Iterable[nn.Module] = (), learns: bool = False) -> Iterator[None]:
    """Puts modules into eval mode, freezes their parameters and enables gradients; restores all, see `preserved`.

    Args:
        modules: with all of their submodules.
        but: these keep their mode.
        learns: see `preserved`.
    """
    kept = set(map(id, but))
    with preserved(*modules, learns=learns), torch.enable_grad():
        for submodule in (inner for module in modules for inner in module.modules()):
            if id(submodule) not in kept and is_training(submodule):
                submodule.training = False
        freeze(*modules)
        yield


def is_training(module: nn.Module) -> bool:
    """Whether a module is in train mode. A scripted module that was frozen (``torch.jit.freeze``) has no mode."""
    return getattr(module, "training", False)


def freeze(*modules: nn.Module) -> None:
    """Lets the parameters of modules have no gradients."""
    for parameter in (found for module in modules for found in module.parameters()):
        if is_lazy(parameter):
            continue
        if not parameter.is_inference():  # which has no gradient, and could not be unfrozen
            parameter.requires_grad_(False)
        parameter.grad = None


@contextmanager
def random_stream(seed: int, step: int) -> Iterator[Callable[[], None]]:
    """Lets the global generators of torch, numpy and ``random`` draw from a stream of its own; restores them on exit.

    The stream depends on ``seed`` and ``step`` alone, so a resumed run draws the numbers of an unbroken run.

    Yields:
        A function that starts the stream again.
    """
    mixed = (seed + (step + 1) * _GOLDEN_RATIO_64) % 2**63
    with random_kept():
        seed_all(mixed)
        yield partial(seed_all, mixed)


@contextmanager
def random_kept() -> Iterator[None]:
    """Restores the global generators of torch, numpy and ``random`` on exit."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.callback(numpy.random.set_state, numpy_state)
        stack.callback(random.setstate, python_state)
        yield


def seed_all(seed: int) -> None:
    """Seeds the global generators of torch, numpy and ``random``."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed costs as much as all the rest together
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    numpy.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def check_compiled(modules: Iterable[nn.Module]) -> None:
    """Refuses compiled modules that could not be preserved.

    Raises:
        CaptureError: torch is older than 2.5, and a compiled module has buffers.
    """
    if not _COMPILES_BUFFERS_IN:
        return
    compiled = [m for module in modules for m in module.modules() if isinstance(m, torch._dynamo.OptimizedModule)]
    if any(True for module in compiled for _ in module.buffers()):
        raise CaptureError(
            f"torch {torch.__version__} compiles the buffers of a module (such as BatchNorm's statistics) into the "
            "graph, so an attack would always use those of the first step. Expected torch 2.5 or newer, or a model "
            "that is not compiled."
        )


def own_modules(*modules: nn.Module) -> list[nn.Module]:
    """Those of classes that users write, and that hold modules or parameters: they may decide what is returned.

    Layers of torch are none, nor are classes that derive from them, nor what only changes its input, as DropPath does.
    """
    inside = [m for module in modules for m in module.modules()]
    return [m for m in inside if (m._modules or m._parameters) and not _is_layer_of_torch(cast(Hashable, type(m)))]


@cache
def _is_layer_of_torch(kind: Any) -> bool:
    bases = [base for base in kind.__mro__ if base not in (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)]
    return any(base.__module__.startswith("torch.nn.") for base in bases)


def depends_on_mode(*modules: nn.Module) -> bool:
    """Whether any submodule is in train mode and runs code that asks for the mode.

    The answer comes from the code of each class, so it also covers modules that users write. Scripted modules count as
    dependent, because their code cannot be read.
    """
    inner = (submodule for module in modules for submodule in module.modules())
    return any(is_training(m) and _reads_training(cast(Hashable, type(m))) for m in inner)


@cache
def _reads_training(kind: Any) -> bool:
    if issubclass(kind, torch.jit.ScriptModule):
        return True
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    members = [getattr(member, "fget", member) for base in bases for member in vars(base).values()]
    codes = [member.__code__ for member in members if isinstance(member, FunctionType)]
    return any("training" in names for code in codes for names in _attribute_names(code))


def _attribute_names(code: CodeType) -> Iterator[tuple[str, ...]]:
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attribute_names(constant)
