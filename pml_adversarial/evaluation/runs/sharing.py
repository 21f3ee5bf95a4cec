"""Processes of ``torch.distributed`` that share an evaluation. All of them end with the same results.

They talk through a group of their own, of the backend gloo: a batch may take a process longer than the time after which
the user's group gives up, and the results, which are on the CPU, need no device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import InputError
from ...training.distributed import portable, raise_first, rank, world_size
from ...training.nested import mapped

logger = logging.getLogger("pml_adversarial")

T = TypeVar("T")

PATIENCE = 600.0  #: Seconds in which all processes have to come.
_WARN_AFTER = 20.0  # seconds in which they usually come
_LONGEST = timedelta(days=30)  # that one process waits for a batch of another
_WHOLE = "Expected a model that each process holds as a whole; load its full state dict into one that is not sharded."
_TALKING = {
    "DistributedDataParallel": "Expected the model inside of it: use its .module.",
    "FullyShardedDataParallel": _WHOLE,
    "FSDPModule": _WHOLE,
}
_KEY = "pml_adversarial/evaluation"


class Ranks:
    """The processes that share an evaluation. Without a group it is this process alone.

    Whatever one process tells, all of them ask for, in the same order. If one of them fails in between, the others
    learn of it the next time that they ask, and raise its error.

    Attributes:
        number: of this process.
        count: of all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.number, self.count = (0, 1) if group is None else (rank(), world_size())
        self._failed = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads and writes files, and shows progress."""
        return self.number == 0

    def tell(self, value: T | None, source: int = 0) -> T:
        """The value of the process ``source``, in all processes; its tensors come on the CPU."""
        if self.count == 1:
            return cast(T, value)
        self.meet()
        told = [moved(value, torch.device("cpu")) if source == self.number else None]
        with _all_here():
            dist.broadcast_object_list(told, src=source, group=self._group)
        return cast(T, told[0])

    def own(self, numbers: Sequence[int]) -> Sequence[int]:
        """Those that `share` lets this process make."""
        return numbers[self.number :: self.count]

    def share(self, numbers: Sequence[int], make: Callable[[int], T]) -> Iterator[T]:
        """What ``make`` makes of each number, in order. Of n processes, each makes every n-th."""
        for start in range(0, len(numbers), self.count):
            some = numbers[start : start + self.count]
            own = make(some[self.number]) if self.number < len(some) else None
            for source in range(len(some)):
                yield self.tell(own if source == self.number else None, source)

    def meet(self, error: Exception | None = None) -> None:
        """Waits for all processes; an error that one of them tells is raised in all others."""
        if self.count == 1 or self._failed:
            return
        told: list[Any] = [None] * self.count
        self._failed = True  # if a process is gone, nothing can be told any more
        with _all_here():
            dist.all_gather_object(told, (None, portable(error)), group=self._group)
        if error is None:
            raise_first(None, told)
            self._failed = False


@contextmanager
def _all_here() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "Another process of this evaluation is gone; its output says why. Finished batches are kept if there is a "
            "folder, resume=..."
        ) from error


@contextmanager
def sharing(shared: bool = True) -> Iterator[Ranks]:
    """All processes of the default process group, if there is one; this process alone, if it should not be shared.

    Raises:
        InputError: other processes did not come.
    """
    if not shared or world_size() == 1:
        yield Ranks()
        return
    _wait_for_all()
    group = dist.new_group(timeout=_LONGEST, backend="gloo")
    ranks = Ranks(group)
    try:
        yield ranks
        ranks.meet()
    except Exception as error:
        with suppress(RuntimeError):  # another process is gone; this one raises its own error
            ranks.meet(error)
        raise
    finally:
        dist.destroy_process_group(group)


class _Calls:
    """How many evaluations this process has shared. All processes have shared as many."""

    number = 0


def _wait_for_all() -> None:
    """Before it, nothing is sent that a process which does something else could take for its own."""
    store, key = dist.distributed_c10d._get_default_store(), f"{_KEY}/{_Calls.number}"
    start, is_warned = time.monotonic(), False
    store.add(key, 1)
    while (present := int(store.add(key, 0))) < world_size():
        waited = time.monotonic() - start
        if waited > PATIENCE:
            if int(store.add(key, -1)) + 1 == world_size():  # the last one came just now
                store.add(key, 1)
                break
            raise InputError(
                f"Of {world_size()} processes, {present} came to this evaluation within {PATIENCE:.0f} s. Expected "
                "all, as they share it. Call it in each of them, or with share=False in one."
            )
        if waited > _WARN_AFTER and not is_warned:
            is_warned = True
            logger.warning(
                "The evaluation waits for the other processes of torch.distributed: %d of %d are here. If they are not "
                "to come, use share=False.",
                present,
                world_size(),
            )
        time.sleep(0.01)
    _Calls.number += 1


def check_silent(modules: Iterable[nn.Module]) -> None:
    """Refuses modules that talk to other processes whenever they are called; those may not call them at that time."""
    if world_size() == 1:
        return
    for module in (inner for outer in modules for inner in outer.modules()):
        names = {kind.__name__ for kind in type(module).__mro__} & _TALKING.keys()
        if names:
            name = names.pop()
            raise InputError(
                f"The model runs {name}, which talks to other processes in each call, while each process attacks "
                f"queries of its own. {_TALKING[name]}"
            )


def moved(value: T, device: torch.device) -> T:
    """A nested value with its tensors on another device."""
    return cast(T, mapped(value, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf))
