"""Whether training collapses: how strong the next attack may be, and a warning where embeddings become one.

Collapse is all embeddings alike, the main failure of robust metric learning (arXiv 2203.01439, 2312.07364): where
attacks are stronger than what a network can learn to bear, shrinking all distances is the quick way to a lower loss.
Distances tell little about it, since losses differ in what they do with them, and untrained networks have nearly equal
embeddings too. What it costs is retrieval, so that is watched: R@1 within the batch, without attack and under it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from .batch import Batch
from .numeric import at_least_float
from .objectives import distance_of
from .plan import Plan

logger = logging.getLogger("pml_adversarial")

EVERY = 5
"""Steps between two looks."""

WARMUP = 200
"""Steps over which `AdversarialLoss` lets an attack grow if it is not told."""

_MEMORY = 20  # looks over which R@1 is averaged
_BEARABLE = 0.2  # of the clean R@1: where an attack leaves less, its eps is out of reach
_LOST = 0.5  # of its best R@1 so far: an embedding that has less left is collapsing
_RECOVERY = 100  # steps in which the attack on a collapsing embedding gives way entirely, or comes back


class Strength:
    """The share of its budget that an attack may spend.

    Args:
        warmup: steps over which it grows from 0 to 1; 0: it is 1 from the start.
        guarded: whether it falls while the embedding is collapsing.

    Raises:
        InputError: ``warmup`` is no number of steps.

    Example:
        >>> strength = Strength(warmup=10)
        >>> strength.at(step=5), strength.at(step=50)
        (0.5, 1.0)
    """

    def __init__(self, warmup: int = 0, guarded: bool = True) -> None:
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise InputError(f"warmup={warmup!r}; expected a whole number of training steps, 0 for none.")
        self.warmup, self.guarded = warmup, guarded
        self.share = 1.0
        self.recall = self.attacked = self.best = 0.0
        self.looks = self.strong_looks = 0

    def at(self, step: int) -> float:
        """The strength of a step, from 0 to 1."""
        return self.share * (min(1.0, step / self.warmup) if self.warmup else 1.0)

    def look(self, step: int, recall: float, attacked: float | None) -> None:
        """Learns from a step, one in `EVERY`.

        Args:
            step: number of the step.
            recall: R@1 within the batch without attack.
            attacked: the same of the perturbed rows, among the clean others; None: none was perturbed.
        """
        self.looks += 1
        self.recall = _averaged(self.recall, recall, self.looks)
        self.best = max(self.best, self.recall) if self.looks >= _MEMORY else 0.0
        collapsing = self.recall < _LOST * self.best
        if self.guarded:
            self.share = min(1.0, max(0.0, self.share + (-1 if collapsing else 1) * EVERY / _RECOVERY))
        if attacked is not None and self.at(step) == 1.0:
            self.strong_looks += 1
            self.attacked = _averaged(self.attacked, attacked, self.strong_looks)
        if collapsing and self.looks % _MEMORY == 0:
            self._warn_of_collapse()
        elif attacked is not None and self.out_of_reach and self.strong_looks % (5 * _MEMORY) == _MEMORY:
            self._warn_of_reach(step)

    @property
    def out_of_reach(self) -> bool:
        """Whether hardly anything withstands the attack at full strength, after 100 steps of it."""
        return self.strong_looks >= _MEMORY and self.attacked < _BEARABLE * self.recall

    def records(self) -> dict[str, float]:
        """R@1 within the batch, without attack and under it, averaged over the last looks."""
        return {"batch_recall": self.recall, "batch_recall_attacked": self.attacked}

    def state_dict(self) -> dict[str, Any]:
        """In types that load with ``weights_only``."""
        return {name: value for name, value in vars(self).items() if name not in ("warmup", "guarded")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        vars(self).update(state)

    def _warn_of_collapse(self) -> None:
        held = "The attack is held back until it recovers. If it does not, stop" if self.guarded else "Stop"
        logger.warning(
            "The embedding is collapsing: R@1 within the batch fell from %.0f %% to %.0f %%. %s, and train anew with a "
            "smaller eps, a longer warmup, clean rows beside the perturbed ones (keep_clean=True), or from a model "
            "trained without an attack.",
            100 * self.best,
            100 * self.recall,
            held,
        )

    def _warn_of_reach(self, step: int) -> None:
        logger.warning(
            "The eps of this attack is out of reach so far: after %d steps R@1 within the batch is %.0f %% without "
            "attack and %.0f %% under it. Expect no robustness at it. Smaller eps may be learned better with a "
            "smaller eps in training; else train for longer, or use a larger network.",
            step + 1,
            100 * self.recall,
            100 * self.attacked,
        )


def batch_recall(wrapped: nn.Module, batch: Batch, plan: Plan, copies: Tensor) -> Tensor:
    """``(2,)`` R@1 within the batch of the clean rows, and of the copies among the clean other rows.

    A row whose class has no other member is not asked for; NaN where there is none to ask for. A wrong row that is as
    near as the nearest right one comes first.

    Args:
        wrapped: the loss, whose distance counts.
        batch: with labels.
        plan: which rows the copies are of.
        copies: ``(M, D)``.
    """
    distance, clean = distance_of(wrapped), at_least_float(batch.embeddings.detach())
    labels, rows = cast(Tensor, batch.labels), torch.arange(len(batch), device=clean.device)
    found = [
        _recall(distance, queries, clean, labels[of], labels, of)
        for queries, of in ((clean, rows), (copies.detach().to(clean.dtype), plan.rows))
    ]
    return torch.stack(found)


def _recall(
    distance: nn.Module, queries: Tensor, clean: Tensor, labels: Tensor, all_labels: Tensor, of: Tensor
) -> Tensor:
    near = distance(queries, clean)
    near = near if distance.is_inverted else -near
    itself = torch.zeros_like(near, dtype=torch.bool).scatter(1, of[:, None], True)
    same = labels[:, None] == all_labels
    right = near.masked_fill(~same | itself, -torch.inf).amax(1)
    wrong = near.masked_fill(same, -torch.inf).amax(1)
    return (right > wrong)[(same & ~itself).any(1)].float().mean()


def _averaged(mean: float, value: float, count: int) -> float:
    return mean + (value - mean) / min(count, _MEMORY)
