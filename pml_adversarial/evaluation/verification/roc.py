"""How well a threshold of similarity tells genuine pairs from impostor pairs.

A pair is accepted if ``similarity >= threshold``. The true accept rate (TAR) is the share of genuine pairs that are
accepted, the false accept rate (FAR) that of impostor pairs. Intervals are Clopper-Pearson's, of 95 %; they presume
that pairs are independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..reports.binomial import CONFIDENCE, rate_interval, rate_lower_bounds

_ONE_IN_1000 = -3.09  # standard deviations
_ROUNDING = 1e-9  # of a product of a rate and a number of pairs


@dataclass(frozen=True)
class Rate:
    """A share of pairs.

    Attributes:
        count: pairs of which something is true.
        total: pairs.
        rate: the share; None if there are no pairs.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    count: int
    total: int
    rate: float | None
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> Rate:
        """The share and its interval.

        >>> Rate.of(0, 4)
        Rate(count=0, total=4, rate=0.0, low=0.0, high=0.6023646356164746)
        """
        if not total:
            return cls(0, 0, None, 0.0, 1.0)
        return cls(count, total, count / total, *rate_interval(count, total))


@dataclass(frozen=True)
class EqualErrorRate:
    """The lowest rate to which one threshold holds both errors: impostors that are accepted, genuine ones that are not.

    Where one threshold makes both equal, it is the equal error rate that is found in between by interpolation.

    Attributes:
        rate: the rate.
        low: lower end of its interval.
        high: upper end of its interval.
        threshold: in the middle of all thresholds that hold both errors to the rate.
    """

    rate: float
    low: float
    high: float
    threshold: float


@dataclass(frozen=True, eq=False)
class PairScores:
    """How similar pairs are.

    Attributes:
        similarities: ``(n,)``, in double precision.
        same: ``(n,)`` bool, whether a pair is genuine.
        tie: similarities that differ by less may be equal but for rounding. This counts against the model: each
            impostor pair counts as more similar by this much.
    """

    similarities: Tensor
    same: Tensor
    tie: float = 0.0

    def __getitem__(self, rows: Tensor) -> PairScores:
        rows = rows.to(self.same.device)
        return PairScores(self.similarities[rows], self.same[rows], self.tie)

    def accepted(self, threshold: float) -> Tensor:
        """``(n,)`` bool, which pairs are accepted at a threshold."""
        return torch.where(self.same, self.similarities, self.similarities + self.tie) >= threshold

    def roc(self) -> ROC:
        """The receiver operating characteristic."""
        return ROC(self.similarities[self.same], self.similarities[~self.same], self.tie)


