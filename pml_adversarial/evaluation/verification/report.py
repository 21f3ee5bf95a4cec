"""What an evaluation of verification found: values that can be read, shown as a table, and kept as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from ...attacks.ball import radius_text
from ...errors import InputError
from ..reports.binomial import CONFIDENCE
from ..reports.results import Check, decode_flags
from ..reports.saved import Saved
from ..reports.table import MARKS
from .roc import ROC, EqualErrorRate, PairScores, Rate


@dataclass(frozen=True)
class ThresholdResult:
    """Verification with one threshold, which was set on pairs without attack.

    Attributes:
        at: the false accept rate for which the threshold was set, or "EER".
        threshold: a pair is accepted if its similarity is this high, or higher.
        tar: true accept rate. Under attack, genuine pairs are dodged.
        far: false accept rate. Under attack, impostors are impersonated.
        dodging: of the genuine pairs that are accepted without attack, the share that no longer is. None
            without attack.
        impersonation: of the impostor pairs that are rejected without attack, the share that no longer is. None
            without attack.
    """

    at: float | str
    threshold: float
    tar: Rate
    far: Rate
    dodging: Rate | None = None
    impersonation: Rate | None = None


@dataclass(frozen=True)
class PairAttackResult:
    """Verification under one attack at one eps.

    Attributes:
        attack: name of the attack.
        black_box: whether the attack uses outputs of the model only, no gradients.
        eps: radius, in pixels of [0, 1].
        thresholds: at each threshold, "EER" last; of each pair, the worst over all restarts and all smaller eps.
        genuine: median similarity of genuine pairs.
        impostors: median similarity of impostor pairs.
        forward_passes: how many images the model embedded.
        backward_passes: how many images a gradient was taken of.
        seconds: wall-clock time.
    """

    attack: str
    black_box: bool
    eps: float
    thresholds: tuple[ThresholdResult, ...]
    genuine: float
    impostors: float
    forward_passes: int
    backward_passes: int
    seconds: float


@dataclass(frozen=True)
class VerificationResult:
    """Verification without attack, or with the worst attack on each pair.

    Attributes:
        eps: radius, in pixels of [0, 1]; 0: without attack.
        thresholds: at each threshold, "EER" last.
        equal_error_rate: with a threshold of its own: under attack, both errors are those of attacked pairs.
        accuracy: at the threshold "EER" without attack, share of genuine pairs accepted and impostor pairs rejected.
        auc: area under the ROC curve.
        similarities: of each pair: without attack, or the lowest of a genuine pair and the highest of an impostor pair.
    """

    eps: float
    thresholds: tuple[ThresholdResult, ...]
    equal_error_rate: EqualErrorRate
    accuracy: Rate
    auc: float
    similarities: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class VerificationReport(Saved):
    """How robust a verification is. ``print(report)`` shows a table.

    Attributes:
        suite: name and version of the attacks.
        protocol: where the pairs come from.
        num_genuine: how many genuine pairs there are.
        num_impostors: how many impostor pairs there are.
        results: without attack, at eps 0, over all pairs; then the worst case per pair at each eps, over the pairs that
            were attacked.
        attacks: results of every attack at every eps.
        checks: signs that the measured robustness is too high, see the module `verification.checks`.
        settings: all settings that are needed to repeat the evaluation.
        versions: of Python and the libraries.
        provenance: fingerprints of model and images, and the machine, time and command.
        notes: what else a reader has to know.
        same: one character per pair: "1" if it is genuine, "0" if not.
        attacked_pairs: indices of the pairs that were attacked.
        tie: by how much more similar each impostor pair counts, because of rounding.
        attacked: eps -> ``(A, C, H, W)`` perturbed first images, of each pair the worst. None if it was not asked for.
            They are not saved as JSON.
    """

    SCHEMA: ClassVar[int] = 1

    suite: str
    protocol: str
    num_genuine: int
    num_impostors: int
    results: tuple[VerificationResult, ...]
    attacks: tuple[PairAttackResult, ...]
    checks: tuple[Check, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]
    same: str = field(repr=False)
    attacked_pairs: tuple[int, ...] = field(repr=False)
    tie: float
    attacked: Mapping[float, torch.Tensor] | None = field(default=None, repr=False)

    def result(self, eps: float = 0.0) -> VerificationResult:
        """Without attack, or the worst case per pair at one eps.

        Raises:
            InputError: this eps was not evaluated.
        """
        found = {result.eps: result for result in self.results}
        if eps not in found:
            raise InputError(f"eps={eps} was not evaluated; choose {', '.join(f'{radius:g}' for radius in found)}.")
        return found[eps]

    def at(self, far: float | str, eps: float = 0.0) -> ThresholdResult | None:
        """At the threshold that was set for a false accept rate without attack, or for "EER".

        Returns:
            What was found; None if there are too few impostor pairs to set a threshold for this rate.

        Raises:
            InputError: no threshold was asked for at this rate, or this eps was not evaluated.
        """
        asked = [*self.settings["far"], "EER"]
        if far not in asked:
            raise InputError(f"There is no threshold for {far!r}; choose {', '.join(map(repr, asked))}.")
        return {threshold.at: threshold for threshold in self.result(eps).thresholds}.get(far)

    def roc(self, eps: float = 0.0) -> ROC:
        """The ROC without attack, or of the worst case per pair at one eps.

        Raises:
            InputError: this eps was not evaluated.
        """
        similarities = torch.tensor(self.result(eps).similarities, dtype=torch.float64)
        same = decode_flags(self.same)
        same = same if eps == 0 else same[list(self.attacked_pairs)]
        return PairScores(similarities, same, self.tie).roc()

    @property
    def flagged(self) -> tuple[Check, ...]:
        """Checks that failed: reasons to doubt the numbers."""
        return tuple(check for check in self.checks if check.passed is False)

    def __str__(self) -> str:
        """Three tables in percent, the setting, and a line per note and check.

        The tables are: both errors together, each threshold, and each attack at the threshold "EER".
        """
        settings = self.settings
        setting = (
            f"{self.suite}, {settings['norm']}, {settings['distance']}, {self.protocol}: {self.num_genuine} genuine, "
            f"{self.num_impostors} impostor pairs, {len(self.attacked_pairs)} attacked; percent, "
            f"{100 * CONFIDENCE:.0f} % intervals; {settings['precision']}"
        )
        tables = (self._error_rows(), self._threshold_rows(), self._attack_rows())
        notes = [f"note: {note}" for note in self.notes]
        checks = [f"[{MARKS[check.passed]}] {check.name}: {check.message}" for check in self.checks]
        return "\n".join([line for rows in tables for line in (*_aligned(list(rows)), "")] + [setting, *notes, *checks])

    def _error_rows(self) -> Iterator[list[str]]:
        yield ["worst case", "EER", "accuracy", "AUC"]
        for result in self.results:
            error = _interval(*(getattr(result.equal_error_rate, name) for name in ("rate", "low", "high")))
            yield [self._condition(result.eps), error, _percent(result.accuracy), f"{100 * result.auc:.1f}"]

    def _threshold_rows(self) -> Iterator[list[str]]:
        yield ["worst case", "threshold", "similarity", "TAR", "dodging", "FAR", "impersonation"]
        for result in self.results:
            for found in result.thresholds:
                rates = (found.tar, found.dodging, found.far, found.impersonation)
                at = found.at if isinstance(found.at, str) else f"FAR {found.at:g}"
                yield [self._condition(result.eps), at, f"{found.threshold:.4g}", *map(_percent, rates)]

    def _attack_rows(self) -> Iterator[list[str]]:
        yield ["attack", "eps", "dodging", "impersonation", "genuine", "impostors", "passes", "s"]
        for result in self.attacks:
            found = result.thresholds[-1]
            similarities = [f"{value:.4g}" for value in (result.genuine, result.impostors)]
            cost = [f"{result.forward_passes + result.backward_passes:,}", f"{result.seconds:.0f}"]
            rates = (found.dodging, found.impersonation)
            yield [
                result.attack,
                radius_text(result.eps, self.settings["norm"]),
                *map(_percent, rates),
                *similarities,
                *cost,
            ]

    def _condition(self, eps: float) -> str:
        return f"eps {radius_text(eps, self.settings['norm'])}" if eps else "none"

    def to_dict(self) -> dict[str, Any]:
        """All results but images, in types that JSON knows."""
        kept = {key: value for key, value in vars(self).items() if key != "attacked"}
        lists = {key: [asdict(part) for part in kept[key]] for key in ("results", "attacks", "checks")}
        return {"schema": self.SCHEMA, **kept, **lists}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> VerificationReport:
        """A report from what JSON makes of `to_dict`, without ``schema``."""
        lists = {
            "results": tuple(map(_result, found["results"])),
            "attacks": tuple(map(_attack, found["attacks"])),
            "checks": tuple(Check(**check) for check in found["checks"]),
            "notes": tuple(found["notes"]),
            "attacked_pairs": tuple(found["attacked_pairs"]),
        }
        return cls(**{**found, **lists})


def _result(found: dict[str, Any]) -> VerificationResult:
    parts = {
        "thresholds": tuple(map(_threshold, found["thresholds"])),
        "equal_error_rate": EqualErrorRate(**found["equal_error_rate"]),
        "accuracy": Rate(**found["accuracy"]),
        "similarities": tuple(found["similarities"]),
    }
    return VerificationResult(**{**found, **parts})


def _attack(found: dict[str, Any]) -> PairAttackResult:
    return PairAttackResult(**{**found, "thresholds": tuple(map(_threshold, found["thresholds"]))})


def _threshold(found: dict[str, Any]) -> ThresholdResult:
    rates = ("tar", "far", "dodging", "impersonation")
    return ThresholdResult(**{**found, **{key: None if found[key] is None else Rate(**found[key]) for key in rates}})


def _percent(rate: Rate | None) -> str:
    return "" if rate is None else _interval(rate.rate, rate.low, rate.high)


def _interval(rate: float | None, low: float, high: float) -> str:
    return "no pairs" if rate is None else f"{100 * rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, all others to the right, under a line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    lines = ["  ".join(cells) for cells in aligned]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
