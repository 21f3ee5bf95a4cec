"""Runs every attack on one batch of pairs after the other, and joins what they reach into results."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from ...attacks.ball import per_image
from ...training.isolation import random_stream
from .attacks import PairAttack, PairBatch
from .report import PairAttackResult, ThresholdResult, VerificationResult
from .roc import ROC, PairScores, Rate
from .task import PairTask

Thresholds = dict[float | str, float]
"""False accept rate without attack, or "EER" -> threshold on similarity; "EER" is the last."""


@dataclass(frozen=True, eq=False)
class Worst:
    """Of each pair, the similarity ``(n,)`` that is worst so far, and the first image ``(n, C, H, W)`` that has it.

    Of a model that answers at random, the worst is chosen by ``means`` ``(n,)`` over many draws, and the similarity is
    that of a further draw, which has no part in the choice. Of any other model, ``means`` is None.
    """

    similarities: Tensor
    images: Tensor
    means: Tensor | None = None

    @property
    def decisive(self) -> Tensor:
        """``(n,)`` what the worst is chosen by."""
        return self.similarities if self.means is None else self.means

    def joined(self, other: Worst, same: Tensor) -> Worst:
        """The lower similarity of genuine pairs, which ``same`` ``(n,)`` marks, and the higher one of the others."""
        lower, higher = other.decisive < self.decisive, other.decisive > self.decisive
        taken = torch.where(same, lower, higher)
        return Worst(
            torch.where(taken, other.similarities, self.similarities),
            torch.where(per_image(taken, self.images), other.images, self.images),
            None if self.means is None else torch.where(taken, other.decisive, self.means),
        )


@dataclass(eq=False)
class PairOutcome:
    """What one attack reached at one eps, in parts by batch.

    Attributes:
        similarities: of each pair, the worst over all restarts and all smaller eps.
        decisive: of each pair, what the worst was chosen by, see `Worst`.
        cost: forward passes, backward passes and seconds.
    """

    similarities: list[Tensor] = field(default_factory=list)
    decisive: list[Tensor] = field(default_factory=list)
    cost: list[tuple[float, ...]] = field(default_factory=list)

    def joined(self) -> Tensor:
        """``(A,)`` the similarities of all pairs."""
        return torch.cat(self.similarities)


class PairEvaluator:
    """All attacks at all eps (``radii``, ascending) on the pairs ``rows`` ``(A,)``.

    Attributes:
        outcomes: ``(attack, eps)`` -> what was reached.
        images: eps -> first images with the worst similarity, in parts by batch, if ``keep_attacked`` is true.
    """

    def __init__(
        self,
        task: PairTask,
        attacks: tuple[PairAttack, ...],
        radii: tuple[float, ...],
        rows: Tensor,
        seed: int,
        batch_size: int,
        keep_attacked: bool,
    ) -> None:
        self.task, self.attacks, self.radii, self.rows = task, attacks, radii, rows
        self.seed, self.batch_size, self.keep_attacked = seed, batch_size, keep_attacked
        self.outcomes = {(attack, eps): PairOutcome() for eps in radii for attack in attacks}
        self.images: dict[float, list[Tensor]] = {eps: [] for eps in radii}

    @property
    def num_runs(self) -> int:
        """How often `run` calls ``advance``."""
        per_batch = len(self.radii) * sum(attack.restarts for attack in self.attacks)
        return per_batch * math.ceil(len(self.rows) / self.batch_size)

    def run(self, advance: Callable[[], object]) -> None:
        """Runs all attacks; ``advance`` is called after each run of one of them."""
        for rows in self.rows.split(self.batch_size):
            batch = self.task.batch(rows)
            means = batch.mean_similarities(batch.images) if batch.is_random else None
            clean = Worst(self.task.scores[rows].similarities, batch.images, means)
            worst = dict.fromkeys(self.attacks, clean)
            for eps in self.radii:
                for attack in self.attacks:
                    worst[attack] = self._attack(attack, batch, eps, int(rows[0]), worst[attack], advance)
                if self.keep_attacked:
                    self.images[eps].append(reduce(lambda a, b: a.joined(b, batch.same), worst.values()).images)

    def _attack(
        self,
        attack: PairAttack,
        batch: PairBatch,
        eps: float,
        first_row: int,
        worst: Worst,
        advance: Callable[[], object],
    ) -> Worst:
        """The worst over ``worst`` and all restarts."""
        before = self._spent()
        for restart in range(attack.restarts):
            stream = zlib.crc32(repr((attack.name, eps, restart, first_row)).encode())
            with random_stream(self.seed, stream):
                images, similarities = attack.run(batch, eps, restart)
                found = Worst(similarities, images)
                if batch.is_random:
                    found = Worst(batch.similarities(images), images, similarities)
            worst = worst.joined(found, batch.same)
            advance()
        outcome = self.outcomes[attack, eps]
        outcome.similarities.append(worst.similarities)
        outcome.decisive.append(worst.decisive)
        outcome.cost.append(tuple(now - then for now, then in zip(self._spent(), before, strict=True)))
        return worst

    def _spent(self) -> tuple[float, ...]:
        return self.task.embed.forward_passes, self.task.embed.backward_passes, time.perf_counter()

    def attacked(self) -> dict[float, Tensor] | None:
        """Eps -> ``(A, C, H, W)`` perturbed first images; None if they were not kept."""
        return {eps: torch.cat(parts) for eps, parts in self.images.items()} if self.keep_attacked else None

    @property
    def reached(self) -> dict[tuple[str, bool, float], Tensor]:
        """``(name, black_box, eps)`` of each attack -> ``(A,)`` similarities that it reached."""
        return {(attack.name, attack.black_box, eps): found.joined() for (attack, eps), found in self.outcomes.items()}

    def results(self, thresholds: Thresholds) -> tuple[VerificationResult, ...]:
        """Without attack over all pairs, and the worst case per attacked pair at each eps."""
        clean = self.task.scores
        found = [_result(0.0, at_thresholds(thresholds, clean), clean, thresholds)]
        for eps in self.radii:
            scores = self._worst_scores(eps)
            found.append(_result(eps, at_thresholds(thresholds, scores, clean[self.rows]), scores, thresholds))
        return tuple(found)

    def attack_results(self, thresholds: Thresholds) -> tuple[PairAttackResult, ...]:
        """The results of each attack at each eps."""
        clean, found = self.task.scores[self.rows], []
        for (attack, eps), outcome in self.outcomes.items():
            scores = replace(clean, similarities=outcome.joined())
            forward, backward, seconds = (sum(parts) for parts in zip(*outcome.cost, strict=True))
            found.append(
                PairAttackResult(
                    attack=attack.name,
                    black_box=attack.black_box,
                    eps=eps,
                    thresholds=at_thresholds(thresholds, scores, clean),
                    genuine=float(scores.similarities[scores.same].median()),
                    impostors=float(scores.similarities[~scores.same].median()),
                    forward_passes=int(forward),
                    backward_passes=int(backward),
                    seconds=seconds,
                )
            )
        return tuple(found)

    def _worst_scores(self, eps: float) -> PairScores:
        clean = self.task.scores[self.rows]
        found = [outcome for (_, radius), outcome in self.outcomes.items() if radius == eps]
        decisive = torch.stack([torch.cat(outcome.decisive) for outcome in found])
        worst = torch.where(clean.same, decisive.argmin(0), decisive.argmax(0))
        reached = torch.stack([outcome.joined() for outcome in found])
        return replace(clean, similarities=reached.gather(0, worst.unsqueeze(0)).squeeze(0))


def find_thresholds(roc: ROC, rates: Iterable[float]) -> Thresholds:
    """A threshold for each false accept rate that the pairs can show, and that for equal errors."""
    found: Thresholds = {rate: threshold for rate in rates if (threshold := roc.threshold_at(rate)) is not None}
    return {**found, "EER": roc.equal_error_rate.threshold}


def at_thresholds(
    thresholds: Thresholds, scores: PairScores, clean: PairScores | None = None
) -> tuple[ThresholdResult, ...]:
    """Rates of pairs at each threshold; ``clean`` are the same pairs without attack, None if ``scores`` are."""
    found = []
    for at, threshold in thresholds.items():
        same, after = scores.same, scores.accepted(threshold)
        rates = [_share(after, same), _share(after, ~same)]
        if clean is not None:
            before = clean.accepted(threshold)
            rates += [_share(~after, same & before), _share(after, ~same & ~before)]
        found.append(ThresholdResult(at, threshold, *rates))
    return tuple(found)


def _share(hit: Tensor, among: Tensor) -> Rate:
    return Rate.of(int((hit & among).sum()), int(among.sum()))


def _result(
    eps: float, at: tuple[ThresholdResult, ...], scores: PairScores, thresholds: Thresholds
) -> VerificationResult:
    roc, similarities = scores.roc(), tuple(scores.similarities.tolist())
    return VerificationResult(eps, at, roc.equal_error_rate, roc.accuracy(thresholds["EER"]), roc.auc, similarities)
