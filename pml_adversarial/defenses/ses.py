"""SES: the loss on the clean batch, and a penalty on how far an attack moves an embedding."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..attacks.checks import check_number
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.plan import Plan, clean_loss
from .est import EST, embedding_shift


class SES(EST):
    """Suppressing the embedding shift (Zhou et al., supplementary material of ECCV 2020, arXiv 2002.11293).

    The attack is that of `EST`. Training minimises ``L(x) + weight * mean d(f(x'), f(x))``: the wrapped loss on the
    clean batch, and the mean distance, with gradient through both embeddings. The authors' code has the weight 1. Any
    loss can be trained, and processes may share a batch.

    Raises:
        InputError: the weight is no finite number from 0 on.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = check_number("weight", weight)

    @hookimpl
    def pml_adversarial_training_loss(
        self, wrapped: Callable[..., Tensor], batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Tensor:
        """The clean loss and the weighted mean shift."""
        moved = embedding_shift(adversarial.embeddings, batch.embeddings[plan.rows])
        return clean_loss(wrapped, batch) + self.weight * moved.mean()
