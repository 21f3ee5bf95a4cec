"""Hard rows: the attack perturbs only the rows that contribute most to the loss."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.checks import check_number
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.numeric import at_least_float
from ..training.plan import Plan, clean_loss


class HardRows:
    """Perturbs a share of the copies: those whose rows contribute most to the loss. The other rows stay clean.

    The contribution of a row is the length of the gradient of the wrapped loss at its clean embedding. It saves the
    attack steps of the other rows, and where clean rows are kept also their second pass.

    Args:
        share: of the copies that would be perturbed without it, above 0 and up to 1.

    Raises:
        InputError: ``share`` is out of this range.

    Example:
        >>> from torch import nn
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_adversarial import AdversarialLoss
        >>> loss_func = AdversarialLoss(ContrastiveLoss(), nn.Flatten(), plugins=[HardRows(share=0.5)])
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = check_number("share", share, 0, 1, above=True, hint=", the share of copies to perturb")

    @hookimpl(wrapper=True)
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Generator[None, Any, Any]:
        """The plan of the other plugins, with a share of its copies."""
        plan = yield
        if not isinstance(plan, Plan) or not len(plan):
            return plan
        contribution = _contribution(wrapped, batch)[plan.rows]
        return plan.keep(contribution.topk(math.ceil(self.share * len(plan))).indices.sort().values, len(batch))


def _contribution(wrapped: nn.Module, batch: Batch) -> Tensor:
    """``(N,)`` length of the gradient of the loss at each row; 0 for rows on which the loss does not depend."""
    with torch.enable_grad():
        embeddings = at_least_float(batch.context).requires_grad_()
        loss = clean_loss(wrapped, replace(batch, embeddings=embeddings))
        (gradient,) = torch.autograd.grad(loss, embeddings, allow_unused=True)
    return embeddings.new_zeros(len(embeddings)) if gradient is None else gradient.norm(dim=1)
