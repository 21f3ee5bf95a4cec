"""SES: the clean loss, and a price on how far an adversary can move a row."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.plan import Plan, clean_loss
from .est import EST
from .rows import check_weight, shift


class SES(EST):
    """Suppressing the embedding shift (Zhou et al., supplementary material of ECCV 2020, arXiv 2002.11293).

    The adversary of `EST`; trained is ``L(x) + weight * mean d(f(x'), f(x))``, with the wrapped loss on the clean
    batch and gradient through both embeddings of the distance. The authors' code has the weight 1. The wrapper's
    ``clean_weight`` does not count: the loss is clean already. Any loss; processes may share a batch.

    Args:
        weight: of the mean distance, from 0 on.
    """

    def __init__(self, weight: float = 1.0) -> None:
        check_weight(weight)
        self.weight = weight

    @hookimpl
    def pml_adversarial_training_loss(
        self, wrapped: Callable[..., Tensor], batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Tensor:
        """The clean loss and the weighted mean shift."""
        moved = shift(adversarial.embeddings, batch.embeddings[plan.rows])
        return clean_loss(wrapped, batch) + self.weight * moved.mean()
