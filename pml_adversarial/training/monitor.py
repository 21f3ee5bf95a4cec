"""Whether training collapses: R@1 within the batch is watched, and the attack is held back while it falls.

Collapse means that all embeddings become alike, the main failure of robust metric learning (arXiv 2203.01439,
2312.07364). Distances say little about it: losses use them differently, and untrained networks have small ones too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .batch import Batch
from .numeric import at_least_float
from .objectives import distance_of, exactly
from .plan import Plan

logger = logging.getLogger("pml_adversarial")

Losses = tuple[float, float]
"""A training loss before and after the attack."""

EVERY = 5
"""Number of steps from one measurement to the next."""

SEARCHED_EVERY = 50
"""Number of steps from one attack on the search to the next."""

_MEMORY = 20  # measurements over which R@1 is averaged
_BEARABLE = 0.2  # of the clean R@1: where the attack of training leaves less, its eps is out of reach
_NOTHING = 3e-4  # of the loss: an attack that raises it by less does nothing
_FOUND = 0.1  # of the clean R@1: the same of the attack on the search, which is stronger
_LOST = 0.5  # of the best R@1 so far: an embedding with less is collapsing
_RECOVERY = 100  # steps in which the attack on a collapsing embedding is taken back entirely, or comes back entirely


class CollapseMonitor:
    """Averages R@1 within the batch, and says which share of the budget an attack may spend.

    Attributes:
        guarded: whether the share falls while the embedding is collapsing.
        share: of the budget that the schedule allows, from 0 to 1.
        recall: R@1 within the batch without attack, averaged over the last measurements; NaN before the first.
        recall_attacked: the same of the perturbed rows, at full strength; NaN before the first.
        recall_searched: the same under an attack that raises the margin of the search itself, see `SearchMargin`. The
            attack of training may leave rows found that this one does not. NaN before the first.
        loss_before: the training loss without the attack, averaged over the last steps at full strength that were
            measured; NaN before the first.
        loss_after: the same with the attack.
    """

    def __init__(self, guarded: bool = True) -> None:
        self.guarded = guarded
        self.share = 1.0
        self.recall = self.recall_attacked = self.recall_searched = math.nan
        self.best = 0.0
        self.loss_before = self.loss_after = math.nan
        self.measurements = self.attacked_measurements = self.searched_measurements = 0

    def measure(self, step: int, recall: float, attacked: float | None, losses: Losses | None = None) -> None:
        """Takes in one measurement. `EVERY` steps one is expected.

        Args:
            step: number of the step.
            recall: R@1 within the batch without attack.
            attacked: R@1 of rows perturbed at full strength, among the clean others. None: no such rows.
            losses: the training loss at full strength, before and after the attack. None: it is not known.
        """
        self.measurements += 1
        self.recall = _averaged(self.recall, recall, self.measurements)
        if self.measurements >= _MEMORY:
            self.best = max(self.best, self.recall)
        collapsing = self.recall < _LOST * self.best
        if self.guarded:
            self.share = min(1.0, max(0.0, self.share + (-1 if collapsing else 1) * EVERY / _RECOVERY))
        if attacked is not None:
            self.attacked_measurements += 1
            self.recall_attacked = _averaged(self.recall_attacked, attacked, self.attacked_measurements)
            if losses is not None:
                self.loss_before, self.loss_after = (
                    _averaged(mean, value, self.attacked_measurements)
                    for mean, value in zip((self.loss_before, self.loss_after), losses, strict=True)
                )
        is_time = attacked is not None and self.attacked_measurements % (5 * _MEMORY) == _MEMORY
        if collapsing and self.measurements % _MEMORY == 0:
            held = "The attack is held back until it recovers. If it does not, stop" if self.guarded else "Stop"
            logger.warning(
                f"The embedding is collapsing: R@1 within the batch fell from {100 * self.best:.0f} % to "
                f"{100 * self.recall:.0f} %. {held}, and train anew with a smaller eps, a longer warmup, clean rows "
                "beside the perturbed ones (keep_clean=True), or from a model trained without an attack."
            )
        elif is_time and self.out_of_reach:
            least = min(self.recall_attacked, self.recall_searched)  # the first, where the second is NaN
            logger.warning(
                f"The eps of this attack is out of reach so far: after {step + 1} steps R@1 within the batch is "
                f"{100 * self.recall:.0f} % without attack and {100 * least:.0f} % under it. Expect no "
                "robustness at it. Smaller eps may be learned better with a smaller eps in training; else train for "
                "longer, or use a larger network."
            )
        elif is_time and abs(self.loss_after - self.loss_before) <= _NOTHING * abs(self.loss_before):
            logger.warning(
                f"The attack does next to nothing: in the last {_MEMORY * EVERY} steps it changed the loss from "
                f"{self.loss_before:.6g} to {self.loss_after:.6g} on average. So this is plain training, at a higher "
                "cost. Either eps is too small for this data (it counts in pixels of [0, 1]: 8/255 is 0.031), or the "
                "attack moves nothing, or no tuple is left that the loss still wants to change."
            )

    def measure_searched(self, recall: float) -> None:
        """Takes in R@1 of rows under an attack on the search itself. `SEARCHED_EVERY` steps one is expected."""
        self.searched_measurements += 1
        self.recall_searched = _averaged(self.recall_searched, recall, self.searched_measurements)

    @property
    def out_of_reach(self) -> bool:
        """Whether hardly any row withstands the attack, after 100 steps at full strength."""
        found = self.recall_attacked < _BEARABLE * self.recall or self.recall_searched < _FOUND * self.recall
        return self.attacked_measurements >= _MEMORY and found

    def state_dict(self) -> dict[str, Any]:
        """The state in types that load with ``weights_only``."""
        return {name: value for name, value in vars(self).items() if name != "guarded"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned."""
        vars(self).update(state)


