"""Several processes share a batch: rows are gathered in rank order, and decisions and errors are the same on all ranks.

The process group is the default one of ``torch.distributed``. Of gathered rows only those of this rank carry gradient;
`DistributedDataParallel` averages the gradients.
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

_PLASTIC_NUMBER_64 = 0xC13FA9A902A6328F  # seeds of neighbouring ranks are far apart, by no multiple of a step's stride


@dataclass(frozen=True, eq=False)
class JointBatch(Batch):
    """The union of what ``world_size`` processes hold, as many rows each; the same in each, but for its own inputs.

    The queries of all processes come first, in rank order, then their references. Each process attacks its own rows.
    """

    world_size: int = 1
    rank: int = 0

    @property
    def num_processes(self) -> int:
        """How many processes share the batch."""
        return self.world_size

    @property
    def num_attackable(self) -> int:
        """As in `Batch`: some process knows the inputs of these rows."""
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
        """As in `Batch`."""
        return values[self.owners(rows) == self.rank]

    def places_of(self, rows: Tensor) -> Tensor:
        """As in `Batch`."""
        queries, reference = self.own_sizes
        in_reference = rows - self.num_queries - self.rank * reference + queries
        return torch.where(rows < self.num_queries, rows - self.rank * queries, in_reference)

    def local(self, rows: Tensor) -> Tensor:
        """As in `Batch`."""
        return self.places_of(rows)

    def decide(self, work: Callable[[], Any]) -> Any:
        """The result of ``work`` in the first process, for all of them. It has to have a method ``to(device)``."""
        return decide(lambda: work().to("cpu")).to(self.embeddings.device)

    def agree(self, work: Callable[[], T]) -> T:
        """As in `Batch`."""
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
    """The number of processes; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 where there is no process group."""
    return dist.get_rank() if world_size() > 1 else 0


def seed_of_rank(seed: int) -> int:
    """A seed for this rank, different on each rank; ``seed`` itself for a single process."""
    return seed if world_size() == 1 else (seed + (rank() + 1) * _PLASTIC_NUMBER_64) % 2**63


def gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """``(sum of counts, ...)`` the rows of all ranks in rank order.

    Args:
        rows: ``(K, ...)``, on all ranks with the same type and the same dimensions after the first.
        counts: the number of rows of each rank; None: each rank has as many as this one.
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
    """As `gather_rows`, part by part: the first part of every rank, then the second part of every rank.

    Args:
        rows: ``(sum of sizes, ...)``, such as queries and references; the same number on each rank.
        sizes: the number of rows of each part.
    """
    by_rank = gather_rows(rows).unflatten(0, (world_size(), len(rows)))
    return torch.cat([part.flatten(0, 1) for part in by_rank.split(list(sizes), 1)])


def own_first(rows: Tensor, per_rank: int) -> Tensor:
    """Renumbers rows as PML's distributed wrappers number them: own rows first, then the other ranks' in rank order.

    Args:
        rows: row numbers in rank order, below ``world size * per_rank``.
        per_rank: the number of rows that each rank holds.
    """
    own = rank() * per_rank
    numbers = torch.where(rows < own, rows + per_rank, rows)
    return torch.where((rows >= own) & (rows < own + per_rank), rows - own, numbers)


def agree(work: Callable[[], T], tell: Callable[[T], U]) -> tuple[T, list[U]]:
    """Runs ``work`` on each rank. An error on one rank is raised on all ranks, so that no rank waits for another.

    Args:
        work: must not use a collective operation.
        tell: maps the result to what the other ranks learn of it, an object that can be pickled.

    Returns:
        The result of this rank, and what each rank told, in rank order.
    """
    result, error = _attempt(work)
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, (tell(cast(T, result)) if error is None else None, portable(error)))
    raise_first(error, told)
    return cast(T, result), [said for said, _ in told]


def decide(work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0 only. All ranks return its result, or raise its error.

    Args:
        work: must not use a collective operation; returns an object that can be pickled, with tensors on the CPU.
    """
    result, error = _attempt(work) if rank() == 0 else (None, None)
    told: list[Any] = [(result, portable(error))]
    dist.broadcast_object_list(told, src=0)
    raise_first(error, told)
    return cast(T, told[0][0])


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # the caller raises it on all ranks
        return None, error


def portable(error: Exception | None) -> Exception | None:
    """The error itself if it can be sent to another process; otherwise a `RuntimeError` with its name and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling an exception of another library may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def raise_first(own: Exception | None, told: Sequence[tuple[Any, Exception | None]]) -> None:
    """Raises the error of this rank, or else the first that another rank told."""
    if own is not None:
        raise own
    for number, (_, error) in enumerate(told):
        if error is not None:
            raise type(error)(f"Rank {number}: {error}") if isinstance(error, AdversarialError) else error
