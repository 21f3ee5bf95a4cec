"""Undoes what forward passes leave behind: in attributes of modules, in what the user's hooks keep, and in tensors.

What a forward pass changes in place is found out by comparing all tensors and arrays that modules reach, before and
after a pass. This takes time, so it is done now and then. In between, only the values of those that were found are
kept.
"""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy

from .generators import GENERATORS, set_state, state_of

OWN = frozenset(vars(nn.Module()))  #: Attributes that belong to torch; they are restored where it matters.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL: list[dict[int, Any]] = [getattr(nn_module, f"_global{name}") for name in _HOOKS]
_PACKAGE = __name__.split(".")[0]
_DEPTH = 3  # of what lies in one another: containers, objects, functions
_NOTHING: Set[int] = frozenset()
_changing: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
"""Module -> the ``id`` of what it reaches and holds a tensor or array that a pass was seen to change in place.

If another object gets the same ``id`` later, its tensors are copied in vain, which does no harm.
"""


@contextmanager
def undone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On exit, attributes of modules and what their hooks keep are as they were, also after an exception.

    Attributes name their objects again. Lists, dicts, sets and deques hold again what they held: those that modules and
    their objects have as attributes, and those that a hook reaches by its closure, its globals, its arguments or its
    object, up to three of them in one another. Tensors are the same objects again, with the values that they have now.
    """
    with _restored(_kept(modules)):
        yield


@contextmanager
def undone_with_values(modules: Iterable[nn.Module], learns: bool = False) -> Iterator[None]:
    """As `undone`. Tensors and arrays that forward passes change in place have their values again, too.

    Random number generators that modules hold have their states again. Buffers are left out. The versions of tensors
    are what they were, so graphs made before can be walked backward.

    Args:
        modules: all submodules too.
        learns: whether it is found out anew what is changed; False: what was found before is used.
    """
    keeper = _kept(modules, all_values=learns)
    tensors = [held for _, _, held in keeper.values if isinstance(held, Tensor)]
    in_graphs = [] if learns else [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
    _let_go(in_graphs)  # by graphs made before
    copies = [_copied(held, to_host=learns) for _, _, held in keeper.values]
    generators = keeper.generators_to_now()
    with ExitStack() as stack:
        for tensor in tensors:
            stack.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))  # type: ignore[attr-defined]
        with _restored(keeper):
            try:
                yield
            finally:
                for put_back in generators:
                    put_back()
                _let_go(in_graphs)  # by graphs made inside, which have seen other values
                for found, copied in zip(keeper.values, copies, strict=True):
                    if not learns:
                        _write(found.held, copied)
                    elif _differs(found.held, copied):
                        found.remember()
                        _write(found.held, copied)


class Values:
    """What tensors, arrays, random number generators and the places of parameters hold that modules reach.

    Buffers are left out, also where something else refers to them, as a list in `DistributedDataParallel` does.

    Args:
        modules: all submodules too.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        buffers = {_memory(buffer) for module in modules for buffer in module.buffers(recurse=False)}
        keeper = _kept(modules, all_values=True)
        self._values = [one for one in keeper.values if _memory(one.held) not in buffers]
        self._generators = keeper.generators_to_now()
        self._copies = [_copied(held, to_host=True) for _, _, held in self._values]
        self._parameters = [
            (m._parameters, name, p) for m in modules if _is_open(m) for name, p in m._parameters.items()
        ]

    def changed(self) -> list[Callable[[], Any]]:
        """Functions that put back what was changed since. It is remembered for `undone_with_values`."""
        found = list(self._generators)
        for one, copied in zip(self._values, self._copies, strict=True):
            if _differs(one.held, copied):
                one.remember()
                found.append(partial(_write, one.held, copied))
        for held, name, parameter in self._parameters:
            if held.get(name) is not parameter:
                found.append(partial(held.__setitem__, name, parameter))
        return found


def generators_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The random number generators that modules reach. All submodules have to be among them."""
    return _kept(modules).generators


def note_changed_buffers(before: Iterable[tuple[nn.Module, str, Tensor]]) -> None:
    """Remembers for `graph_kept` which modules of the user's own classes change buffers: (module, name, old value)."""
    for module, name, value in before:
        now = module._buffers.get(name)
        if now is not None and not _is_torch_s(module) and _differs(now, value):
            _changing.setdefault(module, set()).add(id(module._buffers))


def keep_graphs(modules: Iterable[nn.Module]) -> None:
    """Lets modules go on with copies of tensors that forward passes change in place, where a graph has saved them.

    So the graph has the values that it was made with. The objects stay the same: what they refer to is exchanged.
    """
    modules = [module for module in modules if module in _changing and _is_open(module)] if _changing else []
    found = [one.held for one in _kept(modules).values if isinstance(one.held, Tensor)]
    changing = [module._buffers for module in modules if id(module._buffers) in _changing[module]]
    found += [
        buffer for buffers in changing for buffer in buffers.values() if buffer is not None and _has_value(buffer)
    ]
    _let_go(list({id(tensor): tensor for tensor in found}.values()))


