"""What each loss can take: whether copies of rows may be appended to the batch, join a reference, or replace rows.

A test holds the table to experiments with the losses. A loss that it does not know is asked by `loss_trials`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import isroutine
from typing import Literal

from pytorch_metric_learning import distances, losses, reducers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn

from .tuples import ROLES

Copies = Literal["append", "reference", "replace"]
"""How copies stand, so that the loss keeps its value while nothing is perturbed.

- "append": they follow the rows of the batch; the tuples in which a row plays the role are re-pointed to its copy.
- "reference": copies of anchors take their rows' places, the others are handed over as reference embeddings; tuples
  are re-pointed. The number of rows stays what it was.
- "replace": each copy takes its row's place, in all of the row's tuples.
"""


@dataclass(frozen=True)
class LossSupport:
    """What a loss can take.

    Attributes:
        copies: how copies may stand.
        roles: that the loss tells apart; copies for other roles replace their rows.
        takes_reference: whether copies may join a reference.
        adds_up: what contributes on its own. "tuples": each pair or triplet, so that the tuples of one anchor may name
            different copies of it. "anchors": each anchor with all of its tuples, so that it needs one copy. "pairs":
            as "anchors", and a pair that several triplets name counts once, so that its members need one copy each.
        takes_triplets: whether the loss forms triplets; it then joins given pairs that have an anchor in common.
        takes_tuples: whether the loss takes tuples at all.
        is_row_separable: whether the loss is a sum of what each row contributes alone, apart from its reducer.
        beside_clean: whether one batch may hold rows and their copies, early in training nearly equal ones.
        memory_size: the most rows that one batch may hold; None: no limit.
    """

    copies: Copies = "replace"
    roles: tuple[str, ...] = ROLES
    takes_reference: bool = True
    adds_up: Literal["tuples", "anchors", "pairs"] = "tuples"
    takes_triplets: bool = False
    takes_tuples: bool = True
    is_row_separable: bool = False
    beside_clean: bool = True
    memory_size: int | None = None

    def copies_for(self, roles: tuple[str, ...], has_reference: bool) -> Copies:
        """How copies stand for these roles, in a batch with or without a reference of the caller's."""
        if self.copies == "replace" or not set(roles) <= set(self.roles):
            return "replace"
        if has_reference or self.copies == "reference":
            return "reference" if self.takes_reference else "replace"
        return "append"

    def may_copy_per_tuple(self, roles: tuple[str, ...], members: int) -> bool:
        """Whether each of several tuples of an anchor may have copies of its own.

        Args:
            roles: which members are copied.
            members: 3 for triplets, 4 for pairs.
        """
        joins_anchors = self.adds_up != "tuples" or (self.takes_triplets and members == 4)
        joins_pairs = self.adds_up == "pairs" and members == 3
        return not joins_pairs and not (joins_anchors and "anchor" in roles)

    def holds(self, rows: int) -> bool:
        """Whether one batch may hold so many rows."""
        return self.memory_size is None or rows <= self.memory_size


_OF_PAIRS = LossSupport("append")
_OF_TRIPLETS = LossSupport("append", takes_triplets=True)
_OF_ANCHORS = LossSupport("append", adds_up="anchors")
_OF_MASKS = LossSupport("reference", adds_up="pairs")  # of all pairs of rows; the reducer may average over rows
_OF_LISTS = LossSupport()  # tuples are turned into weights of rows
_OF_ROWS = LossSupport(is_row_separable=True)  # classes and proxies; tuples are turned into weights of rows
_WITHOUT_TUPLES = LossSupport(takes_tuples=False)

