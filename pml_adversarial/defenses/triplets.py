"""What the methods on triplets share: who is copied, and where the embeddings of the members come from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pairwise_distance

from ..errors import PlanError
from ..training.batch import Batch
from ..training.plan import Plan, plan_tuples
from ..training.tuples import IndicesTuple
from .rows import on_sphere


def perturb_members(triplets: IndicesTuple, roles: Iterable[str], batch: Batch) -> Plan:
    """Each triplet gets copies of its own for these roles, and the loss sees the rows that triplets name, no others.

    Raises:
        PlanError: the inputs of a member that is to be perturbed are not known.
    """
    plan = plan_tuples(triplets, roles, len(batch)).only_named()
    if batch.num_attackable < len(batch) and len(plan) and int(plan.rows.max()) >= batch.num_attackable:
        raise PlanError(
            f"Triplets have members in ref_emb, which no watched model produced with gradient, so {', '.join(roles)} "
            "cannot all be perturbed. Compute ref_emb with the watched model, or leave it out."
        )
    return plan


def distance(left: Tensor, right: Tensor) -> Tensor:
    """``(T,)`` Euclidean distances in [0, 2] between embeddings ``(T, D)`` scaled to unit length.

    In single precision at least: in mixed precision close embeddings would all have the same one.
    """
    return pairwise_distance(on_sphere(left), on_sphere(right))


def hardness(anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """``(T,)`` how much further the positives are than the negatives; above 0 where a triplet is wrongly ordered."""
    return distance(anchors, positives) - distance(anchors, negatives)


def three_members(plan: Plan, clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows ``(T, D)`` of the anchors, positives and negatives, see `Plan.members`.

    Raises:
        PlanError: the plan is of pairs, or leaves the tuples to the loss.
    """
    members = plan.members(clean, adversarial)
    if len(members) != 3:
        raise PlanError(
            "The plan, made by another plugin, has pairs; expected triplets. Name the method on triplets first."
        )
    anchors, positives, negatives = members
    return anchors, positives, negatives


def per_copy(plan: Plan, values: Tensor, num_rows: int) -> Tensor:
    """``(M,)`` for each copy the values ``(T,)`` of the triplets in which it stands, summed.

    Args:
        plan: with triplets.
        values: one per triplet.
        num_rows: ``N``, the rows of the batch.
    """
    found = values.new_zeros(len(plan) + 1)  # the last one: rows that are no copies
    for member in plan.indices_tuple or ():
        address = plan.pool_indices[member]
        found = found.index_add(0, torch.where(address < num_rows, len(plan), address - num_rows), values)
    return found[:-1]
