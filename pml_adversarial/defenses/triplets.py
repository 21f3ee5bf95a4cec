"""What the methods on triplets share: a plan with copies of members, their embeddings, distances and hardness.

A loss that looks at rows beyond its triplets sees all copies, also several of one row. With reference rows, the loss is
taken on the members without a reference. Where processes share a batch, each perturbs its own copies while those of the
others stay clean.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pairwise_distance

from ..errors import PlanError
from ..training.batch import Batch
from ..training.numeric import unit_length
from ..training.plan import Plan, plan_tuples
from ..training.tuples import IndicesTuple


def perturb_members(triplets: IndicesTuple, roles: Iterable[str], batch: Batch) -> Plan:
    """A plan in which each triplet has its own copies of these roles. The loss sees only rows that triplets name."""
    plan = plan_tuples(triplets, roles, len(batch)).only_named()
    if batch.num_attackable < len(batch) and len(plan) and int(plan.rows.max()) >= batch.num_attackable:
        raise PlanError(
            f"Triplets have members in ref_emb, whose inputs are not known, so {', '.join(roles)} cannot all be "
            "perturbed. Compute ref_emb with the watched model and with gradient, or leave it out."
        )
    return plan


def distance(left: Tensor, right: Tensor) -> Tensor:
    """``(T,)`` Euclidean distances in [0, 2] between embeddings ``(T, D)`` scaled to unit length.

    They are computed in single precision at least; in half precision, close embeddings would be equally far.
    """
    return pairwise_distance(unit_length(left), unit_length(right))


def hardness(anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """``(T,)`` distance to the positive minus distance to the negative; above 0 where the negative is nearer."""
    return distance(anchors, positives) - distance(anchors, negatives)


def three_members(plan: Plan, clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings ``(T, D)`` of anchors, positives and negatives, see `Plan.members`; refuses a plan of pairs."""
    members = plan.members(clean, adversarial)
    if len(members) != 3:
        raise PlanError(
            "The plan of another plugin has pairs; expected triplets. Name the method on triplets before that plugin."
        )
    anchors, positives, negatives = members
    return anchors, positives, negatives


def per_copy(plan: Plan, values: Tensor, num_rows: int) -> Tensor:
    """For each copy, the sum ``(M,)`` of the values ``(T,)`` of the triplets in which it stands."""
    found = values.new_zeros(len(plan) + 1)  # the last element collects the rows that are no copies
    for member in plan.indices_tuple or ():
        address = plan.pool_indices[member]
        found = found.index_add(0, torch.where(address < num_rows, len(plan), address - num_rows), values)
    return found[:-1]
