"""What flows through one training step: a `Batch` in, an `Adversarial` out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

IndicesTuple = tuple[Tensor, ...]
"""PML's tuples: triplets ``(a, p, n)`` or pairs ``(a1, p, a2, n)``, one long tensor per member."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The moment at which the loss was called, frozen.

    Reference embeddings, if any, follow the queries as further rows, and ``indices_tuple`` counts in these
    rows: one address space for everything that can be perturbed or held fixed.

    Attributes:
        inputs: ``(P, ...)`` in [0, 1], what gave the first ``P`` rows. ``P < N`` where the inputs of the
            reference embeddings are not known.
        embeddings: ``(N, D)`` with gradient, as the caller computed them.
        context: ``(N, D)`` detached, as the attack sees the same rows (the model's eval mode).
        labels: ``(N,)``, or None for a loss without labels.
        indices_tuple: the caller's tuples, or None.
        num_queries: how many of the rows are queries; ``N`` when there is no reference.
        strength: share of the attack's full budget to be spent in this step, in [0, 1].
        shared_labels: whether one tensor was given as ``labels`` and ``ref_labels``. PML then takes row i of the
            reference for another view of query i and leaves the two out of each other's tuples.
        columns: the embeddings are these columns of what the model returns.
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

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True, eq=False)
class Adversarial:
    """What an attack made of the ``M`` rows of a plan, re-embedded with gradient.

    Attributes:
        inputs: ``(M, ...)`` in [0, 1].
        embeddings: ``(M, D)`` with gradient, in the model's own mode.
        score_before: ``(M,)`` the score of the clean rows (a scalar score is repeated).
        score_after: ``(M,)`` the score of the perturbed rows.
        zero_gradient: ``(M,)`` bool, rows whose input gradient was zero in every step that was watched.
        seconds: wall-clock seconds spent in the attack.
    """

    inputs: Tensor
    embeddings: Tensor
    score_before: Tensor
    score_after: Tensor
    zero_gradient: Tensor
    seconds: float
