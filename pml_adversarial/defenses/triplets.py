"""What the methods on triplets share: who is copied, and where the embeddings of the members come from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.functional import normalize, pairwise_distance

from ..batch import Batch, IndicesTuple
from ..plan import Plan, plan_tuples


def perturb_members(triplets: IndicesTuple, roles: Iterable[str], batch: Batch) -> Plan:
    """Each triplet gets copies of its own for these roles, and the loss sees the rows that triplets name, no others."""
    return plan_tuples(triplets, roles, len(batch)).only_named()


def distance(left: Tensor, right: Tensor) -> Tensor:
    """``(T,)`` Euclidean distances in [0, 2] between embeddings ``(T, D)`` scaled to unit length."""
    return pairwise_distance(normalize(left), normalize(right))