class ROC:
    """Receiver operating characteristic of similarities.

    Args:
        genuine: ``(G,)`` similarities of genuine pairs, one at least.
        impostors: ``(I,)`` similarities of impostor pairs, one at least.
        tie: see `PairScores`.

    Attributes:
        genuine: ascending, in double precision.
        impostors: ascending, in double precision, with ``tie`` added.
        tie: see `PairScores`.
    """

    def __init__(self, genuine: Tensor, impostors: Tensor, tie: float = 0.0) -> None:
        self.tie = tie
        self.genuine = genuine.detach().double().cpu().sort().values
        self.impostors = impostors.detach().double().cpu().sort().values + tie

    def tar(self, threshold: float) -> Rate:
        """True accept rate at a threshold."""
        return Rate.of(_at_least(self.genuine, threshold), len(self.genuine))

    def far(self, threshold: float) -> Rate:
        """False accept rate at a threshold."""
        return Rate.of(_at_least(self.impostors, threshold), len(self.impostors))

    def accuracy(self, threshold: float) -> Rate:
        """Share of all pairs that are genuine and accepted, or impostors and not accepted."""
        tar, far = self.tar(threshold), self.far(threshold)
        return Rate.of(tar.count + far.total - far.count, tar.total + far.total)

    def curve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds ``(T,)``, descending from infinity to the lowest similarity, and FAR and TAR ``(T,)`` at each."""
        thresholds = torch.cat([self.genuine, self.impostors]).unique()
        thresholds = torch.cat([thresholds, thresholds.new_tensor([torch.inf])]).flip(0)
        far, tar = (
            1 - torch.searchsorted(found, thresholds) / torch.tensor(len(found), dtype=torch.float64)
            for found in (self.impostors, self.genuine)
        )
        return thresholds, far, tar

    def threshold_at(self, far: float) -> float | None:
        """The lowest threshold at which the false accept rate is ``far`` at most.

        None if ``far`` is below one of the number of impostor pairs: so few pairs cannot show such a rate.
        """
        allowed = math.floor(far * len(self.impostors) + _ROUNDING)
        if not allowed:
            return None
        first_refused = self.impostors[-1 - min(allowed, len(self.impostors) - 1)]
        return math.nextafter(float(first_refused), math.inf)

    @property
    def auc(self) -> float:
        """Area under the curve: how likely a genuine pair is more similar than an impostor pair. Ties count as not."""
        return float(torch.searchsorted(self.impostors, self.genuine).double().mean()) / len(self.impostors)

    @property
    def is_reversed(self) -> bool:
        """Whether genuine pairs are less similar than impostor pairs, by more than chance makes in 1 of 1000 cases.

        This is the test of Mann and Whitney in its normal approximation; equal similarities count as a half.
        """
        one, other = len(self.genuine), len(self.impostors)
        higher = torch.searchsorted(self.impostors, self.genuine)
        as_high = torch.searchsorted(self.impostors - 2 * self.tie, self.genuine, right=True)
        wins = float((higher + as_high).double().sum()) / 2
        return wins - one * other / 2 < _ONE_IN_1000 * math.sqrt(one * other * (one + other + 1) / 12)

    @cached_property
    def equal_error_rate(self) -> EqualErrorRate:
        """The equal error rate, with its interval."""
        steps, rejected = self.genuine.unique(return_counts=True)
        rejected = torch.cat([rejected.new_zeros(1), rejected.cumsum(0)])  # of the thresholds between two steps
        accepted = len(self.impostors) - torch.searchsorted(self.impostors, steps)
        highest = torch.cat([accepted, accepted.new_zeros(1)])  # at the highest of these thresholds
        lowest = len(self.impostors) - torch.searchsorted(self.impostors, steps, right=True)
        lowest = torch.cat([lowest.new_full((1,), len(self.impostors)), lowest])
        rate = torch.maximum(self._frr(rejected), self._far(highest)).min()
        (missed, _), (passed, _) = self._bounds(rejected, highest)
        (_, most_missed), (_, most_passed) = self._bounds(rejected, lowest)
        low, high = torch.maximum(missed, passed).min(), torch.minimum(most_missed, most_passed).max()
        return EqualErrorRate(float(rate), float(low), float(high), self._middle(float(rate)))

    def _frr(self, rejected: Tensor) -> Tensor:
        return rejected.double() / len(self.genuine)

    def _far(self, accepted: Tensor) -> Tensor:
        return accepted.double() / len(self.impostors)

    def _bounds(self, rejected: Tensor, accepted: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Bounds of both errors. At the true threshold, they hold together with the probability `CONFIDENCE`."""
        risk = (1 - CONFIDENCE) / 2
        return _bounds(rejected, len(self.genuine), risk), _bounds(accepted, len(self.impostors), risk)

    def _middle(self, rate: float) -> float:
        """In the middle of all thresholds at which both errors are ``rate`` at most."""
        rejected, accepted = (math.floor(rate * len(found) + _ROUNDING) for found in (self.genuine, self.impostors))
        highest = float(self.genuine[min(rejected, len(self.genuine) - 1)])
        if accepted >= len(self.impostors):
            return highest
        first_refused = float(self.impostors[-1 - accepted])
        middle = (first_refused + highest) / 2
        return middle if middle > first_refused else highest


def _at_least(ascending: Tensor, threshold: float) -> int:
    return len(ascending) - int(torch.searchsorted(ascending, torch.tensor(threshold, dtype=torch.float64)))


def _bounds(counts: Tensor, total: int, risk: float) -> tuple[Tensor, Tensor]:
    """Ends of Clopper-Pearson intervals, each of which misses the true rate with probability ``risk`` at most."""
    return rate_lower_bounds(counts, total, risk / 2), 1 - rate_lower_bounds(total - counts, total, risk / 2)
