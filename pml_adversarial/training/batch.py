"""What flows through one training step: a `Batch` goes in, an `Adversarial` comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .replay import Replay
from .tuples import IndicesTuple

T = TypeVar("T")

_NOT_MEASURED = torch.empty(0)


class CallSignature(NamedTuple):
    """How a loss is called; what it can take may differ from one way to another.

    Attributes:
        members: 3 for triplets, 4 for pairs, None without tuples.
        has_reference: whether there are reference embeddings.
        shared_labels: whether queries and reference have one tensor of labels.
        without_labels: whether there are no labels.
    """

    members: int | None
    has_reference: bool
    shared_labels: bool
    without_labels: bool


@dataclass(frozen=True, eq=False)
class Batch:
    """Everything that the loss was called with, frozen for one step.

    Reference embeddings, if there are any, follow the queries as further rows, and ``indices_tuple`` counts in these
    rows. So one row number names everything that can be perturbed or held fixed.

    This class is the batch of one process. `distributed.JointBatch` is the batch that several processes share.

    Attributes:
        inputs: ``(P, ...)`` in [0, 1], the inputs of ``P`` of the rows. ``P < N`` where those of others, such as the
            reference embeddings, are not known. In a joint batch, each process holds the inputs of its own rows.
        embeddings: ``(N, D)`` with gradient, as the caller computed them.
        context: ``(N, D)`` the same rows as the attack sees them: detached, and of the model in eval mode.
        labels: ``(N,)``, or None for a loss without labels.
        indices_tuple: the caller's tuples, or None.
        num_queries: how many of the rows are queries; ``N`` where there is no reference.
        strength: share of the attack's full budget that this step may spend, in [0, 1].
        shared_labels: whether one tensor was given as ``labels`` and ``ref_labels``. PML then takes row i of the
            reference for another view of query i, and puts the two in no tuple together.
        replay: the way from inputs to embeddings.
        known_rows: ``(P,)`` the rows with known inputs, in order; None where they are the first ones.
        num_rows: ``N``.
        call_signature: how the loss is called.
    """

    inputs: Tensor
    embeddings: Tensor
    context: Tensor
    labels: Tensor | None
    indices_tuple: IndicesTuple | None
    num_queries: int
    strength: float = 1.0
    shared_labels: bool = False
    replay: Replay = None  # type: ignore[assignment]  # a batch that is not perturbed needs none
    known_rows: Tensor | None = None
    num_rows: int = field(init=False)
    call_signature: CallSignature = field(init=False)

    def __post_init__(self) -> None:
        num_rows = len(self.embeddings)
        members = None if self.indices_tuple is None else len(self.indices_tuple)
        has_reference = self.num_queries < num_rows
        object.__setattr__(self, "num_rows", num_rows)
        signature = CallSignature(members, has_reference, self.shared_labels, self.labels is None)
        object.__setattr__(self, "call_signature", signature)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_processes(self) -> int:
        """How many processes share the batch."""
        return 1

    @property
    def num_attackable(self) -> int:
        """How many rows have known inputs. A plan may perturb these rows only, see `can_be_perturbed`."""
        return len(self.inputs)

    def can_be_perturbed(self, rows: Tensor) -> Tensor:
        """``(K,)`` bool: which of the rows ``(K,)`` have known inputs."""
        return rows < self.num_attackable if self.known_rows is None else torch.isin(rows, self.known_rows)

    def own(self, values: Tensor, rows: Tensor) -> Tensor:
        """Of values ``(M, ...)``, one for each of some batch rows, those of this process's own rows ``(K, ...)``.

        A process that is alone holds the inputs of all rows, so all rows are its own.

        Args:
            values: ``(M, ...)``.
            rows: ``(M,)`` rows of the batch.
        """
        return values

    def places_of(self, rows: Tensor) -> Tensor:
        """``(K,)`` places in ``inputs`` of rows that are this process's own."""
        return rows if self.known_rows is None else torch.searchsorted(self.known_rows, rows)

    def local(self, rows: Tensor) -> Tensor:
        """``(K,)`` rows that are this process's own, as its ``replay`` counts them."""
        return rows

    def inputs_of(self, rows: Tensor) -> Tensor:
        """``(K, ...)`` the inputs of rows that are this process's own."""
        return self.inputs[self.places_of(rows)]

    def decide(self, work: Callable[[], T]) -> T:
        """The result of ``work``. In a joint batch, the first process does the work for all of them."""
        return work()

    def agree(self, work: Callable[[], T]) -> T:
        """The result of ``work``. In a joint batch, an error in one process is raised in all of them."""
        return work()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """``(N, ...)`` one row for each row with known inputs. In a joint batch, of all processes."""
        return rows

    def gather_copies(self, copies: Tensor, rows: Tensor) -> Tensor:
        """``(M, D)`` the copies of batch rows ``rows`` ``(M,)``. In a joint batch, of all processes."""
        return copies


@dataclass(frozen=True, eq=False)
class Adversarial:
    """What an attack made of the ``M`` rows of a plan, embedded again with gradient.

    ``K`` is ``M``, unless several processes share the batch. Then each process attacks the ``K`` copies of its own
    rows, ``batch.own(plan.rows, plan.rows)``, and only ``embeddings`` hold the copies of all processes.

    Attributes:
        inputs: ``(K, ...)`` in [0, 1].
        clean_inputs: ``(K, ...)`` the inputs of the same rows before the attack.
        embeddings: ``(M, D)`` of the model in its own mode. Own copies carry gradient.
        zero_gradient: ``(K,)`` bool, rows whose gradient with respect to the input was zero in every attack step.
        seconds: wall-clock seconds that the attack took.
        score_before: ``(K,)`` the score of the clean rows. A scalar score is repeated.
        score_after: ``(K,)`` the score of the perturbed rows.
        loss_before: what training would minimise if no copy were perturbed; None for a miner.
    """

    inputs: Tensor
    clean_inputs: Tensor
    embeddings: Tensor
    zero_gradient: Tensor
    seconds: float
    score_before: Tensor = _NOT_MEASURED
    score_after: Tensor = _NOT_MEASURED
    loss_before: Tensor | None = None