def _let_go(tensors: Sequence[Tensor]) -> None:
    """Exchanges what tensors without gradient refer to, where a graph has saved it; not if others share the memory."""
    bases = {id(tensor._base) for tensor in tensors if tensor._is_view()}
    for tensor in tensors:
        is_alone = not tensor._is_view() and id(tensor) not in bases
        if is_alone and not tensor.requires_grad and tensor._use_count() > 1:  # type: ignore[attr-defined]
            torch._C._swap_tensor_impl(tensor, tensor.detach().clone())


def _kept(modules: Iterable[nn.Module], all_values: bool = False) -> _Keeper:
    keeper = _Keeper(all_values)
    for module in modules:
        keeper.module = module
        keeper.changing = _changing.get(module, _NOTHING) if _changing else _NOTHING
        keeper.keep(module, _DEPTH)
        for hooks in [found for name in _HOOKS if (found := vars(module).get(name))]:
            for hook in hooks.values():
                keeper.keep(hook, _DEPTH)
        if all_values or keeper.changing:
            keeper.keep_parameters(module)
            keeper.keep_class(type(module))
    keeper.module, keeper.changing = None, _NOTHING
    for hooks in _HOOKS_OF_ALL:
        for hook in hooks.values():
            if not getattr(hook, "__module__", "").startswith(_PACKAGE):
                keeper.keep(hook, _DEPTH)
    return keeper


class _Found(NamedTuple):
    """A tensor or array.

    Attributes:
        module: from which it was reached.
        holders: the ``id`` of what holds it, and of the class by which that was reached.
        held: the tensor or array.
    """

    module: nn.Module | None
    holders: tuple[int, ...]
    held: Any

    def remember(self) -> None:
        """It is changed in place."""
        if self.module is not None:
            _changing.setdefault(self.module, set()).update(self.holders)


@contextmanager
def _restored(keeper: _Keeper) -> Iterator[None]:
    try:
        yield
    finally:
        for step in reversed(keeper.restore):
            step()


class _Keeper:
    """Looks at each object once, and knows how to put it back.

    Args:
        all_values: whether it finds all tensors and arrays; False: those that are known to change.

    Attributes:
        restore: functions that put things back, the last one first.
        values: the tensors and arrays, each once.
        generators: of random numbers, each once.
        module: from which one looks now.
        changing: what holds those that are known to change.
    """

    def __init__(self, all_values: bool = False) -> None:
        self.restore: list[Callable[[], Any]] = []
        self.values: list[_Found] = []
        self.generators: list[Any] = []
        self.module: nn.Module | None = None
        self.changing: Set[int] = _NOTHING
        self._seen: dict[int, Any] = {}
        self._all_values = all_values
        self._classes: tuple[int, ...] = ()

    def generators_to_now(self) -> list[Callable[[], Any]]:
        """Functions that give the generators the states that they have now."""
        return [partial(set_state, generator, state_of(generator)) for generator in self.generators]

    def keep_parameters(self, module: nn.Module) -> None:
        """Finds the parameters that a module holds itself."""
        if _is_open(module):
            self._find_values(module._parameters, module._parameters.values())

    def keep_class(self, kind: type) -> None:
        """Keeps what the methods of a user's own class reach, if a tensor among it changes."""
        for owner in [] if kind.__module__.startswith("torch.") else kind.__mro__:
            if owner is nn.Module:
                break
            if id(owner) in self._seen or not (self._all_values or id(owner) in self.changing):
                continue
            self._seen[id(owner)] = owner
            self._classes = (id(owner),)
            members = [getattr(member, "fget", member) for member in vars(owner).values()]
            self._find_values(owner, members)
            self._keep_all(members, _DEPTH)
            self._classes = ()

    def _find_values(self, holder: Any, held: Iterable[Any]) -> None:
        if self._all_values or id(holder) in self.changing:
            for value in held:
                if id(value) not in self._seen and _has_value(value):
                    self._seen[id(value)] = value
                    self.values.append(_Found(self.module, (id(holder), *self._classes), value))

    def keep(self, value: Any, depth: int) -> None:
        """Keeps what ``value`` holds, and what that holds, down to a depth."""
        if depth < 0 or value is None or isinstance(value, _LEAVES) or id(value) in self._seen:
            return
        self._seen[id(value)] = value  # held, so that its number stays its own
        if isinstance(value, list | dict | set | deque):
            self._keep_container(value, depth)
        elif isinstance(value, tuple):
            self._find_values(value, value)
            self._keep_all(value, depth)
        elif isinstance(value, GENERATORS):
            self.generators.append(value)
        elif isinstance(value, partial):
            self._keep_all((value.func, *value.args, *value.keywords.values()), depth)
        elif isinstance(value, MethodType):
            self._keep_all((value.__func__, value.__self__), depth)
        elif isinstance(value, FunctionType):
            self._keep_function(value, depth)
        elif isinstance(vars(value) if hasattr(value, "__dict__") else None, dict):
            self._keep_attributes(value, depth)

    def _keep_all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            kind = type(value)
            if kind not in _PLAIN and not (kind is tuple and all(type(part) in _SIMPLE for part in value)):
                self.keep(value, depth - 1)

    def _keep_attributes(self, owner: Any, depth: int) -> None:
        held, left_out = vars(owner), OWN if isinstance(owner, nn.Module) else frozenset()
        kept = {name: held[name] for name in held.keys() - left_out}
        self.restore.append(partial(restore_attributes, held, kept, left_out))
        self._find_values(owner, kept.values())
        self._keep_all(kept.values(), depth)

    def _keep_container(self, value: Any, depth: int) -> None:
        kind: Any = next(kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(value, kind))
        before = list(value.items()) if isinstance(value, dict) else list(value)

        def put_back() -> None:  # by the class of Python, as a class of one's own may count, or refuse to be changed
            now = list(value.items()) if isinstance(value, dict) else list(value)
            if len(now) == len(before) and all(_same(*pair) for pair in zip(now, before, strict=True)):
                return
            kind.clear(value)
            if isinstance(value, dict):
                for key, item in before:
                    kind.__setitem__(value, key, item)
            else:
                (kind.update if isinstance(value, set) else kind.extend)(value, before)

        self.restore.append(put_back)
        items = [pair[1] for pair in before] if isinstance(value, dict) else before
        self._find_values(value, items)
        self._keep_all(items, depth)

    def _keep_function(self, function: FunctionType, depth: int) -> None:
        if vars(function):
            self._keep_attributes(function, depth)
        for cell in function.__closure__ or ():
            self._keep_cell(cell, depth)
        self._keep_all((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()), depth)
        for name in function.__code__.co_names:
            if name in function.__globals__:
                value = function.__globals__[name]
                self.restore.append(partial(function.__globals__.__setitem__, name, value))
                self._find_values(function, [value])
                self.keep(value, depth - 1)

    def _keep_cell(self, cell: CellType, depth: int) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # it is empty
            return
        self.restore.append(partial(setattr, cell, "cell_contents", value))
        self._find_values(cell, [value])
        self.keep(value, depth - 1)


