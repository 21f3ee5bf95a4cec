"""What an evaluation found: plain values that the table, the JSON file and the HTML page are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...attacks.ball import radius_text
from ...errors import InputError
from .binomial import Interval, rate_interval

TARGETS = ("query", "gallery")  #: What an attack may perturb.

INTERVAL = "Clopper-Pearson"  #: The kind of the confidence intervals of rates.

Measures = Mapping[str, float]
"""Name of a measure (``recall_at_1``, ``map_at_r``, ``r_precision``, ...) -> its mean over the queries, in [0, 1]."""


@dataclass(frozen=True)
class AttackResult:
    """How well retrieval works under one attack at one eps.

    Attributes:
        attack: name of the attack.
        target: what the attack perturbs, "query" or "gallery".
        black_box: whether the attack uses outputs of the model only, no gradients.
        eps: radius, in pixels of [0, 1].
        measures: means over all queries; of each query, the lowest value over all restarts and all smaller eps.
        shift: mean distance between perturbed and clean unit embeddings, in [0, 2].
        forward_passes: how many images the model embedded.
        backward_passes: how many images a gradient was taken of.
        seconds: wall-clock time.
        robust_flags: one character per query: "1" if the nearest item is right, "0" if not. If the model answers at
            random, it is right if it is so in more than half of the draws; measures are then means over the draws.
    """

    attack: str
    target: str
    black_box: bool
    eps: float
    measures: Measures
    shift: float
    forward_passes: int
    backward_passes: int
    seconds: float
    robust_flags: str = field(repr=False)


@dataclass(frozen=True)
class WorstCase:
    """How well retrieval works if each query meets the attack that is worst for it.

    Attributes:
        target: what the attacks perturb, "query" or "gallery".
        eps: radius, in pixels of [0, 1].
        measures: means over all queries; of each query, the lowest value without attack and under any attack.
        robust_flags: one character per query: "1" if the nearest item is right under every attack, "0" if not.
        nmi: normalised mutual information of the queries' embeddings, each under its worst attack; None if it was not
            asked for.
    """

    target: str
    eps: float
    measures: Measures
    robust_flags: str = field(repr=False)
    nmi: float | None = None


@dataclass(frozen=True)
class Check:
    """The result of one test for a sign that the measured robustness is too high.

    Attributes:
        name: what should hold.
        passed: False raises a flag. None: no evidence either way; it could not be made, or nothing was broken in it.
        message: what was found, in one line.
        catches: what makes it fail, in a sentence.
    """

    name: str
    passed: bool | None
    message: str
    catches: str = ""


@dataclass(frozen=True, eq=False)
class Neighbour:
    """An item that a query found: its index, its label, its pixels ``(C, H, W)``, and whether it is right.

    The pixels are None if the gallery has no images. ``name`` is that of its class, if the gallery has names.
    """

    item: int
    label: int
    image: Tensor | None
    is_right: bool
    name: str = ""


@dataclass(frozen=True, eq=False)
class Example:
    """One query and the items that it finds, before and after the attack.

    Attributes:
        query: index of the query.
        label: label of the query.
        eps: the smallest radius at which an attack succeeded; the radius of the strongest attempt, if none did.
        attack: name of the attack that succeeded, or that made the strongest attempt; "none" if none was tried.
        clean: ``(C, H, W)`` pixels.
        perturbed: ``(C, H, W)`` pixels. Of attempts that fail, the strongest is that after which the nearest wrong item
            is nearest, compared with the nearest right one.
        before: nearest items of the clean query, nearest first.
        after: nearest items of the perturbed query, nearest first.
        succeeded: whether the attack succeeded.
        name: of the query's class, if the images have names.
    """

    query: int
    label: int
    eps: float
    attack: str
    clean: Tensor
    perturbed: Tensor
    before: tuple[Neighbour, ...]
    after: tuple[Neighbour, ...]
    succeeded: bool = True
    name: str = ""


@dataclass(frozen=True, eq=False)
class Results:
    """All that one evaluation measured.

    Attributes:
        suite: name and version of the attacks, such as "standard-v2".
        protocol: who searches what, such as "leave-one-out" or "separate gallery".
        num_queries: how many queries were evaluated.
        num_gallery: how many items were searched.
        num_classes: how many classes the gallery has.
        left_out: how many queries were left out because the gallery has no right item for them.
        clean: measures without attack.
        chance: R@1 of a random ranking.
        attacks: results of every attack at every eps.
        worst: the worst case per query, for every target and every eps.
        collapse: signs that the embedding has collapsed, see `metrics.collapse`.
        nmi: normalised mutual information of the queries' embeddings without attack; None if it was not asked for.
        checks: see the module `checks`.
        settings: all settings that are needed to repeat the evaluation.
        versions: of Python and the libraries.
        provenance: what was measured, and where: fingerprints of the model, the queries and the gallery (see the module
            `fingerprints`), the device, threads and flags of torch, the time and the command (see `provenance`).
        notes: what else a reader has to know, such as attacks that were left out, and why.
        queries: indices of the queries that were evaluated, in the order of ``clean_flags`` and ``attacked``.
        clean_flags: one character per query: "1" if the nearest item is right without attack, "0" if not.
        examples: some queries with the items that they find. They are not saved as JSON.
        attacked: eps -> ``(Q, C, H, W)`` perturbed queries: of each, the one that succeeded, or the strongest attempt.
            None if it was not asked for. They are not saved as JSON.
    """

    suite: str
    protocol: str
    num_queries: int
    num_gallery: int
    num_classes: int
    left_out: int
    clean: Measures
    chance: float
    attacks: tuple[AttackResult, ...]
    worst: tuple[WorstCase, ...]
    collapse: Mapping[str, float]
    nmi: float | None
    checks: tuple[Check, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    provenance: Mapping[str, Any]
    clean_flags: str = field(repr=False)
    notes: tuple[str, ...] = ()
    examples: tuple[Example, ...] = field(default=(), repr=False)
    attacked: Mapping[float, Tensor] | None = field(default=None, repr=False)
    queries: tuple[int, ...] = field(default=(), repr=False)

    def worst_case(self, eps: float, measure: str = "recall_at_1", target: str = "query") -> float:
        """A measure at one eps, where each query meets the attack that is worst for it; eps 0 is without attack.

        Raises:
            InputError: the evaluation did not measure this.
        """
        found = {0.0: self.clean, **{worst.eps: worst.measures for worst in self.worst if worst.target == target}}
        if eps and len(found) == 1:
            raise InputError(f"No attack on the {target} was evaluated; expected attacks that perturb it.")
        if eps not in found or measure not in found[eps]:
            names = sorted({name for measures in found.values() for name in measures})
            radii = ", ".join(radius_text(radius, str(self.settings.get("norm", ""))) for radius in sorted(found))
            choices = f"{', '.join(names)} at {radii}"
            raise InputError(f"{measure} at eps={eps} on {target} was not measured; choose {choices}.")
        return found[eps][measure]

    def interval(self, eps: float, measure: str = "recall_at_1", target: str = "query") -> Interval:
        """The 95 % confidence interval (Clopper-Pearson) of a rate in the worst case; eps 0 is without attack.

        The rate is that of all queries of the kind of which these are a sample, on this model, gallery and attacks. Of
        a model that answers at random it is a mean of values between 0 and 1, which varies no more than a rate does;
        it counts as the nearest rate.

        Raises:
            InputError: the evaluation did not measure this, or it is no rate.
        """
        if not is_rate(measure):
            raise InputError(
                f"{measure} is no rate, so it has no interval; expected a measure that is 0 or 1 for each query: "
                f"{', '.join(filter(is_rate, self.clean))}."
            )
        return self._interval(self.worst_case(eps, measure, target))

    def intervals(self, measures: Measures) -> dict[str, Interval]:
        """The 95 % confidence intervals of those measures that are rates over the queries, see `interval`."""
        return {name: self._interval(rate) for name, rate in measures.items() if is_rate(name)}

    def _interval(self, rate: float) -> Interval:
        return rate_interval(round(rate * self.num_queries), self.num_queries)

    def curve(self, measure: str = "recall_at_1", target: str = "query") -> dict[float, float]:
        """A measure in the worst case, by eps; eps 0 is without attack."""
        return {0.0: self.clean[measure], **{w.eps: w.measures[measure] for w in self.worst if w.target == target}}

    @property
    def flagged(self) -> tuple[Check, ...]:
        """Checks that failed: reasons to doubt the numbers."""
        return tuple(check for check in self.checks if check.passed is False)


def decode_flags(flags: str) -> Tensor:
    """``(Q,)`` bool of one character per query, "1" for True.

    >>> decode_flags("10")
    tensor([ True, False])
    """
    return torch.tensor([flag == "1" for flag in flags], dtype=torch.bool)


def is_rate(measure: str) -> bool:
    """Whether a measure is 0 or 1 for each query, so that its mean is a rate.

    >>> [is_rate(measure) for measure in ("recall_at_1", "recall_at_8", "map_at_r", "r_precision")]
    [True, True, False, False]
    """
    return measure.startswith("recall_at_")


def heading(measure: str) -> str:
    """A measure's name in tables.

    >>> heading("recall_at_4"), heading("map_at_r")
    ('R@4', 'mAP@R')
    """
    return {"map_at_r": "mAP@R", "r_precision": "R-prec"}.get(measure, measure.replace("recall_at_", "R@"))
