"""A black-box attack that sees which items are found, and in which order, but no similarities and no gradients.

This is what a search engine shows to everybody (Li et al., "QAIR: Practical Query-efficient Black-Box Attacks for Image
Retrieval", arXiv 2103.02927). QAIR lowers the relevance of the returned list, in which items of the clean list count.
Here the items that are right count, which the attacker sees by looking at them. On trained embeddings of digits this
broke more queries than to count the items of the clean list, and to count both was no better.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...attacks.checks import check_whole
from ...attacks.objective import Score
from ..retrieval.batch import QueryBatch
from .kinds import QueryAttack
from .square import square_attack


def rank_only_attack(queries: int = 500, listed: int = 20, name: str = "rank-only") -> QueryAttack:
    """An attack on what a search returns: right items are to leave the front of the list.

    Args:
        queries: how often it asks with each image, at most. It stops when the first item is wrong.
        listed: how many items the search returns.
        name: of the attack in reports.

    Raises:
        InputError: an option is no whole number above 0.
    """
    check_whole("queries", queries)
    check_whole("listed", listed)
    score = partial(irrelevance_score, listed=listed)
    return QueryAttack(name, square_attack(score, queries), black_box=True, only_robust=True, passes=queries + 1)


def irrelevance_score(batch: QueryBatch, restart: int, *, listed: int) -> Score:
    """How irrelevant the first items on the list are: 0 if the first one is wrong, else below 0.

    It is minus the sum of ``2**-place`` over the right items. So one place counts as much as all later ones together.
    """
    is_right = batch.targets.is_right(batch.gallery.labels)
    weights = 0.5 ** torch.arange(1, listed + 1, dtype=torch.float64, device=is_right.device)

    def score(queries: Tensor) -> Tensor:
        items = batch.gallery.nearest(queries, batch.targets, listed)
        right = is_right.gather(1, items.clamp(min=0)) & (items >= 0)
        return -(right * weights[: items.shape[1]]).sum(1) * right[:, 0]

    return score
