"""How copies may stand in a loss, and whether rows meet in it: asked from the loss itself, hardly ever from its name.

Losses are asked on a batch in which nothing is degenerate, not on the one at hand: with few tuples, or classes of
equal size, a loss may give one value for every plan.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from pytorch_metric_learning.losses import CrossBatchMemory, HistogramLoss, TupletMarginLoss
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from ..errors import PlanError
from .batch import Batch
from .isolation import random_stream
from .plan import Plan, plan_roles, plan_tuples, replace_rows, untouched
from .tuples import IndicesTuple, all_triplets, keep_tuples, shift_partners

logger = logging.getLogger("pml_adversarial")

CallSignature = tuple[int | None, bool, bool, bool]
"""How a loss is called: with which tuples, a reference, labels of its own, none at all."""

_FAILS_AT_EQUALS = (HistogramLoss, TupletMarginLoss)
"""Losses of PML that raise, or have no finite gradient, where a row and its copy have equal embeddings."""


def call_signature(batch: Batch) -> CallSignature:
    """What a loss's answers depend on."""
    members = None if batch.indices_tuple is None else len(batch.indices_tuple)
    return members, batch.num_queries < len(batch), batch.shared_labels, batch.labels is None


def takes_copies(wrapped: Callable[..., Any], rows: int) -> bool:
    """Whether one batch of so many rows may hold rows and their copies, which early in training are nearly equal."""
    parts = list(wrapped.modules()) if isinstance(wrapped, nn.Module) else []
    small = any(isinstance(part, CrossBatchMemory) and part.memory_size < rows for part in parts)
    return not small and not any(isinstance(part, _FAILS_AT_EQUALS) for part in parts)


