"""What an evaluation costs: a bound on its image passes, known before it runs, and the time that one pass takes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attacks.checks import check_choice, check_whole
from ..errors import InputError
from ..training.isolation import random_stream
from ..training.pixels import Bounds, Normalization
from .attacks.kinds import RetrievalAttack
from .checks import passes_of_checks
from .evaluator import most_passes
from .retrieval.embedder import Embedder, plain_surroundings
from .retrieval.forms import Images
from .retrieval.options import NORMS, to_radii
from .retrieval.task import RetrievalTask
from .robustness import evaluate_robustness
from .runs.progress import duration
from .suites import find_suite


@dataclass(frozen=True)
class Cost:
    """What an evaluation costs at most. Robust models come near to it; a query that an attack breaks costs less.

    Only passes of the evaluated model are counted, not those of a surrogate.

    Attributes:
        passes: of images, forward and backward passes counted separately; None: some attack does not say how many.
        seconds_per_pass: mean of a forward and a backward pass, as measured.
    """

    passes: int | None
    seconds_per_pass: float

    @property
    def seconds(self) -> float | None:
        """What all passes take, one after the other, on one process."""
        return None if self.passes is None else self.passes * self.seconds_per_pass

    def __str__(self) -> str:
        """The cost in words.

        >>> print(Cost(2_000_000, 0.002))
        at most 2,000,000 image passes of 2 ms: 1 h 6 min
        """
        passes = "an unknown number of" if self.passes is None else f"at most {self.passes:,}"
        total = "" if self.seconds is None else f": {duration(self.seconds)}"
        return f"{passes} image passes of {1000 * self.seconds_per_pass:.3g} ms{total}"


def estimate_cost(
    model: Any,
    queries: Images,
    gallery: Images | None = None,
    *,
    eps: float | Iterable[float],
    attacks: str | Sequence[str | RetrievalAttack] = "standard",
    normalization: Normalization | None = None,
    bounds: Bounds | None = None,
    subset: Sequence[int] | Tensor | None = None,
    checks: bool = True,
    norm: str = "Linf",
    batch_size: int = 128,
    **others: Any,
) -> Cost:
    """What `evaluate_robustness` with the same arguments costs at most. One batch is embedded twice to find out.

    ``others`` are further options of `evaluate_robustness`, which change the cost little or not at all.

    Raises:
        InputError: the inputs cannot be evaluated, or there is no such option.
    """
    unknown = sorted(others.keys() - inspect.signature(evaluate_robustness).parameters.keys())
    if unknown:
        raise InputError(
            f"{', '.join(unknown)}: expected options of evaluate_robustness, and it has none of this name."
        )
    check_choice("norm", norm, NORMS)
    batch_size = check_whole("batch_size", batch_size)
    radii, (_, members) = to_radii(eps, norm), find_suite(attacks)
    embed = Embedder(model, normalization, bounds)
    with plain_surroundings(), random_stream(0, 0):
        task = RetrievalTask(embed, queries, gallery, norm)
        attacked = len(task.rows(subset))
        embedded = len(task.items) + (0 if gallery is None else attacked)
        task.probe(radii)
        most = most_passes(members, attacked, len(radii), embed.is_random)
        passes = None if most is None else most + embedded + checks * passes_of_checks(attacked, embed.is_random)
        with embed.isolated():
            return Cost(passes, _seconds_per_pass(embed, task.queries[:batch_size]))


def _seconds_per_pass(embed: Embedder, pixels: Tensor) -> float:
    for _ in range(2):  # the first call may choose algorithms and memory
        start = time.perf_counter()
        images = pixels.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(embed(images).sum(), images)
        gradient.sum().item()  # waits for the device
    return (time.perf_counter() - start) / (2 * len(pixels))
