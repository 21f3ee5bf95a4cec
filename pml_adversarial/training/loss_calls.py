"""How a loss is called. A loss that does not take PML's five arguments is called through a stand-in that does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor, nn

from ..errors import InputError, PlanError
from .loss_support import LossSupport, support_of
from .options import positional
from .tuples import IndicesTuple
from .wrapper import StandIn


def takes_two_views(loss: nn.Module) -> bool:
    """Whether the loss is called with ``(embeddings, ref_emb)`` and no labels, as `SelfSupervisedLoss` is."""
    return positional(loss)[1:2] == ["ref_emb"]


class PMLCall(StandIn):
    """A loss that is called in another way than PML calls losses, as a loss that is called in PML's way."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def _refuse_tuples(self, indices_tuple: Any, why: str) -> None:
        if indices_tuple is not None:
            raise PlanError(
                f"{type(self.loss).__name__} takes no tuples: {why}. Expected indices_tuple=None and "
                "tuples_per_anchor=None, and no plugin that plans with triplets or pairs."
            )


class TwoViews(PMLCall):
    """A loss with ``forward(embeddings, ref_emb)``, of two views of the same images."""

    loss_support = LossSupport(takes_tuples=False)

    def forward(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any = None, ref_emb: Any = None, ref_labels: Any = None
    ) -> Tensor:
        """The loss of the two views. Each image is its own class, whatever the labels say.

        Raises:
            PlanError: tuples were given.
        """
        self._refuse_tuples(indices_tuple, "it compares two views of the same images")
        return self.loss(embeddings, ref_emb)

    @staticmethod
    def labels(embeddings: Tensor, ref_emb: Any) -> tuple[Tensor, Tensor]:
        """A class for each image, ``(N,)`` for each view.

        Raises:
            InputError: the second view is missing, or has another shape.
        """
        if not isinstance(ref_emb, Tensor) or ref_emb.shape != embeddings.shape:
            found = tuple(ref_emb.shape) if isinstance(ref_emb, Tensor) else type(ref_emb).__name__
            raise InputError(
                f"The second view is {found}, the first {tuple(embeddings.shape)}; expected embeddings of two views of "
                "the same images in the same order, loss_func(embeddings, ref_emb)."
            )
        each = torch.arange(len(embeddings), device=embeddings.device)
        return each, each.clone()  # PML would leave out pairs (i, i) if both were one tensor


class Enqueuing(PMLCall):
    """A `CrossBatchMemory` called with ``enqueue_mask``: the rows of the mask are a reference that joins the memory.

    Queries meet the memory only, and not one another.
    """

    @property
    def loss_support(self) -> LossSupport | None:
        """What the memory can take, without tuples."""
        known = support_of(self.loss)
        return known and replace(known, takes_tuples=False)

    def forward(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any = None, ref_emb: Any = None, ref_labels: Any = None
    ) -> Tensor:
        """The loss of the queries against the memory, after the reference rows have joined it.

        Raises:
            PlanError: tuples were given.
        """
        self._refuse_tuples(indices_tuple, "with enqueue_mask it pairs all queries with its memory")
        if ref_emb is None:  # no row joins the memory
            ref_emb, ref_labels = embeddings[:0], labels[:0]
        mask = torch.arange(len(embeddings) + len(ref_emb), device=embeddings.device) >= len(embeddings)
        rows, classes = torch.cat([embeddings, ref_emb]), torch.cat([labels, ref_labels])
        return self.loss(rows, classes, enqueue_mask=mask)


def name_of(loss: nn.Module) -> str:
    """The class of the loss, as the user knows it."""
    return type(loss.loss if isinstance(loss, PMLCall) else loss).__name__


def check_scalar(loss: nn.Module, value: Any) -> None:
    """Refuses a loss that does not return one number.

    Raises:
        InputError: ``value``, which the loss returned, is not a tensor of one element.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(
            f"{name_of(loss)} returned {found}; expected a scalar tensor. Give a loss of pytorch-metric-learning a "
            "reducer that returns one, such as reducer=MeanReducer(); in a loss of your own, return losses.mean()."
        )


def check_mask(mask: Any, loss: nn.Module, embeddings: Tensor, indices_tuple: IndicesTuple | None) -> None:
    """Refuses an ``enqueue_mask`` that cannot be used.

    Raises:
        InputError: the loss takes no mask, or it is not one bool for each row.
        PlanError: there are tuples besides the mask.
    """
    if not isinstance(loss, CrossBatchMemory):
        raise InputError(
            f"enqueue_mask was given, and {type(loss).__name__} has no memory to enqueue in; expected "
            "AdversarialLoss(CrossBatchMemory(loss, embedding_size), model), not in a DistributedLossWrapper. Each "
            "process then has a memory of its own."
        )
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != embeddings.shape[:1]:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"enqueue_mask is {found}; expected torch.bool of shape ({len(embeddings)},), one for each embedding."
        )
    if indices_tuple is not None:
        raise PlanError("indices_tuple and enqueue_mask were both given; PML's CrossBatchMemory takes either.")
