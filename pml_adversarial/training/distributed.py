"""What the other processes hold: rows gathered in rank order, and one outcome, or one error, for all of them.

Everything here is about the default process group of ``torch.distributed``. What is gathered is what the ranks hold;
nothing is sent backward: own rows carry gradient, the others do not, and `DistributedDataParallel` averages.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import AdversarialError
from .batch import Batch

T = TypeVar("T")
U = TypeVar("U")

_PLASTIC_NUMBER_64 = (
    0xC13FA9A902A6328F  # far-apart seeds for neighbouring ranks, and no multiple of a step's own stride
)


@dataclass(frozen=True, eq=False)
class JointBatch(Batch):
    """The batch that several processes share: the union of what they hold, the same in each.

    The queries of all processes come first, in rank order, then their references. Each process holds the inputs of its
    own rows, and attacks these.

    Attributes:
        world_size: how many processes share the batch, with as many rows each.
        rank: number of this process.
    """

    world_size: int = 1
    rank: int = 0

    @property
    def num_processes(self) -> int:
        """How many processes share the batch."""
        return self.world_size

    @property
    def num_attackable(self) -> int:
        """How many rows, from the first on, have inputs that some process knows."""
        return self.world_size * len(self.inputs)

    @property
    def own_sizes(self) -> tuple[int, int]:
        """How many queries, and how many rows of the reference, each process holds."""
        return self.num_queries // self.world_size, (len(self) - self.num_queries) // self.world_size

    def owners(self, rows: Tensor) -> Tensor:
        """``(M,)`` the rank of the process that holds the inputs of each row."""
        queries, reference = self.own_sizes
        in_reference = (rows - self.num_queries) // max(reference, 1)
        return torch.where(rows < self.num_queries, rows // max(queries, 1), in_reference)

    def own(self, values: Tensor, rows: Tensor) -> Tensor:
        """Of values ``(M, ...)``, one for each of some batch rows ``(M,)``, those of this process's own rows."""
        return values[self.owners(rows) == self.rank]

    def places_of(self, rows: Tensor) -> Tensor:
        """``(K,)`` places in ``inputs`` of rows that are this process's own."""
        queries, reference = self.own_sizes
        in_reference = rows - self.num_queries - self.rank * reference + queries
        return torch.where(rows < self.num_queries, rows - self.rank * queries, in_reference)

    def decide(self, work: Callable[[], Any]) -> Any:
        """The result of ``work`` in the first process, for all of them. It has to have a method ``to(device)``."""
        return decide(lambda: work().to("cpu")).to(self.embeddings.device)

    def agree(self, work: Callable[[], T]) -> T:
        """The result of ``work`` in this process. An error in one process is raised in all of them."""
        return agree(work, lambda _: None)[0]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """``(N, ...)`` the rows with known inputs of all processes, in the order of the batch."""
        queries, _ = self.own_sizes
        return gather_parts(rows, (queries, len(rows) - queries))

    def gather_copies(self, copies: Tensor, rows: Tensor) -> Tensor:
        """``(M, D)`` the copies of batch rows ``rows`` of all processes. Own copies carry gradient."""
        owners = self.owners(rows)
        by_rank = gather_rows(copies, torch.bincount(owners, minlength=self.world_size).tolist())
        return by_rank[owners.argsort(stable=True).argsort()]


def world_size() -> int:
    """How many processes there are; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 where nothing is distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def seed_of_rank(seed: int) -> int:
    """A seed of this rank's own; ``seed`` itself for a single process."""
    return seed if world_size() == 1 else (seed + (rank() + 1) * _PLASTIC_NUMBER_64) % 2**63


def gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """The rows of all ranks in rank order; own rows carry gradient.

    Args:
        rows: ``(K, ...)``, of one type and of the same further dimensions on all ranks.
        counts: how many rows each rank gives; None: all as many as this one.

    Returns:
        ``(sum of counts, ...)``.
    """
    counts = [len(rows)] * world_size() if counts is None else counts
    sent = rows.detach().new_zeros(max(counts), *rows.shape[1:])
    sent[: len(rows)] = rows.detach()
    received = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(received, sent)
    parts = [part[:count] for part, count in zip(received, counts, strict=True)]
    parts[rank()] = rows
    return torch.cat(parts)


def gather_parts(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all ranks, part by part: first the first part of each rank, then the second.

    Args:
        rows: ``(sum of sizes, ...)``, such as queries and reference; as many on each rank.
        sizes: how many rows each part has.

    Returns:
        ``(world size * sum of sizes, ...)``; own rows carry gradient.
    """
    by_rank = gather_rows(rows).unflatten(0, (world_size(), len(rows)))
    return torch.cat([part.flatten(0, 1) for part in by_rank.split(list(sizes), 1)])


def own_first(rows: Tensor, per_rank: int) -> Tensor:
    """Row numbers in rank order as PML's distributed wrappers number them: own rows, then the others in rank order.

    Args:
        rows: numbers below ``world size * per_rank``.
        per_rank: how many rows each rank holds.
    """
    own = rank() * per_rank
    numbers = torch.where(rows < own, rows + per_rank, rows)
    return torch.where((rows >= own) & (rows < own + per_rank), rows - own, numbers)


def agree(work: Callable[[], T], tell: Callable[[T], U]) -> tuple[T, list[U]]:
    """Runs ``work`` on each rank; an error on one of them is raised on all, so that nobody waits for it.

    Args:
        work: uses no collective.
        tell: what of the result the other ranks learn, as an object that can be pickled.

    Returns:
        The result of this rank, and what each rank told.
    """
    result, error = _attempt(work)
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, (tell(cast(T, result)) if error is None else None, _portable(error)))
    if error is not None:
        raise error
    for number, (_, other) in enumerate(told):
        if other is not None:
            raise _from_rank(number, other)
    return cast(T, result), [said for said, _ in told]


def decide(work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0 alone; its result, or its error, is that of all ranks.

    Args:
        work: uses no collective, and gives something that can be pickled, with tensors on the CPU.
    """
    result, error = _attempt(work) if rank() == 0 else (None, None)
    said: list[Any] = [(result, _portable(error))]
    dist.broadcast_object_list(said, src=0)
    if error is not None:
        raise error
    decided, other = said[0]
    if other is not None:
        raise _from_rank(0, other)
    return cast(T, decided)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # to be raised on all ranks
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """The error if it survives the journey to another process; else a plain one that tells of it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception of somebody else does when it is pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _from_rank(number: int, error: Exception) -> Exception:
    return type(error)(f"Rank {number}: {error}") if isinstance(error, AdversarialError) else error