def sees_copies(wrapped: nn.Module, batch: Batch) -> bool:
    """Whether the loss takes one labelled batch of rows and their copies, and copies of rows that are not alone count.

    Where a loss takes one pair of each class (`NPairsLoss`), it takes the first, and that one is clean if it can be.
    """
    with random_stream(0, 0):
        trial = _trial_for(wrapped, batch)
        labels = cast(Tensor, trial.labels)[:, None]
        in_company = ((labels == labels.T).sum(1) > len(trial) // trial.num_queries)[:, None]
        once, again = torch.randn_like(trial.embeddings), torch.randn_like(trial.embeddings)
    plan = replace_rows(torch.arange(len(trial)), len(trial), trial.indices_tuple).split(trial.num_queries)
    plan = plan.beside_clean(len(trial))
    found = [_value(wrapped, trial, plan, copies) for copies in (once, torch.where(in_company, again, once))]
    if None in found:
        return _value(wrapped, trial, untouched(trial, trial.indices_tuple)) is None  # then nothing is decided by it
    return found[0] != found[1]


def own_tuples(wrapped: nn.Module, batch: Batch) -> IndicesTuple | None:
    """The caller's tuples, or the loss's own pairs or triplets, over the rows of the batch; None without labels."""
    if batch.indices_tuple is not None or batch.labels is None:
        return batch.indices_tuple
    labels, ref_labels = batch.labels[: batch.num_queries], batch.labels[batch.num_queries :]
    reference = labels if batch.shared_labels else ref_labels if len(ref_labels) else None
    limit = _triplets_per_anchor(wrapped)
    if limit is None:
        tuples = lmu.get_all_pairs_indices(labels, reference)
    elif limit == "all" and reference is None:
        tuples = all_triplets(labels)
    else:
        tuples = lmu.convert_to_triplets(None, labels, reference, t_per_anchor=limit)
    return tuples if reference is None else shift_partners(tuples, batch.num_queries)


def own_partners(wrapped: nn.Module, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """`own_tuples` as masks, without making a list of them, which may be long; None where there is no other way.

    Returns:
        Two symmetric bool masks ``(N, N)``: rows that share a positive pair, and rows that share a negative one. None
        if the caller gave tuples, or there are no labels, or the loss chooses at random.
    """
    limit = _triplets_per_anchor(wrapped)
    if batch.indices_tuple is not None or batch.labels is None or isinstance(limit, int):
        return None
    number = torch.arange(len(batch), device=batch.labels.device)
    if batch.num_queries < len(batch):
        meet = (number[:, None] < batch.num_queries) & (number >= batch.num_queries)
        if batch.shared_labels:
            meet &= number[:, None] + batch.num_queries != number
    else:
        meet = number[:, None] != number
    same = batch.labels[:, None] == batch.labels
    positive, negative = meet & same, meet & ~same
    if limit is not None:  # an anchor that lacks one of the two is in no triplet
        complete = positive.any(1, keepdim=True) & negative.any(1, keepdim=True)
        positive, negative = positive & complete, negative & complete
    return positive | positive.T, negative | negative.T


def with_own_triplets(plan: Plan, wrapped: nn.Module, batch: Batch) -> Plan:
    """The same plan; where the loss would take all triplets of its rows, with the list of them, see `all_triplets`."""
    left_to_the_loss = plan.indices_tuple is None and plan.ref_pool_indices is None
    if batch.labels is None or not left_to_the_loss or _triplets_per_anchor(wrapped) != "all":
        return plan
    return replace(plan, indices_tuple=all_triplets(batch.labels[plan.pool_rows(len(batch))[plan.pool_indices]]))


def own_triplets(wrapped: nn.Module, batch: Batch) -> IndicesTuple:
    """The caller's triplets, or all of his pairs or of the batch, over the rows of the batch.

    Raises:
        PlanError: there are neither tuples nor labels.
    """
    tuples = own_tuples(wrapped, batch)
    if tuples is None:
        raise PlanError("There are neither labels nor tuples, so no triplets; expected loss_func(embeddings, labels).")
    return tuple(lmu.convert_to_triplets(tuples, batch.labels))


def choice_of(wrapped: nn.Module, batch: Batch, tuples: IndicesTuple, chosen: bool) -> IndicesTuple | None:
    """What the loss is to be given as tuples while nothing is perturbed; None: it chooses, and always alike.

    Args:
        wrapped: the loss.
        batch: as the caller gave it.
        tuples: those that are planned with.
        chosen: whether they were chosen among those that there were.
    """
    at_random = isinstance(_triplets_per_anchor(wrapped), int)  # it would choose others in each evaluation
    return tuples if chosen or at_random else batch.indices_tuple


def with_copies(
    batch: Batch, tuples: IndicesTuple, roles: tuple[str, ...], tuples_per_anchor: int | None
) -> dict[str, Plan]:
    """The plans in which copies stand beside their rows, finest first; where one cannot be, it is missing."""
    appended = (plan_tuples if tuples_per_anchor else plan_roles)(tuples, roles, len(batch))
    by_reference = appended.by_reference(len(batch), batch.num_queries)
    return {"appended": appended} if by_reference is None else {"appended": appended, "reference": by_reference}


def finest(wrapped: nn.Module, batch: Batch, roles: tuple[str, ...], tuples_per_anchor: int | None) -> str | None:
    """Which plan with copies keeps the loss's value while nothing is perturbed; "in place" if none does.

    None where the loss has no value on the trial batch: what it may be later is not decided by a failure.

    Raises:
        PlanError: tuples are to be kept, and the loss takes none.
    """
    with random_stream(0, 0):
        trial = _trial_for(wrapped, batch)
        tuples = own_tuples(wrapped, trial)
        if tuples is None:
            return "in place"
        if tuples_per_anchor is not None:
            tuples = keep_tuples(tuples, tuples_per_anchor)
        given = choice_of(wrapped, trial, tuples, tuples_per_anchor is not None)
        expected = _value(wrapped, trial, untouched(trial, given))
        if expected is None:
            if given is not trial.indices_tuple and _value(wrapped, trial, untouched(trial, None)) is not None:
                raise PlanError(
                    f"{type(wrapped).__name__} takes no tuples, so tuples_per_anchor={tuples_per_anchor} has none to "
                    "choose from. Use tuples_per_anchor=None."
                )
            return None
        plans = with_copies(trial, tuples, roles, tuples_per_anchor)
        if trial.num_queries < len(trial):
            del plans["appended"]
        return next((name for name, plan in plans.items() if _keeps(wrapped, trial, plan, expected)), "in place")


def is_row_separable(wrapped: nn.Module, batch: Batch) -> bool:
    """Whether the loss is a sum of what each row contributes on its own.

    Then what two parts of a batch change, each alone, adds up to what they change together. The trial batch is parted
    by each bit of the row number, so that any two rows are in different parts once.
    """
    with random_stream(0, 0):
        trial = _trial_for(wrapped, batch)
        moved, number = torch.randn_like(trial.embeddings), torch.arange(len(trial))
        near = torch.ones_like(moved) + trial.embeddings  # each other, so that no margin keeps rows from being compared

    def value(part: Tensor) -> Tensor:
        rows = replace(trial, embeddings=torch.where(part[:, None], moved, near))
        found = _value(wrapped, rows, untouched(rows, trial.indices_tuple))
        return torch.tensor(torch.nan) if found is None else found

    before = value(number < 0)
    together = value(number >= 0) - before
    parts = (number >> bit & 1 == 1 for bit in range((len(trial) - 1).bit_length()))
    sums = (value(part) - before + value(~part) - before for part in parts)
    return bool(together != 0) and all(torch.isclose(found, together, rtol=1e-9, atol=0) for found in sums)


def _triplets_per_anchor(wrapped: nn.Module) -> int | str | None:
    return getattr(wrapped, "triplets_per_anchor", None)


_UNEQUAL, _TWO, _BLOCKS = [0, 1, 0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]
"""Classes of trial batches: the second for losses that know no more, the third for those that want them so."""


def _trial_for(wrapped: nn.Module, batch: Batch) -> Batch:
    """The first trial batch on which the loss has a value."""
    trials = [_trial_batch(batch, classes) for classes in (_UNEQUAL, _TWO, _BLOCKS)]
    accepted = (t for t in trials if _value(wrapped, t, untouched(t, t.indices_tuple)) is not None)
    return next(accepted, trials[0])


def _trial_batch(batch: Batch, classes: list[int]) -> Batch:
    """Random embeddings with the kind of labels, of tuples and of reference that ``batch`` has.

    Not ``batch`` itself: with few tuples, or classes of equal size, a loss may give one value for every plan. In double
    precision on the CPU, where an index out of range is an exception and not the end of the process.
    """
    labels = _three_labels(batch)[torch.tensor(classes)]
    reference = labels if batch.num_queries < len(batch) else None
    tuples = None
    if batch.indices_tuple is not None:
        mine = lmu.get_all_triplets_indices if len(batch.indices_tuple) == 3 else lmu.get_all_pairs_indices
        tuples = _thinned(mine(labels, None if reference is None else reference.clone()))
    if reference is not None:
        tuples = None if tuples is None else shift_partners(tuples, len(labels))
    num_rows = len(labels) if reference is None else 2 * len(labels)
    dimensions = batch.embeddings.shape[1]
    drawn = torch.randn(num_rows, dimensions, dtype=torch.float64) / dimensions**0.5
    if dimensions == 1:
        drawn[::3] = 0  # else, at unit length, all of them are 1 or -1 and all pairs of a kind have one loss
    return replace(
        batch,
        embeddings=drawn,
        labels=None if batch.labels is None else labels.repeat(num_rows // len(labels)),
        indices_tuple=tuples,
        num_queries=len(labels),
    )


def _three_labels(batch: Batch) -> Tensor:
    """Labels of the batch, which the loss knows; where it has fewer, the lowest numbers."""
    known = torch.empty(0, dtype=torch.long) if batch.labels is None else batch.labels.unique().cpu()
    lowest = torch.arange(3).to(known)
    return torch.cat([known, lowest[~torch.isin(lowest, known)]])[:3]


def _thinned(indices_tuple: IndicesTuple) -> IndicesTuple:
    """Half of the positive pairs, some of them in one direction only, and half of the tuples; roles fall unequally."""
    if len(indices_tuple) == 3:
        anchors, positives, _ = indices_tuple
        pair = anchors * (int(positives.max()) + 1) + positives
        kept = _half(torch.isin(pair, _half(pair.unique())).nonzero().flatten())
        return tuple(member[kept] for member in indices_tuple)
    positive, negative = (_half(torch.arange(len(members))) for members in indices_tuple[::2])
    return tuple(
        member[chosen] for member, chosen in zip(indices_tuple, (positive, positive, negative, negative), strict=True)
    )


def _half(values: Tensor) -> Tensor:
    return values[torch.randperm(len(values))[: len(values) // 2].sort().values]


def _value(wrapped: nn.Module, batch: Batch, plan: Plan, copies: Tensor | None = None) -> Tensor | None:
    """What a copy of the loss gives, with copies of rows unperturbed unless given; None where it raises."""
    try:
        loss = copy.deepcopy(wrapped).cpu().double()
        with random_stream(0, 0):
            value: Any = plan.evaluate(loss, batch, batch.embeddings[plan.rows] if copies is None else copies)
        return torch.as_tensor(value, dtype=torch.float64)
    except Exception as error:  # whatever a loss raises at arguments that it does not take
        logger.debug("%s refuses a plan: %r", type(wrapped).__name__, error)
        return None


def _keeps(wrapped: nn.Module, batch: Batch, plan: Plan, expected: Tensor) -> bool:
    """Whether the loss gives the expected value for the plan while nothing is perturbed, and another once copies move.

    Also with a bystander in the plan, since a loss that looks at rows that its tuples do not name would look at rows
    and their copies at once.
    """
    copies = batch.embeddings[plan.rows]
    elsewhere = torch.randn(len(copies) + 1, batch.embeddings.shape[1], dtype=torch.float64)
    attended = torch.cat([copies, elsewhere[:1]])
    still = _value(wrapped, batch, plan, copies), _value(wrapped, batch, plan.with_bystander(len(batch)), attended)
    moved = _value(wrapped, batch, plan, elsewhere[1:])
    if moved is None or torch.equal(moved, expected):
        return False
    return all(value is not None and torch.allclose(expected, value, rtol=1e-9, atol=0) for value in still)
