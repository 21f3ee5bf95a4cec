"""Whether the number is to be believed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .bench import Bench
from .report import AttackResult, Check


def run_checks(
    bench: Bench, rows: Tensor, results: Sequence[AttackResult], radii: Sequence[float], seed: int
) -> tuple[Check, ...]:
    """Asks for every sign of a false claim."""
    return ()
