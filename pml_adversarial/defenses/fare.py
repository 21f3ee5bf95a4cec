"""FARE: perturbed embeddings stay near those that a frozen copy of the model gives to the clean inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..attacks.checks import check_choice, check_number
from ..attacks.objective import Score
from ..errors import InputError, PlanError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.numeric import unit_length
from ..training.plan import Plan, attackable_rows, clean_loss, consecutive, replace_rows
from .est import displaced


class FARE:
    """Unsupervised adversarial fine-tuning (Schlarmann et al., ICML 2024, arXiv 2402.12336). It needs no labels.

    A copy of a trained model is fine-tuned so that its embeddings f(x') of perturbed images stay near f_0(x), the
    embeddings that the original model gives to the clean images. So embeddings that the original model has made, such
    as those of a gallery that is in use, can still be searched with the new model. In each step the loop passes the
    original's embeddings as references, row by row:

    ``loss_func(model(images), ref_emb=original(images))``, with the original in eval mode and under ``no_grad``.

    The attack raises ``|f(x') - f_0(x)|^2`` for each row, and training minimises its mean. Processes may share a batch.

    Args:
        clean_weight: weight of the mean ``|f(x) - f_0(x)|^2`` of the clean rows, which is added. The paper has 0.
        loss_weight: weight of the wrapped loss, which is added; it needs labels. The paper has 0: then the wrapped loss
            does not count.
        normalize: whether embeddings are brought to unit length first, as most retrieval does it. The paper does not.
        loss_with: what the wrapped loss compares the clean rows with, "references" or "copies". Copies are the
            perturbed rows: all pairs of clean and perturbed rows count, as without this plugin.

    Raises:
        InputError: a weight is no finite number from 0 on, `loss_with` is something else, or "copies" without a
            `loss_weight`.
    """

    def __init__(
        self,
        clean_weight: float = 0.0,
        loss_weight: float = 0.0,
        normalize: bool = True,
        loss_with: str = "references",
    ) -> None:
        self.clean_weight = check_number("clean_weight", clean_weight)
        self.loss_weight = check_number("loss_weight", loss_weight)
        self.normalize = normalize
        self.loss_with = check_choice("loss_with", loss_with, ("references", "copies"))
        if loss_with == "copies" and not loss_weight:
            raise InputError(
                "loss_with is 'copies', but the wrapped loss does not count: loss_weight is 0. Set loss_weight, such "
                "as FARE(loss_weight=0.5, loss_with='copies'), or leave out loss_with."
            )

    @hookimpl
    def pml_adversarial_plan(self, batch: Batch) -> Plan:
        """Every row but the references is replaced by its copy."""
        references = len(batch) - batch.num_queries
        if references != batch.num_queries:
            raise PlanError(
                f"FARE found {batch.num_queries} embeddings and {references} references; expected one reference for "
                "each embedding, that of the original model: loss_func(model(images), ref_emb=original(images))."
            )
        rows = attackable_rows(batch)
        return replace_rows(rows[rows < batch.num_queries], len(batch), batch.indices_tuple).split(batch.num_queries)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """The squared distance between a copy and the original's embedding."""
        origin = batch.context[batch.num_queries + plan.rows]
        targets = origin.norm(dim=1, keepdim=True) * displaced(origin)  # training starts where the original is
        return lambda embeddings: self._shift(embeddings, targets)

    @hookimpl
    def pml_adversarial_training_loss(
        self, wrapped: Callable[..., Tensor], batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Tensor:
        """The mean squared distance, with those of clean rows and the wrapped loss as far as they are weighted."""
        rows, references = batch.embeddings.split(batch.num_queries)
        targets = references.detach()
        loss = self._shift(adversarial.embeddings, targets[plan.rows]).mean()
        if self.clean_weight:
            loss = loss + self.clean_weight * self._shift(rows, targets).mean()
        return loss + self.loss_weight * self._wrapped(wrapped, batch, plan, adversarial) if self.loss_weight else loss

    def _wrapped(self, wrapped: Callable[..., Tensor], batch: Batch, plan: Plan, adversarial: Adversarial) -> Tensor:
        if self.loss_with == "references":
            return clean_loss(wrapped, batch)
        if batch.labels is None or batch.indices_tuple is not None:
            found = "no labels of rows and references" if batch.labels is None else "tuples, which name references"
            raise PlanError(
                f"FARE(loss_with='copies') found {found}; expected both labels and no tuples: "
                "loss_func(model(images), labels, ref_emb=original(images), ref_labels=labels)."
            )
        copies = consecutive(batch.num_rows, batch.num_rows + len(plan), plan.rows.device)
        seen = torch.cat([consecutive(0, batch.num_queries, copies.device), copies])
        loss: Tensor = Plan(plan.rows, seen, None).evaluate(wrapped, batch, adversarial.embeddings)
        return loss

    @hookimpl
    def pml_adversarial_record(self, adversarial: Adversarial) -> Mapping[str, Any]:
        """The mean squared distance that the attack reached."""
        return {"shift": adversarial.score_after.mean()} if len(adversarial.score_after) else {"shift": 0}

    def _shift(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        if self.normalize:
            embeddings, targets = unit_length(embeddings), unit_length(targets)
        return (embeddings - targets).square().sum(1)
