"""How likely a number of successes is, which success rates go with it, and whether two models differ in theirs.

SciPy's statistics take 0.4 seconds to import, so they are imported where they are used.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

CONFIDENCE = 0.95  #: Of all intervals in reports and comparisons.


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


def tail(count: int, total: int, rate: float) -> float:
    """Probability of ``count`` or more successes in ``total`` independent trials.

    >>> round(tail(10, 10, 0.5) * 2**10, 6)
    1.0
    """
    from scipy.stats import binom

    return float(binom.sf(count - 1, total, rate))


def upper_quantile(total: int, rate: float, risk: float) -> int:
    """The smallest number of successes that ``total`` trials exceed with a probability of at most ``risk``.

    >>> upper_quantile(10, 0.5, 0.001)
    9
    """
    from scipy.stats import binom

    return int(binom.isf(risk, total, rate))


def rate_lower_bounds(successes: Tensor, total: int, risk: float) -> Tensor:
    """Lower bounds of success rates in double precision, one for each number of successes in ``total`` trials.

    These are one-sided Clopper-Pearson intervals: each bound is above the true rate with probability ``risk`` at most.
    """
    return _table(total, risk).to(successes.device)[successes]


def rate_interval(successes: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """The Clopper-Pearson interval of a success rate, from the successes in ``total`` independent trials.

    It misses the true rate in at most a share of ``1 - confidence`` of all cases.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    Biometrika 26 (1934).

    >>> [round(end, 3) for end in rate_interval(44, 100)]
    [0.341, 0.543]
    """
    bounds = _table(total, (1 - confidence) / 2)
    return Interval(bounds[successes].item(), 1 - bounds[total - successes].item())


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value of the exact McNemar test, two-sided: are two models right about equally many queries?

    Only the queries tell about which one of the two models is right. If both are equally good, each of these queries is
    as likely to be one kind as the other.

    Args:
        only_first: how many queries the first model alone is right about.
        only_second: how many queries the second model alone is right about.

    >>> mcnemar(1, 7) == 2 * (1 + 8) / 2**8
    True
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def paired_interval(only_first: int, only_second: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Tango's score interval of the second success rate minus the first one, both measured on the same trials.

    It holds the differences that the score test does not reject, and does not shrink to a point where both models are
    right about the same queries.

    Args:
        only_first: how many trials succeed with the first model alone.
        only_second: how many trials succeed with the second model alone.
        total: how many trials there are.
        confidence: of the interval, asymptotically.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998).

    >>> [round(end, 3) for end in paired_interval(1, 7, 21)]
    [0.026, 0.517]
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    difference = (only_second - only_first) / total
    quantile = float(ndtri((1 + confidence) / 2))

    def excess(delta: float) -> float:
        """Above 0 if the score test rejects a difference of ``delta``."""
        linear = (2 * total - only_second + only_first) * delta - only_first - only_second
        root = math.sqrt(max(linear**2 + 8 * total * only_first * delta * (1 - delta), 0.0))
        rate = (root - linear) / (4 * total)  # of trials that succeed with the first model alone, if delta is true
        variance = (2 * rate + delta * (1 - delta)) / total
        return (difference - delta) ** 2 - quantile**2 * variance

    def end(limit: float) -> float:
        inside = difference + 1e-9 * (limit - difference)  # where the models agree, it is 0 at the difference itself
        return limit if difference == limit else float(brentq(excess, inside, limit, xtol=1e-12))

    return Interval(end(-1.0), end(1.0))


@lru_cache(maxsize=64)
def _table(total: int, risk: float) -> Tensor:
    from scipy.special import betaincinv

    successes = torch.arange(1, total + 1, dtype=torch.float64).numpy()
    bounds = torch.from_numpy(betaincinv(successes, total - successes + 1, risk))
    return torch.cat([bounds.new_zeros(1), bounds])
