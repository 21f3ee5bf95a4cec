"""TRADES, carried over to embeddings: the clean loss, and a price on how an adversary changes a row's neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..attacks.objective import Score
from ..errors import InputError, PlanError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.objectives import exactly
from ..training.plan import Plan, clean_loss
from .rows import beside, check_weight, on_sphere, perturb_all, shift

_DIVERGENCES = ("neighbours", "distance")


class TRADES:
    """Consistency of clean and perturbed rows, after TRADES (Zhang et al., ICML 2019, arXiv 1901.08573, section 4).

    The paper trains a classifier on ``L(f(x), y) + max KL(f(x) || f(x')) / lambda``: the clean loss, and how far an
    adversary, who knows no label, can change the distribution over classes. Embeddings have no classes. What retrieval
    decides by is the order of a row's neighbours, so the distribution is over these: of row i over the other rows j of
    the batch, ``p_i(j) ~ exp(cos(f(x_i), f(x_j)) / temperature)``, as in stochastic neighbour embedding (Hinton and
    Roweis 2002) and in distillation of embeddings (CompRess, arXiv 2010.14713). With ``q_i`` the same of the perturbed
    row among the clean others, trained is ``L(x) + weight * mean_i KL(p_i || q_i)``, and the attack raises each
    ``KL(p_i || q_i)``.

    While an attack runs, the clean others are fixed; in training, gradient flows through all of them, as the authors'
    code has it. Other than `SES`, which counts every move alike, moves that leave the neighbours as they were cost
    nothing here, small ones cost little (their square) and those that bring other rows nearest cost most.
    ``divergence="distance"`` counts ``d(f(x'), f(x))^2`` instead: `SES` with a square, for batches in which neighbours
    mean little.

    At the clean row a divergence has no slope. The paper starts its attack from a little noise; here it is measured
    from a point 0.0001 beside the clean embedding, so that an attack needs no random start. The wrapper's
    ``clean_weight`` does not count: the loss is clean already. Any loss; processes may share a batch.

    Args:
        weight: of the mean divergence, ``1 / lambda``, from 0 on. The paper has 1 and 6 beside a cross-entropy.
        divergence: "neighbours" or "distance".
        temperature: of the neighbours; the lower, the more the nearest count.
    """

    def __init__(self, weight: float = 1.0, divergence: str = "neighbours", temperature: float = 0.1) -> None:
        check_weight(weight)
        if divergence not in _DIVERGENCES:
            raise InputError(f"divergence={divergence!r}; expected {' or '.join(map(repr, _DIVERGENCES))}.")
        number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not (number and 0 < temperature < math.inf):
            raise InputError(f"temperature={temperature!r}; expected a finite number above 0, such as 0.1.")
        self.weight, self.divergence, self.temperature = weight, divergence, temperature

    @hookimpl
    def pml_adversarial_plan(self, batch: Batch) -> Plan:
        """Every row is replaced.

        Raises:
            PlanError: with less than two other rows, there is no distribution over them.
        """
        if self.divergence == "neighbours" and len(batch) < 3:
            raise PlanError(
                f"A batch of {len(batch)} rows leaves {len(batch) - 1} neighbours to a row; expected 3 rows or more, "
                "or TRADES(divergence='distance')."
            )
        return perturb_all(batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """The divergence of a copy from its row."""
        return self._divergence(beside(batch.context[plan.rows]), batch.context, plan)

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
        """From ``(M, D)`` rows, among ``(N, D)`` clean rows."""
        if self.divergence == "distance":
            return lambda embeddings: shift(embeddings, origin).square()
        itself = plan.rows[:, None] == torch.arange(len(batch_rows), device=plan.rows.device)

        def log_neighbours(rows: Tensor) -> Tensor:
            with exactly(rows):  # in half precision, close rows would be equally near
                similarity = on_sphere(rows) @ on_sphere(batch_rows).T / self.temperature
            return similarity.masked_fill(itself, -torch.inf).log_softmax(1)

        clean = log_neighbours(origin)

        def diverged(embeddings: Tensor) -> Tensor:
            surprise = (clean - log_neighbours(embeddings)).masked_fill(itself, 0)
            return (clean.exp() * surprise).sum(1)

        return diverged
