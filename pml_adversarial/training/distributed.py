"""Several processes share a batch: rows are gathered in rank order, and decisions and errors are the same on all ranks.

Everything here uses the default process group of ``torch.distributed``. No gradient is communicated here: the rows of
this rank carry gradient, the rows of other ranks do not, and `DistributedDataParallel` averages the gradients.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import AdversarialError

T = TypeVar("T")
U = TypeVar("U")

_PLASTIC_NUMBER_64 = (
    0xC13FA9A902A6328F  # far-apart seeds for neighbouring ranks, and no multiple of a step's own stride
)


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
    """Gathers the rows of all ranks in rank order; the rows of this rank carry gradient.

    Args:
        rows: ``(K, ...)``, on all ranks with the same type and the same dimensions after the first.
        counts: the number of rows of each rank; None: each rank has as many as this one.

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
    """Gathers the rows of all ranks part by part: the first part of every rank, then the second part of every rank.

    Args:
        rows: ``(sum of sizes, ...)``, such as queries and references; the same number on each rank.
        sizes: the number of rows of each part.

    Returns:
        ``(world size * sum of sizes, ...)``; the rows of this rank carry gradient.
    """
    by_rank = gather_rows(rows).unflatten(0, (world_size(), len(rows)))
    return torch.cat([part.flatten(0, 1) for part in by_rank.split(list(sizes), 1)])


def own_first(rows: Tensor, per_rank: int) -> Tensor:
    """Renumbers rows as PML's distributed wrappers number them: own rows first, then the other ranks' in rank order.

    Args:
        rows: row numbers in rank order, below ``world size * per_rank``.
        per_rank: the number of rows that each rank holds.

    Returns:
        The numbers of the same rows, of the same shape.
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
    dist.all_gather_object(told, (tell(cast(T, result)) if error is None else None, _portable(error)))
    if error is not None:
        raise error
    for number, (_, other) in enumerate(told):
        if other is not None:
            raise _from_rank(number, other)
    return cast(T, result), [said for said, _ in told]


def decide(work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0 only. All ranks return its result, or raise its error.

    Args:
        work: must not use a collective operation; returns an object that can be pickled, with tensors on the CPU.
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
    except Exception as error:  # the caller raises it on all ranks
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """The error itself if it can be sent to another process; otherwise a `RuntimeError` with its name and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling an exception of another library may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _from_rank(number: int, error: Exception) -> Exception:
    return type(error)(f"Rank {number}: {error}") if isinstance(error, AdversarialError) else error
