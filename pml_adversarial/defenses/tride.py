"""CA-TRIDE: collapse-aware triplet decoupling (Tian et al., ICML 2024, arXiv 2312.07364)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.objective import Score
from ..errors import InputError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.numeric import at_least_float
from ..training.plan import Plan
from .sampling import check_options, triplets_for
from .triplets import distance, perturb_members, three_members

_ROLES = {"candidates": ("positive", "negative"), "anchor": ("anchor",)}


class TRIDE:
    """Perturbs the candidates (p, n) and the anchor of triplets in turn, with the collapse of the batch in mind.

    With d the Euclidean distance on the unit sphere, D_ap and D_an are means of d(a, p) and d(a, n) over the triplets
    in which large distances weigh more (`weighted_mean`), and the *collapseness* is ``D_ap - D_an``. An attack on

    - the candidates lowers ``[D_an - D_ap]+``: it raises the collapseness while that is below 0;
      trained is (a, p', n').
    - the anchor lowers ``[D_ap - D_an]+ + gamma [A - S]+``: it undoes a collapse, and leads anchors from where they
      were (S, the mean of d(a', a)) to their negatives (A, the mean of the smallest half of d(a', n)), the less so the
      lower the collapseness is: ``gamma = exp(-[D_an - D_ap]+)``, without gradient; trained is (a', p, n).

    The loss is the wrapped one on these triplets, plus
    ``weight * [mean(smallest half of d(a, p)) - mean(smallest half of d(a, n)) + margin]+``. That term is added to
    whatever the other plugins answer. The published loss is ``TripletMarginLoss(0.2, reducer=MeanReducer())``.

    Both objectives are hinged, as published. Where one is satisfied on the clean batch (below ``tolerance``), nothing
    is perturbed and the step trains on its clean triplets; where it gets there during an attack by gradients, the
    attack stays where it is.

    **The schedule.** The published code keeps eps, and multiplies the step alpha by e/E in epoch e of E; the margin
    within which negatives are mined shrinks with the same e/E. Here e/E is ``batch.strength``: pass as ``warmup`` the
    number of *all* training steps. The strength multiplies eps too. That changes nothing where the attack cannot reach
    eps (``steps * alpha <= eps``: 16 steps of 3/255 within 77/255), since both sides shrink alike. Where it can (16
    steps of 1/255 within 8/255), the published code may use ``min(eps, steps * alpha * e/E)``, and we ``eps * e/E``,
    unless the attack is a factory that takes ``alpha`` and keeps an ``eps`` of its own. The strength grows from step to
    step, not from epoch to epoch: unperturbed is the first step, not the whole first epoch. Without ``warmup``, attack
    and margin are those of the end.

    Triplets are the caller's; of pairs, all that they form. Where none are given they are drawn on the clean
    embeddings: for each row that has a positive and a negative, a positive, and among the negatives that are further
    than it by less than the margin one at random or, where there is none, among all. The published batches hold two
    images of each class, of which the first is the anchor: half as many triplets, as with ``anchors_per_class=1``,
    which draws the anchor.

    A loss that looks at rows beyond its triplets sees all copies, also those of one row. With reference rows, triplets
    reach into these, and the loss is taken on the members without a reference. An `AdversarialMiner` refuses the
    method. Where processes share a batch, each moves its copies while those of the others stay clean.

    Args:
        sharpness: lambda of the weighted means; 0 for plain means. Published: 10 on CUB, 9.5 on CARS, 2 on SOP.
        pull: weight of ``gamma [A - S]+``.
        smallest: share of the distances that counts as the smallest "half", in A and in the loss; at least one does.
        weight: of the term in the loss.
        margin: of that term.
        mining_margin: within it negatives are mined at strength 0.
        mining_shrinkage: at strength s it is ``mining_margin * (1 - mining_shrinkage * s) ** 2``.
        tolerance: below it an objective is satisfied.
        first: "candidates" or "anchor", what the first step perturbs.
        anchors_per_class: draw at most so many anchors of each class; None: every row is one.

    Raises:
        InputError: an option cannot be.
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
        check_options("semihard", anchors_per_class)
        self.sharpness = _number("sharpness", sharpness)
        self.pull = _number("pull", pull)
        self.smallest = _number("smallest", smallest, 1)
        self.weight = _number("weight", weight)
        self.margin = _number("margin", margin)
        self.mining_margin = _number("mining_margin", mining_margin)
        self.mining_shrinkage = _number("mining_shrinkage", mining_shrinkage, 1)
        self.tolerance = _number("tolerance", tolerance)
        if first not in tuple(_ROLES):
            raise InputError(f"first={first!r}; expected 'candidates' or 'anchor', what the first step perturbs.")
        self.first, self.anchors_per_class = first, anchors_per_class
        self.steps = 0

    @property
    def perturbs(self) -> str:
        """What the coming step perturbs: "candidates" or "anchor"."""
        second = "anchor" if self.first == "candidates" else "candidates"
        return second if self.steps % 2 else self.first

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """The candidates of each triplet, or its anchor."""
        margin = self.mining_margin * (1 - self.mining_shrinkage * batch.strength) ** 2
        triplets = triplets_for(wrapped, batch, "semihard", margin, self.anchors_per_class)
        return perturb_members(triplets, _ROLES[self.perturbs], batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """What the perturbation lowers, with the opposite sign."""
        objective = self.of_candidates if self.perturbs == "candidates" else self.of_anchor
        return _Lowered(objective, at_least_float(batch.context), plan, self.tolerance)

    @hookimpl(wrapper=True)
    def pml_adversarial_training_loss(
        self, batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Generator[None, Tensor, Tensor]:
        """What the others answer, and the weighted term."""
        loss = yield
        clean = at_least_float(batch.embeddings)
        anchors, positives, negatives = three_members(plan, clean, adversarial.embeddings)
        to_positive, to_negative = distance(anchors, positives), distance(anchors, negatives)
        gap = self._near(to_positive) - self._near(to_negative) + self.margin
        return loss + self.weight * gap.relu()

    @hookimpl
    def pml_adversarial_record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> Mapping[str, Any]:
        """The collapseness before and after the attack, and whose turn it was.

        Counts the step: the last question of it, which miners ask as well.
        """
        turn = self.perturbs
        self.steps += 1
        clean = at_least_float(batch.embeddings)
        return {
            "collapseness_before": self.collapseness(*three_members(plan, clean, clean[plan.rows])),
            "collapseness_after": self.collapseness(*three_members(plan, clean, adversarial.embeddings)),
            "anchors_perturbed": float(turn == "anchor"),
        }

    def collapseness(self, anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """How much further positives are than negatives, of embeddings ``(T, D)``: a scalar, above 0 in a collapse."""
        to_positive = weighted_mean(distance(anchors, positives), self.sharpness)
        return to_positive - weighted_mean(distance(anchors, negatives), self.sharpness)

    def of_candidates(self, anchors: Tensor, positives: Tensor, negatives: Tensor, clean_anchors: Tensor) -> Tensor:
        """What candidates are perturbed to lower, of embeddings ``(T, D)``."""
        return (-self.collapseness(anchors, positives, negatives)).relu()

    def of_anchor(self, anchors: Tensor, positives: Tensor, negatives: Tensor, clean_anchors: Tensor) -> Tensor:
        """What anchors are perturbed to lower, of embeddings ``(T, D)``."""
        collapseness = self.collapseness(anchors, positives, negatives)
        gamma = torch.exp(-(-collapseness.detach()).relu())
        to_negatives = self._near(distance(anchors, negatives))
        shift = distance(anchors, clean_anchors).mean()
        return collapseness.relu() + self.pull * gamma * (to_negatives - shift).relu()

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.steps = state["steps"]

    def _near(self, distances: Tensor) -> Tensor:
        count = max(1, int(self.smallest * len(distances)))
        return distances.topk(count, largest=False).values.mean()


class _Lowered:
    """An objective of the triplets, with the opposite sign; it has no gradient where it is satisfied."""

    def __init__(self, objective: Callable[..., Tensor], context: Tensor, plan: Plan, tolerance: float) -> None:
        self.objective, self.context, self.plan, self.tolerance = objective, context, plan, tolerance
        self.clean_anchors = three_members(plan, context, context[plan.rows])[0]

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``(M, D)`` -> a scalar."""
        value = self.objective(*three_members(self.plan, self.context, embeddings), self.clean_anchors)
        return -torch.where(value < self.tolerance, value.detach(), value)

    def satisfied(self, values: Tensor) -> Tensor:
        """All copies, where the objective is below the tolerance."""
        return values > -self.tolerance


def weighted_mean(distances: Tensor, sharpness: float) -> Tensor:
    """Mean of ``(T,)`` with weights ``exp(sharpness * (d - max d))``, which carry gradient as well."""
    return (torch.softmax(sharpness * distances, 0) * distances).sum()


def _number(name: str, value: float, highest: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest or value == math.inf:
        bound = "from 0 on" if highest == math.inf else f"from 0 to {highest}"
        raise InputError(f"{name}={value!r}; expected a number {bound}.")
    return float(value)
