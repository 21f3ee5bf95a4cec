"""CA-TRIDE: collapse-aware triplet decoupling (Tian et al., ICML 2024, arXiv 2312.07364)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.checks import check_choice, check_number
from ..attacks.objective import Score
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.numeric import at_least_float
from ..training.plan import Plan
from .triplets import check_sampling, distance, perturb_members, three_members, triplets_for

_ROLES = {"candidates": ("positive", "negative"), "anchor": ("anchor",)}


class TRIDE:
    """Perturbs in turn the candidates (p, n) and the anchor of triplets, and takes account of how far they collapsed.

    d is the Euclidean distance at unit length. D_ap and D_an are means of d(a, p) and d(a, n) over the triplets, in
    which large distances weigh more (`weighted_mean`). The *collapseness* of the batch is ``D_ap - D_an``.

    - An attack on the candidates lowers ``[D_an - D_ap]+``: it raises the collapseness while this is below 0. The step
      trains on (a, p', n').
    - An attack on the anchor lowers ``[D_ap - D_an]+ + gamma [A - S]+``: it undoes a collapse, and moves anchors away
      from where they were and toward their negatives. S is the mean of d(a', a), A the mean of the smallest half of
      d(a', n). The lower the collapseness, the less the second term counts: ``gamma = exp(-[D_an - D_ap]+)``, without
      gradient. The step trains on (a', p, n).

    The loss is that of the other plugins, or the wrapped loss on these triplets, plus
    ``weight * [mean(smallest half of d(a, p)) - mean(smallest half of d(a, n)) + margin]+``. The published loss is
    ``TripletMarginLoss(0.2, reducer=MeanReducer())``.

    Both objectives have a hinge, as published; below ``tolerance`` they are satisfied, and the attack stops. Where this
    holds for the clean batch, nothing is perturbed, and the step trains on the clean triplets.

    **The schedule.** In epoch e of E, the published code multiplies the step alpha by e/E and keeps eps, and the margin
    within which negatives are mined shrinks with e/E. Here e/E is ``batch.strength``, which grows with each step: pass
    the number of *all* training steps as ``warmup``. The strength multiplies eps as well. This changes nothing where
    the attack cannot reach eps (``steps * alpha <= eps``). Where it can, the published attack reaches ``min(eps, steps
    * alpha * e/E)``, and this one ``eps * e/E``, unless the attack is a factory that takes ``alpha`` and has an ``eps``
    of its own. Without ``warmup``, attack and margin have their final values.

    Triplets that are drawn are "semihard". The module `triplets` says where else triplets come from, and what holds
    with reference rows, several processes, and losses that look beyond the triplets. `AdversarialMiner` refuses the
    method.

    Args:
        sharpness: lambda of the weighted means; 0 gives plain means. Published: 10 on CUB, 9.5 on CARS, 2 on SOP.
        pull: weight of ``gamma [A - S]+``.
        smallest: share of the distances that counts as the smallest "half", in A and in the loss; at least one does.
        weight: of the term that is added to the loss.
        margin: of the term that is added to the loss.
        mining_margin: the margin within which negatives are mined at strength 0.
        mining_shrinkage: at strength s the margin is ``mining_margin * (1 - mining_shrinkage * s) ** 2``.
        tolerance: an objective below it is satisfied.
        first: what the first step perturbs, "candidates" or "anchor".
        anchors_per_class: the largest number of anchors that are drawn of a class; None: every row is an anchor.

    Attributes:
        steps: number of steps that were taken.

    Raises:
        InputError: an option is out of its range.
    """

    def __init__(
        self,
        sharpness: float = 10.0,
        pull: float = 1.0,
        smallest: float = 0.5,
        weight: float = 0.5,
        margin: float = 0.04,
        mining_margin: float = 0.2,
        mining_shrinkage: float = 0.5,
        tolerance: float = 1e-5,
        first: str = "candidates",
        anchors_per_class: int | None = None,
    ) -> None:
        check_sampling("semihard", anchors_per_class)
        self.sharpness = check_number("sharpness", sharpness)
        self.pull = check_number("pull", pull)
        self.smallest = check_number("smallest", smallest, 0, 1)
        self.weight = check_number("weight", weight)
        self.margin = check_number("margin", margin)
        self.mining_margin = check_number("mining_margin", mining_margin)
        self.mining_shrinkage = check_number("mining_shrinkage", mining_shrinkage, 0, 1)
        self.tolerance = check_number("tolerance", tolerance)
        self.first = check_choice("first", first, _ROLES, hint=", what the first step perturbs")
        self.anchors_per_class = anchors_per_class
        self.steps = 0

    @property
    def perturbs(self) -> str:
        """What the next step perturbs: "candidates" or "anchor"."""
        second = "anchor" if self.first == "candidates" else "candidates"
        return second if self.steps % 2 else self.first

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """The candidates of each triplet are perturbed, or its anchor."""
        margin = self.mining_margin * (1 - self.mining_shrinkage * batch.strength) ** 2
        triplets = triplets_for(wrapped, batch, "semihard", margin, self.anchors_per_class)
        return perturb_members(triplets, _ROLES[self.perturbs], batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """The objective that the attack lowers, with the opposite sign."""
        objective = self.of_candidates if self.perturbs == "candidates" else self.of_anchor
        return _Lowered(objective, at_least_float(batch.context), plan, self.tolerance)

    @hookimpl(wrapper=True)
    def pml_adversarial_training_loss(
        self, batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Generator[None, Tensor, Tensor]:
        """The loss of the other plugins, plus the weighted term."""
        loss = yield
        clean = at_least_float(batch.embeddings)
        anchors, positives, negatives = three_members(plan, clean, adversarial.embeddings)
        to_positive, to_negative = distance(anchors, positives), distance(anchors, negatives)
        gap = self._mean_of_smallest(to_positive) - self._mean_of_smallest(to_negative) + self.margin
        return loss + self.weight * gap.relu()

    @hookimpl
    def pml_adversarial_record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> Mapping[str, Any]:
        """The collapseness before and after the attack, and whether anchors were perturbed. Counts the step."""
        turn = self.perturbs
        self.steps += 1
        clean = at_least_float(batch.embeddings)
        return {
            "collapseness_before": self.collapseness(*three_members(plan, clean, clean[plan.rows])),
            "collapseness_after": self.collapseness(*three_members(plan, clean, adversarial.embeddings)),
            "anchors_perturbed": float(turn == "anchor"),
        }

    def collapseness(self, anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """How much further positives are than negatives, given ``(T, D)``: a scalar, above 0 in a collapse."""
        to_positive = weighted_mean(distance(anchors, positives), self.sharpness)
        return to_positive - weighted_mean(distance(anchors, negatives), self.sharpness)

    def of_candidates(self, anchors: Tensor, positives: Tensor, negatives: Tensor, clean_anchors: Tensor) -> Tensor:
        """The objective of an attack on candidates, given embeddings ``(T, D)``: a scalar that the attack lowers."""
        return (-self.collapseness(anchors, positives, negatives)).relu()

    def of_anchor(self, anchors: Tensor, positives: Tensor, negatives: Tensor, clean_anchors: Tensor) -> Tensor:
        """The objective of an attack on anchors, given embeddings ``(T, D)``: a scalar that the attack lowers."""
        collapseness = self.collapseness(anchors, positives, negatives)
        gamma = torch.exp(-(-collapseness.detach()).relu())
        to_negatives = self._mean_of_smallest(distance(anchors, negatives))
        shift = distance(anchors, clean_anchors).mean()
        return collapseness.relu() + self.pull * gamma * (to_negatives - shift).relu()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps that were taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned."""
        self.steps = state["steps"]

    def _mean_of_smallest(self, distances: Tensor) -> Tensor:
        count = max(1, int(self.smallest * len(distances)))
        return distances.topk(count, largest=False).values.mean()


class _Lowered:
    """An objective of the triplets with the opposite sign. It has no gradient where it is satisfied."""

    def __init__(self, objective: Callable[..., Tensor], context: Tensor, plan: Plan, tolerance: float) -> None:
        self.objective, self.context, self.plan, self.tolerance = objective, context, plan, tolerance
        self.clean_anchors = three_members(plan, context, context[plan.rows])[0]

    def __call__(self, embeddings: Tensor) -> Tensor:
        value = self.objective(*three_members(self.plan, self.context, embeddings), self.clean_anchors)
        return -torch.where(value < self.tolerance, value.detach(), value)

    def satisfied(self, values: Tensor) -> Tensor:
        return values > -self.tolerance


def weighted_mean(distances: Tensor, sharpness: float) -> Tensor:
    """Mean of ``(T,)`` distances with weights ``exp(sharpness * (d - max d))``, which carry gradient too."""
    return (torch.softmax(sharpness * distances, 0) * distances).sum()