SUPPORT: dict[type[nn.Module], LossSupport] = {
    losses.AngularLoss: _OF_LISTS,
    losses.ArcFaceLoss: _OF_ROWS,
    losses.CircleLoss: _OF_MASKS,
    losses.ContrastiveLoss: _OF_PAIRS,
    losses.CosFaceLoss: _OF_ROWS,
    losses.DynamicSoftMarginLoss: _OF_TRIPLETS,
    losses.FastAPLoss: _OF_LISTS,
    losses.GeneralizedLiftedStructureLoss: _OF_MASKS,
    losses.HistogramLoss: LossSupport(beside_clean=False),  # raises at a similarity of exactly 1
    losses.InstanceLoss: LossSupport(takes_tuples=False, beside_clean=False),  # its first rows stand for the classes
    losses.IntraPairVarianceLoss: _OF_PAIRS,
    losses.LargeMarginSoftmaxLoss: _OF_ROWS,
    losses.LiftedStructureLoss: LossSupport("reference", roles=("anchor", "negative"), adds_up="anchors"),
    losses.ManifoldLoss: _WITHOUT_TUPLES,
    losses.MarginLoss: _OF_TRIPLETS,
    losses.MultiSimilarityLoss: _OF_MASKS,
    losses.NCALoss: _OF_LISTS,
    losses.NPairsLoss: LossSupport(  # looks at the first pair of each class
        "append", roles=("anchor", "positive"), takes_reference=False, beside_clean=False
    ),
    losses.NTXentLoss: _OF_ANCHORS,
    losses.NormalizedSoftmaxLoss: _OF_ROWS,
    losses.P2SGradLoss: replace(_OF_ROWS, takes_tuples=False),
    losses.PNPLoss: _WITHOUT_TUPLES,
    losses.ProxyAnchorLoss: _OF_LISTS,
    losses.ProxyNCALoss: _OF_ROWS,
    losses.RankedListLoss: _WITHOUT_TUPLES,
    losses.SelfSupervisedLoss: _WITHOUT_TUPLES,
    losses.SignalToNoiseRatioContrastiveLoss: _OF_PAIRS,
    losses.SoftTripleLoss: _OF_ROWS,
    losses.SphereFaceLoss: _OF_ROWS,
    losses.SubCenterArcFaceLoss: _OF_ROWS,
    losses.SupConLoss: _OF_MASKS,
    losses.ThresholdConsistentMarginLoss: LossSupport("append", takes_reference=False),  # looks for it among queries
    losses.TripletMarginLoss: _OF_TRIPLETS,
    losses.TupletMarginLoss: LossSupport("append", adds_up="anchors", beside_clean=False),  # no gradient at 0 degrees
    losses.VICRegLoss: _WITHOUT_TUPLES,
    losses.CrossBatchMemory: LossSupport(),
    losses.MultipleLosses: LossSupport(),
}
if hasattr(losses, "SmoothAPLoss"):  # since PML 2.9; it wants the rows of a class side by side
    SUPPORT[losses.SmoothAPLoss] = LossSupport(beside_clean=False)

_REDUCERS = (
    reducers.AvgNonZeroReducer,
    reducers.ClassWeightedReducer,
    reducers.DivisorReducer,
    reducers.DoNothingReducer,
    reducers.MeanReducer,
    reducers.MultipleReducers,
    reducers.SumReducer,
    reducers.ThresholdReducer,
)
"""With these the table holds. `PerAnchorReducer` averages over rows and wants as many references as queries."""


def support_of(loss: nn.Module) -> LossSupport | None:
    """What the loss can take, with the options that it was made with; None where the table does not tell.

    It tells of classes that compute with PML's methods alone, with distances and reducers of PML.
    """
    if isinstance(loss, DistributedLossWrapper):
        return support_of(loss.loss)
    found: LossSupport | None = getattr(loss, "loss_support", None) or _of_class(type(loss))
    if found is None or not all(map(_is_known, loss.modules())):
        return None
    if isinstance(loss, losses.MultipleLosses):
        parts = loss.losses.values() if loss.is_dict else loss.losses
        return _of_several([support_of(part) for part in parts], loss.miners is not None)
    if isinstance(loss, losses.CrossBatchMemory):
        inner = support_of(loss.loss)
        return inner and replace(found, beside_clean=inner.beside_clean, memory_size=loss.memory_size)
    if getattr(loss, "swap", False):  # TripletMarginLoss then looks for positives of the reference among the queries
        found = replace(found, takes_reference=False)
    if getattr(loss, "embedding_regularizer", None) is not None and found.copies == "append":
        found = replace(found, copies="reference")  # it averages over rows
    return found


def _of_class(kind: type[nn.Module]) -> LossSupport | None:
    """The row of the table for the class, or for the class of PML with whose methods it computes."""
    known = next((base for base in kind.__mro__ if base in SUPPORT), None)
    if known is None:
        return None
    own = kind.__mro__[: kind.__mro__.index(known)]
    changed = any(_computes(name, value) and hasattr(known, name) for base in own for name, value in vars(base).items())
    return None if changed else SUPPORT[known]


def _computes(name: str, value: object) -> bool:
    """Whether a member of a class may change what the loss computes."""
    return (isroutine(value) or isinstance(value, property)) and name != "__init__" and not name.startswith("get_def")


def _is_known(part: nn.Module) -> bool:
    """Whether a part of a loss, if it is a distance or a reducer, is PML's."""
    if isinstance(part, distances.BaseDistance):
        return type(part).__module__.startswith("pytorch_metric_learning")
    return not isinstance(part, reducers.BaseReducer) or type(part) in _REDUCERS


def _of_several(parts: list[LossSupport | None], has_miners: bool) -> LossSupport | None:
    """What a weighted sum of losses can take: what all of them can. PML's `MultipleLosses` takes no reference."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    limits = [part.memory_size for part in known if part.memory_size is not None]
    appends = not has_miners and all(part.copies == "append" for part in known)
    return LossSupport(
        copies="append" if appends else "replace",
        roles=tuple(role for role in ROLES if all(role in part.roles for part in known)),
        takes_reference=False,
        adds_up=max((part.adds_up for part in known), key=["tuples", "anchors", "pairs"].index),
        takes_triplets=any(part.takes_triplets for part in known),
        takes_tuples=not has_miners and all(part.takes_tuples for part in known),
        is_row_separable=not has_miners and all(part.is_row_separable for part in known),
        beside_clean=all(part.beside_clean for part in known),
        memory_size=min(limits, default=None),
    )