_SIMPLE = {type(None), bool, int, float, str, torch.dtype, torch.device}
_PLAIN = {*_SIMPLE, Tensor, nn.Parameter, numpy.ndarray}  # most attributes are, so they go first
_LEAVES = (Tensor, ModuleType, type, str, bytes, int, float, complex, random.SystemRandom)


def restore_attributes(held: dict[str, Any], kept: dict[str, Any], left_out: frozenset[str]) -> None:
    """Gives the attributes ``held`` of an object again what they were, but for some."""
    for name in held.keys() - kept.keys() - left_out:
        del held[name]
    held.update(kept)


def _same(one: Any, other: Any) -> bool:
    """Whether two items are one object, or pairs of a key and one object."""
    return one is other or (
        isinstance(one, tuple) and len(one) == len(other) == 2 and one[1] is other[1] and one[0] is other[0]
    )


def _is_open(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


def _is_torch_s(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _has_value(held: Any) -> bool:
    """Whether it is a tensor or array whose values can be copied, and may be changed in place."""
    if isinstance(held, numpy.ndarray):
        return held.dtype.kind in "biufc" and held.flags.writeable
    if type(held) not in (Tensor, nn.Parameter) or is_lazy(held) or held.is_inference():
        return False
    if held.layout != torch.strided or held.is_quantized or held.device.type == "meta":
        return False
    if 0 in [step for step, size in zip(held.stride(), held.shape, strict=True) if size > 1]:
        return False  # an expanded tensor, which torch does not change in place
    try:
        return held.untyped_storage().nbytes() >= held.numel() * held.element_size()  # a sharded model frees storages
    except NotImplementedError:  # it stands for tensors of several models or rows, inside of torch.func.vmap
        return False


def _memory(held: Any) -> int:
    """Where its values lie; 0 where they cannot be copied, see `_has_value`."""
    if not _has_value(held):
        return 0
    return held.ctypes.data if isinstance(held, numpy.ndarray) else held.untyped_storage().data_ptr()


def _copied(held: Any, to_host: bool) -> Any:
    """A copy of its values. That of all values is not to fill the device."""
    if isinstance(held, numpy.ndarray):
        return held.copy()
    return held.detach().to("cpu", copy=True) if to_host else held.detach().clone()


def _differs(held: Any, copied: Any) -> bool:
    if isinstance(held, numpy.ndarray):
        return not numpy.array_equal(held, copied)
    if not _has_value(held) or (held.shape, held.dtype) != (copied.shape, copied.dtype):
        return True
    return not torch.equal(held.detach(), copied.to(held.device))


def _write(held: Any, copied: Any) -> None:
    if isinstance(held, numpy.ndarray):
        held[...] = copied
    elif held.shape == copied.shape:
        held.data.copy_(copied)
    else:
        held.data = copied.to(held.device)
