"""Signs that the measured robustness of a verification is too high: the module `checks` does the same for retrieval.

A pair is broken if an attack moves it across the threshold "EER". The checks are made on a sample of the attacked pairs
that are right at this threshold without attack. A flag is raised if what was found has a probability below one in a
thousand on a model that hides nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ...attacks.ball import project, radius_text
from ...attacks.pgd import uniform_noise
from ...training.isolation import random_stream
from ..checks import FEW, MOST, SAMPLE, SIGNIFICANCE, STEPS, Verdict, compared, largest_noise, plausible
from ..reports import binomial
from ..reports.results import Check
from ..retrieval.options import largest_radius
from .attacks import PairBatch, momentum
from .roc import PairScores
from .task import PairTask

_ENOUGH = 10  # fewer pairs prove nothing
_DRAWS = 10  # of noise


def run_pair_checks(
    task: PairTask,
    rows: Tensor,
    threshold: float,
    reached: Mapping[tuple[str, bool, float], Tensor],
    seed: int,
    batch_size: int,
) -> tuple[Check, ...]:
    """Makes all checks on the pairs ``rows`` ``(A,)`` of a task whose model is in eval mode and frozen.

    They cost about 350 passes for each pair of the sample.

    Args:
        task: model and pairs.
        rows: the pairs that were attacked.
        threshold: on similarity, before the attacks.
        reached: ``(name, black_box, eps)`` of each attack -> ``(A,)`` similarities that it reached.
        seed: of all random choices.
        batch_size: pairs that are attacked together.
    """
    sample = PairSample(task, rows, threshold, reached, seed, batch_size)
    few = Verdict(None, f"only {len(sample)} pairs are right without attack; {_ENOUGH} are needed")
    return tuple(Check(name, *(few if len(sample) < _ENOUGH else check(sample))) for name, check in PAIR_CHECKS.items())


@dataclass(eq=False)
class PairSample:
    """A sample of the attacked pairs that are right without attack, and what is measured on it; see `run_pair_checks`.

    Attributes:
        right: ``(A,)`` bool, which attacked pairs are right without attack.
        chosen: ``(n,)`` which of ``rows`` are in the sample.
        batches: the sample, in batches.
        eps: of all radii, the one at which closest to half of the pairs are broken. There, comparisons of attacks tell
            most.
    """

    task: PairTask
    rows: Tensor
    threshold: float
    reached: Mapping[tuple[str, bool, float], Tensor]
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        clean = self.task.scores[self.rows]
        self.same = clean.same.cpu()
        self.right = ~self._is_wrong(clean.similarities.cpu(), self.same)
        right = self.right.nonzero().squeeze(1)
        with random_stream(self.seed, _stream("sample")):
            self.chosen = right[torch.randperm(len(right))[:SAMPLE]].sort().values
        parts = self.rows[self.chosen].split(self.batch_size)
        self.batches = tuple(self.task.batch(part) for part in parts if len(part))
        half = len(right) / 2
        self.eps = min(self.radii, key=lambda eps: abs(int((self.broken_by(eps) & self.right).sum()) - half))

    def shown(self, eps: float) -> str:
        """An eps in words."""
        return radius_text(eps, self.task.norm)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def radii(self) -> list[float]:
        """All eps, ascending."""
        return sorted({eps for _, _, eps in self.reached})

    @property
    def large(self) -> float:
        """Radius within which an attack can show any image."""
        shape = self.batches[0].images.shape[1:]
        if self.task.norm == "patch":
            return max(shape[-2:])  # a patch that is wider than an image covers it
        return largest_radius(self.task.norm, shape)

    def broken_by(self, eps: float, *black_box: bool) -> Tensor:
        """``(A,)`` bool: pairs that an attack broke at an eps, of both kinds of attacks or of one."""
        kinds = black_box or (True, False)
        found = [values for (_, kind, radius), values in self.reached.items() if radius == eps and kind in kinds]
        broken = [self._is_wrong(values.cpu(), self.same) for values in found]
        return torch.stack(broken).any(0) if broken else torch.zeros_like(self.same)

    def measure(self, on_batch: Callable[[PairBatch], Tensor], stream: str) -> Tensor:
        """What a function of a batch gives, joined over all batches; it draws from a random stream of its own."""
        with random_stream(self.seed, _stream(stream)):
            return torch.cat([on_batch(batch) for batch in self.batches]).cpu()

    def broken(self, attack: Callable[[PairBatch], Tensor], stream: str) -> Tensor:
        """``(n,)`` bool: pairs that images ``(n, C, H, W)`` break."""
        return self.measure(lambda batch: self._is_wrong(batch.similarities(attack(batch)), batch.same), stream)

    def ascended(self, eps: float, steps: int, stream: str, random_start: bool = True) -> Tensor:
        """``(n,)`` bool: pairs that one run of the attack "momentum" breaks."""
        return self.broken(partial(momentum, eps=eps, restart=0, steps=steps, random_start=random_start), stream)

    @cached_property
    def attacked(self) -> Tensor:
        """``(n,)`` bool: pairs that the attack breaks with which others are compared."""
        return self.ascended(self.eps, STEPS, "attack")

    def _is_wrong(self, similarities: Tensor, same: Tensor) -> Tensor:
        return PairScores(similarities, same, self.task.scores.tie).accepted(self.threshold) != same


def beats_a_single_step(sample: PairSample) -> Verdict:
    """Iterative attacks are stronger than single-step ones (Carlini et al., arXiv 1902.06705)."""
    single = sample.ascended(sample.eps, 1, "single", random_start=False)
    return compared(sample.attacked, f"{STEPS} steps", single, "one step", sample.shown(sample.eps))


def beats_noise(sample: PairSample) -> Verdict:
    """Random noise is weaker than an attack (Carlini et al.)."""

    def noisy(batch: PairBatch) -> Tensor:
        noise = largest_noise(batch.images, sample.eps, batch.norm)
        return project(batch.images + noise, batch.images, sample.eps, batch.norm)

    noise = torch.stack([sample.broken(noisy, f"noise {draw}") for draw in range(_DRAWS)]).any(0)
    return compared(
        sample.attacked, f"{STEPS} steps", noise, f"the best of {_DRAWS} draws of noise", sample.shown(sample.eps)
    )


def has_converged(sample: PairSample) -> Verdict:
    """More steps and another start find nothing new (Carlini et al.): one longer run is no stronger than the suite."""
    suite = sample.broken_by(sample.eps)[sample.chosen]
    longer = sample.ascended(sample.eps, 2 * STEPS, "longer")
    return compared(suite, "the suite", longer, f"one more run of {2 * STEPS} steps", sample.shown(sample.eps))


def falls_at_a_large_eps(sample: PairSample) -> Verdict:
    """Unbounded attacks succeed on every pair (Carlini et al.): within this eps, the first image may be any image."""
    robust = int((~sample.ascended(sample.large, STEPS, "large")).sum())
    passed = plausible(robust, len(sample), 1 - MOST)
    eps = sample.shown(sample.large)
    return Verdict(passed, f"{robust} of {len(sample)} pairs are robust at eps {eps}, within which any image lies")


def black_box_adds_nothing(sample: PairSample) -> Verdict:
    """Black-box attacks are no stronger than white-box ones (Athalye et al., arXiv 1802.00420)."""
    for black_box, kind in ((True, "black-box"), (False, "white-box")):
        if not any(found == black_box for _, found, _ in sample.reached):
            return Verdict(None, f"there is no {kind} attack")
    found, total = [], int(sample.right.sum())
    for eps in sample.radii:
        only = int((sample.broken_by(eps, True) & ~sample.broken_by(eps, False) & sample.right).sum())
        message = f"{only} of {total} pairs are broken by black-box attacks alone, at eps {sample.shown(eps)}"
        found.append((binomial.tail(only, total, FEW), message))
    probability, message = min(found)
    is_any_broken = any(bool((sample.broken_by(eps) & sample.right).any()) for eps in sample.radii)
    return Verdict(probability >= SIGNIFICANCE if is_any_broken else None, message)


def has_gradients(sample: PairSample) -> Verdict:
    """Gradients are not zero (as AutoAttack checks, arXiv 2003.01690), at a random point within eps."""

    def is_zero(batch: PairBatch) -> Tensor:
        noise = uniform_noise(batch.images, sample.eps, batch.norm)
        point = project(batch.images + noise, batch.images, sample.eps, batch.norm).requires_grad_()
        (gradient,) = torch.autograd.grad(batch.score(batch.embed(point)).sum(), point)
        return (gradient.nan_to_num(0.0, 0.0, 0.0) == 0).flatten(1).all(1)

    zero = int(sample.measure(is_zero, "gradients").sum())
    return Verdict(plausible(zero, len(sample), FEW), f"{zero} of {len(sample)} pairs have no gradient")


def answers_alike(sample: PairSample) -> Verdict:
    """The model is not random, and no embedding depends on the other images of its batch."""
    scores = sample.task.scores
    spread = float(scores.similarities.std())
    again, elsewhere = sample.measure(_differences, "alike").amax(0).tolist()
    tolerance = max(0.01 * spread, 8 * scores.tie)
    return Verdict(
        max(again, elsewhere) <= tolerance,
        f"similarities differ by up to {again:.2g} in a second call, {elsewhere:.2g} in another batch; their spread is "
        f"{spread:.2g}",
    )


PAIR_CHECKS: dict[str, Callable[[PairSample], Verdict]] = {
    "iterating beats a single step": beats_a_single_step,
    "attack beats noise": beats_noise,
    "a longer run adds nothing": has_converged,
    "falls at a large eps": falls_at_a_large_eps,
    "black box adds nothing": black_box_adds_nothing,
    "gradients are there": has_gradients,
    "same answer twice": answers_alike,
}
"""What should hold -> the check that measures it."""


def _differences(batch: PairBatch) -> Tensor:
    """``(n, 2)`` change of similarities in a second call, and in halves of the batch, in reversed order."""
    back = torch.arange(len(batch), device=batch.images.device).flip(0)
    first, again = (batch.similarities(batch.images) for _ in range(2))
    halves = [batch[rows].similarities(batch.images[rows]) for rows in back.tensor_split(2) if len(rows)]
    return torch.stack([(again - first).abs(), (torch.cat(halves)[back] - first).abs()], 1)


def _stream(name: str) -> int:
    return zlib.crc32(f"pair check: {name}".encode())
