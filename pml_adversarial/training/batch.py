"""What flows through one training step: a `Batch` in, an `Adversarial` out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .tuples import IndicesTuple


@dataclass(frozen=True, eq=False)
class Batch:
    """The moment at which the loss was called, frozen.

    Reference embeddings, if any, follow the queries as further rows, and ``indices_tuple`` counts in these
    rows: one address space for everything that can be perturbed or held fixed.

    Where several processes share one batch, it holds the rows of all of them in rank order (the queries of all
    ranks, then the references), the same on each, and only ``inputs`` are those of this process.

    Attributes:
        inputs: ``(P, ...)`` in [0, 1], what gave the first ``P`` rows. ``P < N`` where the inputs of the
            reference embeddings are not known. Of several processes, each holds those of its own rows.
        embeddings: ``(N, D)`` with gradient, as the caller computed them.
        context: ``(N, D)`` detached, as the attack sees the same rows (the model's eval mode).
        labels: ``(N,)``, or None for a loss without labels.
        indices_tuple: the caller's tuples, or None.
        num_queries: how many of the rows are queries; ``N`` when there is no reference.
        strength: share of the attack's full budget to be spent in this step, in [0, 1].
        shared_labels: whether one tensor was given as ``labels`` and ``ref_labels``. PML then takes row i of the
            reference for another view of query i and leaves the two out of each other's tuples.
        columns: the embeddings are these columns of what the model returns.
        world_size: how many processes share the batch, with as many rows each.
        rank: which of them this one is.
    """

    inputs: Tensor
    embeddings: Tensor
    context: Tensor
    labels: Tensor | None
    indices_tuple: IndicesTuple | None
    num_queries: int
    strength: float = 1.0
    shared_labels: bool = False
    columns: slice = field(default_factory=lambda: slice(None))
    world_size: int = 1
    rank: int = 0

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def num_attackable(self) -> int:
        """How many rows, from the first on, have inputs that some process knows: those that a plan may perturb."""
        return self.world_size * len(self.inputs)

    @property
    def own_sizes(self) -> tuple[int, int]:
        """How many queries, and how many of the reference, belong to each process."""
        return self.num_queries // self.world_size, (len(self) - self.num_queries) // self.world_size

    def owners(self, rows: Tensor) -> Tensor:
        """``(M,)`` the rank of the process that holds the inputs of each row."""
        queries, reference = self.own_sizes
        return torch.where(
            rows < self.num_queries, rows // max(queries, 1), self._in_reference(rows) // max(reference, 1)
        )

    def own(self, rows: Tensor) -> Tensor:
        """``(K,)`` where in ``rows`` the rows stand whose inputs this process holds: all of them if it is alone."""
        if self.world_size == 1:
            return torch.arange(len(rows), device=rows.device)
        return (self.owners(rows) == self.rank).nonzero().flatten()

    def inputs_of(self, rows: Tensor) -> Tensor:
        """``(K, ...)`` the inputs of rows that are this process's own."""
        return self.inputs[self.places_of(rows)]

    def places_of(self, rows: Tensor) -> Tensor:
        """``(K,)`` where among ``inputs`` those of rows that are this process's own stand."""
        queries, reference = self.own_sizes
        in_reference = self._in_reference(rows) - self.rank * reference + queries
        return torch.where(rows < self.num_queries, rows - self.rank * queries, in_reference)

    def _in_reference(self, rows: Tensor) -> Tensor:
        return rows - self.num_queries


@dataclass(frozen=True, eq=False)
class Adversarial:
    """What an attack made of the ``M`` rows of a plan, re-embedded with gradient.

    All but the embeddings is of the ``K`` copies that are this process's own, ``batch.own(plan.rows)``: all ``M``
    of them, unless several processes share the batch. Then each attacked copies of its own rows, and ``K`` may be 0.

    Attributes:
        inputs: ``(K, ...)`` in [0, 1].
        embeddings: ``(M, D)`` in the model's own mode; own copies carry gradient.
        score_before: ``(K,)`` the score of the clean rows (a scalar score is repeated).
        score_after: ``(K,)`` the score of the perturbed rows.
        zero_gradient: ``(K,)`` bool, rows whose input gradient was zero in every step that was watched.
        seconds: wall-clock seconds spent in the attack.
    """

    inputs: Tensor
    embeddings: Tensor
    score_before: Tensor
    score_after: Tensor
    zero_gradient: Tensor
    seconds: float