def batch_recall(wrapped: nn.Module, batch: Batch, plan: Plan, copies: Tensor) -> Tensor:
    """``(2,)`` R@1 within a batch with labels: of clean rows, and of copies ``(M, D)`` among the other clean rows.

    See `SearchMargin`. NaN where no row counts.
    """
    seen = replace(batch, context=batch.embeddings.detach())
    rows = torch.arange(batch.num_rows, device=copies.device)
    asked = (seen.context, rows), (copies.detach(), plan.rows)
    return torch.stack([SearchMargin(wrapped, seen, of).recall(queries) for queries, of in asked])


class SearchMargin:
    """By how much the nearest wrong row is nearer than the nearest right one, among the clean rows of a batch.

    What the attack of training raises may be another thing, such as the distance to the furthest right row. The margin
    is what decides R@1. The distance is that of the loss.

    Args:
        wrapped: the loss.
        batch: with labels; its ``context`` is searched.
        of: ``(M,)`` rows of the batch; each searches the others.
    """

    may_be_flat = True

    def __init__(self, wrapped: nn.Module, batch: Batch, of: Tensor) -> None:
        self.distance, self.clean = distance_of(wrapped), at_least_float(batch.context)
        labels = cast(Tensor, batch.labels)
        itself = torch.zeros(len(of), len(labels), dtype=torch.bool, device=of.device).scatter(1, of[:, None], True)
        same = labels[of][:, None] == labels
        self._right, self._wrong = same & ~itself, ~same

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Margins ``(M, D) -> (M,)``; 0 of a row that has no right or no wrong row to find."""
        right, wrong = self._nearest(embeddings)
        return torch.where(right.isfinite() & wrong.isfinite(), wrong - right, 0)

    def recall(self, embeddings: Tensor) -> Tensor:
        """R@1. A row whose class has no other member does not count. A wrong row that is as near ranks first."""
        right, wrong = self._nearest(embeddings)
        return (right > wrong)[self._right.any(1)].float().mean()

    def _nearest(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """``(M,)`` similarity of the nearest right row and of the nearest wrong one; minus infinity where none is."""
        with exactly(embeddings):
            near = self.distance(embeddings.to(self.clean.dtype), self.clean)
        near = near if self.distance.is_inverted else -near
        right, wrong = (near.masked_fill(~rows, -torch.inf).amax(1) for rows in (self._right, self._wrong))
        return right, wrong


def _averaged(mean: float, value: float, count: int) -> float:
    """Mean of up to the last `_MEMORY` values, of which ``value`` is number ``count``."""
    return value if count == 1 else mean + (value - mean) / min(count, _MEMORY)
