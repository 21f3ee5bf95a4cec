"""Only the rows that carry most of the loss are perturbed."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.numeric import at_least_float
from ..training.plan import Plan, clean_loss


class HardRows:
    """Of the copies that would be perturbed, those whose rows carry most loss; the others stay as they are.

    How much a row carries is the length of the wrapped loss's gradient at its embedding, without an attack.

    Spares: the attack steps of the other rows, and where clean rows are kept also their second pass.

    Args:
        share: of the copies, above 0 and up to 1.

    Raises:
        InputError: ``share`` is no such share.

    Example:
        >>> from torch import nn
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_adversarial import AdversarialLoss
        >>> loss_func = AdversarialLoss(ContrastiveLoss(), nn.Flatten(), plugins=[HardRows(share=0.5)])
    """

    def __init__(self, share: float = 0.5) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise InputError(f"share={share!r}; expected a share of the copies, above 0 and up to 1.")
        self.share = share

    @hookimpl(wrapper=True)
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Generator[None, Any, Any]:
        """The plan that another answered, with some of its copies."""
        plan = yield
        if not isinstance(plan, Plan) or not len(plan):
            return plan
        carried = _carried(wrapped, batch)[plan.rows]
        return plan.keep(carried.topk(math.ceil(self.share * len(plan))).indices.sort().values, len(batch))


def _carried(wrapped: nn.Module, batch: Batch) -> Tensor:
    """``(N,)`` length of the loss's gradient at each row; 0 for rows that it does not depend on."""
    with torch.enable_grad():
        embeddings = at_least_float(batch.context).requires_grad_()
        loss = clean_loss(wrapped, replace(batch, embeddings=embeddings))
        (gradient,) = torch.autograd.grad(loss, embeddings, allow_unused=True)
    return embeddings.new_zeros(len(embeddings)) if gradient is None else gradient.norm(dim=1)
