"""TRADES for embeddings: the loss on the clean batch, and a penalty on how an attack changes a row's neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..attacks.checks import check_choice, check_number
from ..attacks.objective import Score
from ..errors import PlanError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.numeric import unit_length
from ..training.objectives import exactly
from ..training.plan import Plan, clean_loss
from .est import displaced, embedding_shift, perturb_all_rows


class TRADES:
    """Consistency of clean and perturbed rows, after TRADES (Zhang et al., ICML 2019, arXiv 1901.08573, section 4).

    The paper trains a classifier on ``L(f(x), y) + max KL(f(x) || f(x')) / lambda``: the clean loss, and how far an
    attack that does not use the label can change the distribution over classes. Embeddings have no classes. So here the
    distribution is over the neighbours of a row, on which retrieval depends: for row i, over the other rows j of the
    batch, ``p_i(j) ~ exp(cos(f(x_i), f(x_j)) / temperature)``, as in stochastic neighbour embedding (Hinton and Roweis
    2002) and in distillation of embeddings (CompRess, arXiv 2010.14713). Let ``q_i`` be the distribution of the
    perturbed row over the same clean rows. The attack raises each ``KL(p_i || q_i)``, and training minimises
    ``L(x) + weight * mean_i KL(p_i || q_i)``.

    During the attack the other rows are fixed. In training, gradient flows through all rows, as in the authors' code.
    `SES` penalises all moves of the same length alike. Here small moves cost little (their square), and a move that
    brings other rows nearest costs most. ``divergence="distance"`` penalises ``d(f(x'), f(x))^2`` instead.

    ``divergence="decoupled"`` takes the two parts into which the gradient of KL falls apart (Cui et al., NeurIPS 2024,
    arXiv 2305.13948), with gradient through both distributions and equal weights of the parts: with ``o(j)`` and
    ``o'(j)`` the similarities of the clean and the perturbed row to row j, over the temperature, they are
    ``Var(o'(j) - o(j)) / 2`` over j ~ p_i, and ``KL(p_i || q_i)``. Both hold p_i fixed as weights. In the first,
    gradient flows through o and o'. The paper's mean weights of classes are left out, as rows have no classes here.

    The paper starts its attack from a little noise; here the divergence is measured from a row that is
    `est.displaced`. Any loss can be trained, and processes may share a batch.

    Args:
        weight: of the mean divergence, ``1 / lambda``, from 0 on. The paper has 1 and 6 beside a cross-entropy.
        divergence: "neighbours", "decoupled" or "distance".
        temperature: of the distributions over neighbours; the lower it is, the more the nearest rows count.

    Raises:
        InputError: an option is out of its range.
    """

    def __init__(self, weight: float = 1.0, divergence: str = "neighbours", temperature: float = 0.1) -> None:
        self.weight = check_number("weight", weight)
        self.divergence = check_choice("divergence", divergence, ("neighbours", "decoupled", "distance"))
        self.temperature = check_number("temperature", temperature, above=True, hint=", such as 0.1")

    @hookimpl
    def pml_adversarial_plan(self, batch: Batch) -> Plan:
        """Every row is replaced by its copy; a row needs two neighbours or more."""
        if self.divergence != "distance" and len(batch) < 3:
            raise PlanError(
                f"In a batch of {len(batch)} rows, a row has {len(batch) - 1} neighbours; expected 3 rows or more, "
                "or TRADES(divergence='distance')."
            )
        return perturb_all_rows(batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """The divergence of a copy from its row."""
        return self._divergence(displaced(batch.context[plan.rows]), batch.context, plan)

    @hookimpl
    def pml_adversarial_training_loss(
        self, wrapped: Callable[..., Tensor], batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Tensor:
        """The clean loss and the weighted mean divergence."""
        diverged = self._divergence(batch.embeddings[plan.rows], batch.embeddings, plan)(adversarial.embeddings)
        return clean_loss(wrapped, batch) + self.weight * diverged.mean()

    @hookimpl
    def pml_adversarial_record(self, adversarial: Adversarial) -> Mapping[str, Any]:
        """The mean divergence that the attack reached."""
        return {"divergence": adversarial.score_after.mean()} if len(adversarial.score_after) else {"divergence": 0}

    def _divergence(self, origin: Tensor, batch_rows: Tensor, plan: Plan) -> Score:
        """The divergence from rows ``(M, D)``, among clean rows ``(N, D)``."""
        if self.divergence == "distance":
            return lambda embeddings: embedding_shift(embeddings, origin).square()
        itself = plan.rows[:, None] == torch.arange(len(batch_rows), device=plan.rows.device)

        def log_neighbours(rows: Tensor) -> Tensor:
            with exactly(rows):  # in half precision, close rows would be equally near
                similarity = unit_length(rows) @ unit_length(batch_rows).T / self.temperature
            return similarity.masked_fill(itself, -torch.inf).log_softmax(1)

        clean = log_neighbours(origin)

        def diverged(embeddings: Tensor) -> Tensor:
            surprise = (clean - log_neighbours(embeddings)).masked_fill(itself, 0)
            return (clean.exp() * surprise).sum(1)

        def decoupled(embeddings: Tensor) -> Tensor:
            near = log_neighbours(embeddings)
            change, fixed = (clean - near).masked_fill(itself, 0), clean.detach()
            weights = fixed.exp()
            mean = (weights * change).sum(1, keepdim=True)
            variance = (weights * (change - mean).square()).sum(1)
            return variance / 2 + (weights * (fixed - near).masked_fill(itself, 0)).sum(1)

        return diverged if self.divergence == "neighbours" else decoupled
