"""Which tuples a loss takes of a batch: the caller's, or those that the loss forms of the labels by itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from ..errors import PlanError
from .batch import Batch
from .plan import Plan, consecutive
from .tuples import IndicesTuple, all_triplets, shift_partners


def own_tuples(wrapped: nn.Module, batch: Batch) -> IndicesTuple | None:
    """The caller's tuples; else all pairs or triplets that the loss forms of the labels; None without labels.

    The tuples count in the rows of the batch, in which the reference stands after the queries.
    """
    if batch.indices_tuple is not None or batch.labels is None:
        return batch.indices_tuple
    labels, ref_labels = batch.labels[: batch.num_queries], batch.labels[batch.num_queries :]
    reference = labels if batch.shared_labels else ref_labels if len(ref_labels) else None
    limit = triplets_per_anchor(wrapped)
    if limit is None:
        tuples = lmu.get_all_pairs_indices(labels, reference)
    elif limit == "all" and reference is None:
        tuples = all_triplets(labels)
    else:
        tuples = lmu.convert_to_triplets(None, labels, reference, t_per_anchor=limit)
    return tuples if reference is None else shift_partners(tuples, batch.num_queries)


def own_triplets(wrapped: nn.Module, batch: Batch) -> IndicesTuple:
    """The caller's triplets, or all triplets of the caller's pairs or of the labels, over the rows of the batch.

    Raises:
        PlanError: there are neither tuples nor labels.
    """
    tuples = own_tuples(wrapped, batch)
    if tuples is None:
        raise PlanError("There are neither labels nor tuples, so no triplets; expected loss_func(embeddings, labels).")
    return tuple(lmu.convert_to_triplets(tuples, batch.labels))


def own_partners(wrapped: nn.Module, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Which rows share a pair in `own_tuples`, as two masks instead of a list of tuples, which may be long.

    Returns:
        Two symmetric bool masks ``(N, N)``: rows that share a positive pair, and rows that share a negative one. None
        where only the list of tuples tells: the caller gave tuples, there are no labels, or the loss draws tuples at
        random.
    """
    if not _takes_all(wrapped, batch) or batch.labels is None:
        return None
    same = batch.labels[:, None] == batch.labels
    different = ~same
    if batch.num_queries == batch.num_rows:
        same.fill_diagonal_(False)
    else:
        met = _query_meets_reference(batch)
        same, different = same & met, different & met
    if triplets_per_anchor(wrapped) is not None:  # an anchor that lacks a positive or a negative is in no triplet
        complete = same.any(1, keepdim=True) & different.any(1, keepdim=True)
        same, different = same & complete, different & complete
    elif batch.num_queries == batch.num_rows:
        return same, different  # these are symmetric already
    return same | same.T, different | different.T


def rows_in_own_tuples(wrapped: nn.Module, batch: Batch) -> Tensor | None:
    """``(M,)`` the rows that some tuple of `own_tuples` names; None where `own_partners` is None."""
    if triplets_per_anchor(wrapped) is None and _takes_all(wrapped, batch) and _all_rows_meet(batch):
        return consecutive(0, batch.num_rows, batch.embeddings.device)
    masks = own_partners(wrapped, batch)
    if masks is None:
        return None
    rows = (masks[0] | masks[1]).any(1).nonzero().flatten()
    return rows if len(rows) < batch.num_rows else consecutive(0, batch.num_rows, rows.device)


def with_own_triplets(plan: Plan, wrapped: nn.Module, batch: Batch) -> Plan:
    """The same plan; where the loss would form all triplets of its rows, with the list of them.

    PML's own list needs memory for the cube of the rows, see `all_triplets`.
    """
    left_to_the_loss = plan.indices_tuple is None and plan.ref_pool_indices is None
    if batch.labels is None or not left_to_the_loss or triplets_per_anchor(wrapped) != "all":
        return plan
    return replace(plan, indices_tuple=all_triplets(batch.labels[plan.pool_rows(batch.num_rows)[plan.pool_indices]]))


def tuples_to_give(wrapped: nn.Module, batch: Batch, tuples: IndicesTuple, chosen: bool) -> IndicesTuple | None:
    """What a loss is given as tuples by a plan that replaces rows; None: the loss forms its own.

    Args:
        wrapped: the loss.
        batch: as the caller gave it.
        tuples: those of the plan.
        chosen: whether they are some of several.
    """
    at_random = isinstance(triplets_per_anchor(wrapped), int)  # the loss would draw others in each evaluation
    return tuples if chosen or at_random else batch.indices_tuple


def triplets_per_anchor(wrapped: nn.Module) -> int | str | None:
    """PML's option of triplet losses: how many triplets they form of each anchor, or "all"; None for other losses."""
    return getattr(wrapped, "triplets_per_anchor", None)


def _takes_all(wrapped: nn.Module, batch: Batch) -> bool:
    """Whether the loss forms all of its pairs or triplets of the labels."""
    of_labels = batch.indices_tuple is None and batch.labels is not None
    return of_labels and not isinstance(triplets_per_anchor(wrapped), int)


def _all_rows_meet(batch: Batch) -> bool:
    """Whether each row is in some pair, whatever the labels: it needs one other row to be compared with."""
    references = batch.num_rows - batch.num_queries
    if not references:
        return batch.num_queries > 1
    return batch.num_queries > (1 if batch.shared_labels else 0)


def _query_meets_reference(batch: Batch) -> Tensor:
    """``(N, N)`` bool: the row is a query, the column one of the reference, and not another view of the same image."""
    number = torch.arange(batch.num_rows, device=batch.embeddings.device)
    met = (number[:, None] < batch.num_queries) & (number >= batch.num_queries)
    return met & (number[:, None] + batch.num_queries != number) if batch.shared_labels else met
