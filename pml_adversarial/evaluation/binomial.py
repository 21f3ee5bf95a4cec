"""How likely a number of successes is, and which success rate a number of successes proves.

SciPy's statistics take 0.4 seconds to import, so they are imported where they are used.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


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


@lru_cache(maxsize=64)
def _table(total: int, risk: float) -> Tensor:
    from scipy.special import betaincinv

    successes = torch.arange(1, total + 1, dtype=torch.float64).numpy()
    bounds = torch.from_numpy(betaincinv(successes, total - successes + 1, risk))
    return torch.cat([bounds.new_zeros(1), bounds])
