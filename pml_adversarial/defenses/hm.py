"""HM: triplets are made as hard as is good for training, and no harder (Zhou and Patel, CVPR 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.objective import Score
from ..errors import InputError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.plan import Plan
from ..training.tuples import ROLES, IndicesTuple
from .sampling import check_options, harder_triplets, triplets_for
from .triplets import hardness, per_copy, perturb_members, three_members

_DESTINATIONS = ("lga", "semihard", "softhard")


class HM:
    """Hardness manipulation with a gradual adversary (arXiv 2203.01439).

    The hardness of a triplet is ``H = d(a, p) - d(a, n)``, d the Euclidean distance at unit length. Anchor, positive
    and negative are perturbed jointly, each triplet in copies of its own, to lower ``min(0, H' - H_D) ** 2``: up to the
    destination hardness ``H_D`` and no further. The wrapped loss is taken on the perturbed triplets alone. A triplet
    that is as hard to begin with has no gradient; where all are, nothing is perturbed and the step trains on the clean
    triplets. The published loss is ``TripletMarginLoss(0.2, reducer=MeanReducer())``, with `ICS` beside it.

    Triplets are the caller's; of pairs, all that they form. Where none are given they are drawn, one for each row that
    has a positive and a negative. The published batches hold two images of each class, of which the first is the
    anchor: half as many triplets, as with ``anchors_per_class=1``, which draws the anchor. Where no positive qualifies
    as soft-hard, the published code may draw the anchor itself; here another positive is drawn.

    The published attack stops where the objective moves by less than 1e-7; here the caller's takes all its steps. It
    may start at the clean inputs. A loss that looks at rows beyond its triplets sees all copies, also those of one row.
    With reference rows, triplets reach into these, and the loss is taken on the members without a reference. Where
    processes share a batch, each moves its members while those of the others stay clean.

    Args:
        source: how triplets are drawn: "softhard", "semihard" or "random", see `sampling.sample_triplets`.
        destination: "lga": the linear gradual adversary, ``H_D = -margin * min(L, cap) / cap``, one number for
            all triplets, L the mean ``[H' + margin]+`` of the perturbed triplets of the step before (in the first step:
            the cap). It asks for more as training goes well. L is the published loss whatever loss is wrapped, so that
            a reducer, another scale, and what other plugins add do not change it. "semihard" or "softhard": the
            hardness of a benign triplet of the same anchor ("semihard": and positive), drawn so from the clean batch.
        margin: gamma of the paper: of "lga", of L, and of what is semi-hard.
        cap: u of the paper: "lga" asks for ``-margin`` while L is above it; None: the margin.
        anchors_per_class: draw at most so many anchors of each class; None: every row is one.

    Attributes:
        last_loss: ``()`` L, after a step.

    Raises:
        InputError: an option cannot be.
    """

    def __init__(
        self,
        source: str = "softhard",
        destination: str = "lga",
        margin: float = 0.2,
        cap: float | None = None,
        anchors_per_class: int | None = None,
    ) -> None:
        check_options(source, anchors_per_class)
        if destination not in _DESTINATIONS:
            raise InputError(f"destination={destination!r}; expected one of {', '.join(map(repr, _DESTINATIONS))}.")
        self.source, self.destination, self.anchors_per_class = source, destination, anchors_per_class
        self.margin = _positive("margin", margin)
        self.cap = self.margin if cap is None else _positive("cap", cap)
        self.last_loss: float | Tensor = math.inf

    @hookimpl
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """All members of the triplets."""
        triplets = triplets_for(wrapped, batch, self.source, self.margin, self.anchors_per_class)
        return perturb_members(triplets, ROLES, batch)

    @hookimpl
    def pml_adversarial_score(self, batch: Batch, plan: Plan) -> Score:
        """What its triplet lacks of the destination hardness, squared and with the opposite sign."""
        return _MissingHardness(batch, plan, self._destination(batch, plan))

    @hookimpl
    def pml_adversarial_record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> None:
        """Nothing; but L is remembered for the next step."""
        found = hardness(*three_members(plan, batch.embeddings, adversarial.embeddings))
        self.last_loss = (found + self.margin).relu().mean()

    def state_dict(self) -> dict[str, Any]:
        """L of the last step."""
        return {"last_loss": float(self.last_loss)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.last_loss = state["last_loss"]

    def _destination(self, batch: Batch, plan: Plan) -> Tensor:
        """The hardness that is asked for: ``(T,)``, or one number ``()`` for all triplets."""
        if self.destination == "lga":
            last = torch.as_tensor(self.last_loss, dtype=torch.float32, device=batch.context.device)
            return -self.margin * last.clamp(max=self.cap) / self.cap
        harder = harder_triplets(self.destination, batch, _in_batch_rows(plan, len(batch)), self.margin)
        return hardness(*(batch.context[member] for member in harder))


class _MissingHardness:
    """What the triplets of each copy lack of a destination hardness, squared, with the opposite sign."""

    def __init__(self, batch: Batch, plan: Plan, destination: Tensor) -> None:
        self.batch, self.plan, self.destination = batch, plan, destination

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``(M, D)`` -> scores ``(M,)``, 0 for a copy whose triplets are hard enough."""
        found = hardness(*three_members(self.plan, self.batch.context, embeddings))
        return per_copy(self.plan, -(found - self.destination).clamp(max=0).square(), len(self.batch))

    @staticmethod
    def satisfied(values: Tensor) -> Tensor:
        """Copies whose triplets are all hard enough."""
        return values == 0


def _in_batch_rows(plan: Plan, num_rows: int) -> IndicesTuple:
    """The triplets of a plan, in the clean rows that its members were copied from."""
    row = torch.arange(num_rows, device=plan.rows.device)[:, None]
    return tuple(member.flatten() for member in three_members(plan, row, plan.rows[:, None]))


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{name}={value!r}; expected a finite number above 0, such as 0.2.")
    return float(value)
