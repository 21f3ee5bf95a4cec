"""HM: an attack makes triplets as hard as a destination asks, and no harder (Zhou and Patel, CVPR 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.checks import check_choice, check_number
from ..attacks.objective import Score
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.plan import Plan
from ..training.tuples import ROLES
from .triplets import check_sampling, harder_triplets, hardness, per_copy, perturb_members, three_members, triplets_for


class HM:
    """Hardness manipulation with a gradual adversary (arXiv 2203.01439).

    The hardness of a triplet is ``H = d(a, p) - d(a, n)``, with d the Euclidean distance at unit length. Each triplet
    has its own copies of anchor, positive and negative. The attack perturbs all three to lower ``min(0, H' - H_D) **
    2``: the hardness rises to the destination ``H_D`` and no further. The wrapped loss is taken on the perturbed
    triplets alone. A triplet that is hard enough from the start is satisfied and does not move. Where all are, nothing
    is perturbed, and the step trains on the clean triplets. The published loss is ``TripletMarginLoss(0.2,
    reducer=MeanReducer())``, together with `ICS`.

    The module `triplets` says where triplets come from, and what holds with reference rows, several processes, and
    losses that look beyond the triplets.

    Where no positive is soft-hard, the published code may draw the anchor itself; here another positive is drawn. The
    published attack stops where the objective changes by less than 1e-7; here it takes all its steps.

    Args:
        source: how triplets are drawn: "softhard", "semihard" or "random", see `triplets.sample_triplets`.
        destination: "lga": the linear gradual adversary, ``H_D = -margin * min(L, cap) / cap``, one number for all
            triplets. L is the mean ``[H' + margin]+`` of the perturbed triplets of the last step, whichever loss is
            wrapped; in the first step it is the cap. "semihard" or "softhard": the hardness of a clean triplet with the
            same anchor, drawn as `triplets.harder_triplets` does.
        margin: gamma of the paper, which is used in "lga", in L, and by the strategy "semihard".
        cap: u of the paper; "lga" asks for ``-margin`` while L is above it; None: the margin.
        anchors_per_class: the largest number of anchors that are drawn of a class; None: every row is an anchor.

    Attributes:
        last_loss: L of the last step; infinite before the first one.

    Raises:
        InputError: an option is out of its range.
    """

    def __init__(
        self,
        source: str = "softhard",
        destination: str = "lga",
        margin: float = 0.2,
        cap: float | None = None,
        anchors_per_class: int | None = None,
    ) -> None:
        check_sampling(source, anchors_per_class)
        self.source, self.anchors_per_class = source, anchors_per_class
        self.destination = check_choice("destination", destination, ("lga", "semihard", "softhard"))
        self.margin = check_number("margin", margin, above=True, hint=", such as 0.2")
        self.cap = self.margin if cap is None else check_number("cap", cap, above=True, hint=", such as 0.2")
        self.last_loss: float | Tensor = math.inf

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """All members of the triplets are perturbed."""
        triplets = triplets_for(wrapped, batch, self.source, self.margin, self.anchors_per_class)
        return perturb_members(triplets, ROLES, batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """How much hardness the triplets of a copy lack, squared and with the opposite sign."""
        return _MissingHardness(batch, plan, self._destination(batch, plan))

    @hookimpl
    def pml_adversarial_record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> None:
        """Remembers L for the next step, and records nothing."""
        found = hardness(*three_members(plan, batch.embeddings, adversarial.embeddings))
        self.last_loss = (found + self.margin).relu().mean()

    def state_dict(self) -> dict[str, Any]:
        """L of the last step."""
        return {"last_loss": float(self.last_loss)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned."""
        self.last_loss = state["last_loss"]

    def _destination(self, batch: Batch, plan: Plan) -> Tensor:
        """The destination hardness: ``(T,)``, or one number ``()`` for all triplets."""
        if self.destination == "lga":
            last = torch.as_tensor(self.last_loss, dtype=torch.float32, device=batch.context.device)
            return -self.margin * last.clamp(max=self.cap) / self.cap
        # the triplets as rows of the batch, where a copy counts as the row that it was made from
        row = torch.arange(len(batch), device=plan.rows.device)[:, None]
        triplets = tuple(member.flatten() for member in three_members(plan, row, plan.rows[:, None]))
        harder = harder_triplets(self.destination, batch, triplets, self.margin)
        return hardness(*(batch.context[member] for member in harder))


class _MissingHardness:
    """The hardness that the triplets of each copy lack, squared and with the opposite sign; 0 where it lacks none."""

    def __init__(self, batch: Batch, plan: Plan, destination: Tensor) -> None:
        self.batch, self.plan, self.destination = batch, plan, destination

    def __call__(self, embeddings: Tensor) -> Tensor:
        found = hardness(*three_members(self.plan, self.batch.context, embeddings))
        return per_copy(self.plan, -(found - self.destination).clamp(max=0).square(), len(self.batch))

    @staticmethod
    def satisfied(values: Tensor) -> Tensor:
        return values == 0
