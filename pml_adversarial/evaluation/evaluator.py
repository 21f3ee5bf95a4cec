"""Runs every attack on one batch of queries after the other, and joins what they leave into results."""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attacks.ball import per_image, radius_text
from ..training.isolation import random_stream
from ..training.tuples import rank_in_group
from .attacks.kinds import AttackOutcome, RetrievalAttack
from .reports.results import TARGETS, AttackResult, Example, Neighbour, WorstCase
from .retrieval import metrics
from .retrieval.batch import ANSWERS, SAMPLES, QueryBatch
from .retrieval.gallery import finite_or_zero
from .retrieval.metrics import PerQuery
from .retrieval.task import RetrievalTask

BatchResult = dict[str, Any]
"""What is known of a batch of queries, in tensors, so that it can be saved: measures, costs and examples."""

_NEIGHBOURS, _EXAMPLES = 5, 8
_WITHSTOOD = 3  # of the examples, those that no attack broke, if there are any
_HALF = 0.5  # of the draws of a model that answers at random; the R@1 of a query of any other is 0 or 1


@dataclass(frozen=True)
class Evaluator:
    """All attacks at all eps (``radii``, ascending); the other options are those of `evaluate_robustness`."""

    task: RetrievalTask
    attacks: tuple[RetrievalAttack, ...]
    radii: tuple[float, ...]
    recall_at: Sequence[int]
    seed: int
    keep_attacked: bool
    nmi: bool

    def evaluate_batch(self, rows: Tensor, examples: bool, begin: Callable[[str], object]) -> BatchResult:
        """Runs all attacks on the queries ``rows`` ``(n,)``, and keeps some of them as examples if asked to.

        ``begin`` is told the name and eps of each attack before it runs. All random numbers depend on ``seed`` and
        ``rows`` alone, so it makes no difference which process does this, and what was done before.
        """
        with random_stream(self.seed, zlib.crc32(repr(int(rows[0])).encode())):
            return self._evaluate(rows, examples, begin)

    def _evaluate(self, rows: Tensor, examples: bool, begin: Callable[[str], object]) -> BatchResult:
        batch, first_row, before = self.task.batch(rows), int(rows[0]), self.task.embed.not_finite
        depth = max(int(self.task.gallery.num_right(batch.targets).max()), *self.recall_at)
        clean = metrics.mean_per_query(batch.rankings(depth), self.recall_at)
        kept: BatchResult = {"clean": clean, "attacked": {}, "embeddings": {"clean": batch.clean} if self.nmi else {}}
        lowest = dict.fromkeys((attack.name for attack in self.attacks), clean)
        latest: dict[str, _Attempt | None] = dict.fromkeys(lowest)
        worst = _WorstPerturbations(batch.images)
        for eps in self.radii:
            for number, attack in enumerate(self.attacks):
                begin(f"{attack.name}, eps {radius_text(eps, self.task.norm)}")
                known = self._before(number, lowest) if attack.follows else lowest[attack.name]
                result, attempt = self._run(attack, batch, eps, depth, first_row, known, latest[attack.name])
                lowest[attack.name], latest[attack.name] = result["measures"], attempt
                kept[_key(attack, eps)] = result
                if attempt is not None:
                    worst.update(number, eps, attempt, result)
            if self.keep_attacked:
                kept["attacked"][str(eps)] = worst.images.clone()
            if self.nmi:
                kept["embeddings"][str(eps)] = self._embed(worst.images)
            if examples and eps == self.radii[len(self.radii) // 2]:
                kept["examples"] = self._examples(batch, rows, clean, worst)
        kept["not_finite"] = torch.tensor(self.task.embed.not_finite - before)
        return kept

    def _run(
        self,
        attack: RetrievalAttack,
        batch: QueryBatch,
        eps: float,
        depth: int,
        first_row: int,
        lowest: PerQuery,
        latest: _Attempt | None,
    ) -> tuple[BatchResult, _Attempt | None]:
        """Of each query, the lowest measures over ``lowest`` and all restarts, and the strongest attempt.

        If every run leaves R@1 higher, it is that of ``latest``; None: there is none yet. Attempts of an attack on the
        gallery are not kept.
        """
        embed, start = self.task.embed, time.perf_counter()
        passes = embed.forward_passes, embed.backward_passes
        measures = {name: values.clone() for name, values in lowest.items()}
        keeps = attack.target == "query"
        strongest = (_Attempt.none(batch.images) if latest is None else latest.copy()) if keeps else None
        shift = torch.full((len(batch),), torch.nan, device=batch.images.device)
        for restart in range(attack.restarts):
            robust = measures["recall_at_1"] > 0
            all_queries = restart == 0 and not attack.only_robust and not attack.follows
            chosen = (torch.ones_like(robust) if all_queries else robust).nonzero().squeeze(1)
            if len(chosen):
                stream = zlib.crc32(repr((attack.name, eps, restart, first_row)).encode())
                with random_stream(self.seed, stream):
                    outcome = attack.run(batch[chosen], eps, restart, depth)
                    found = metrics.mean_per_query(outcome.rankings, self.recall_at)
                if strongest is not None:
                    strongest.update(chosen, outcome, found["recall_at_1"], measures["recall_at_1"][chosen])
                for name, values in found.items():
                    measures[name][chosen] = torch.minimum(measures[name][chosen], values)
                shift[chosen] = outcome.shift.to(shift).fmax(shift[chosen])
        cost = [embed.forward_passes - passes[0], embed.backward_passes - passes[1], time.perf_counter() - start]
        return {"measures": measures, "shift": shift, "cost": torch.tensor(cost, dtype=torch.float64)}, strongest

    def _before(self, number: int, lowest: Mapping[str, PerQuery]) -> PerQuery:
        """The lowest measures over an attack and those before it that perturb the same."""
        target = self.attacks[number].target
        found = [lowest[attack.name] for attack in self.attacks[: number + 1] if attack.target == target]
        return {name: torch.stack([measures[name] for measures in found]).amin(0) for name in found[0]}

    def _embed(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.task.embed(images)

    def _examples(self, batch: QueryBatch, rows: Tensor, clean: PerQuery, worst: _WorstPerturbations) -> BatchResult:
        right, labels = clean["recall_at_1"] > _HALF, batch.targets.labels
        broken, withstood = ((worst.succeeded == state) & right for state in (True, False))
        some = [_of_these(labels, broken, _EXAMPLES - _WITHSTOOD), _of_these(labels, withstood, _EXAMPLES)]
        ordered = torch.cat([*some, choose_queries(labels, broken, _EXAMPLES)]).tolist()
        chosen = torch.tensor([*dict.fromkeys(ordered)][:_EXAMPLES], device=labels.device)
        part, perturbed = batch[chosen], worst.images[chosen]
        gallery, count = self.task.gallery, min(_NEIGHBOURS, len(self.task.gallery))
        return {
            "eps": worst.eps[chosen.cpu()],
            "queries": rows[chosen],
            "attack": worst.attack[chosen],
            "succeeded": worst.succeeded[chosen],
            "clean": part.images,
            "perturbed": perturbed,
            "before": gallery.nearest(part.clean, part.targets, count),
            "after": gallery.nearest(self._embed(perturbed), part.targets, count),
        }

    def measures(self, batches: Sequence[BatchResult], rows: Tensor) -> dict[str, Any]:
        """What the report says of the queries ``rows`` ``(Q,)``, whose batches these are; the names are its own."""
        clean, labels = joined(batches, "clean"), self.task.queries.labels[rows]
        return {
            "protocol": self.task.protocol,
            "num_queries": len(rows),
            "num_gallery": len(self.task.gallery),
            "num_classes": self.task.num_classes,
            "clean": means(clean),
            "clean_flags": robust_flags(clean),
            "queries": tuple(rows.tolist()),
            "chance": self.task.gallery.chance(self.task.targets(rows)).mean().item(),
            "attacks": self.attack_results(batches),
            "worst": self.worst_cases(batches, labels),
            "collapse": metrics.collapse(self.task.gallery),
            "nmi": self.nmi_of(batches, "clean", labels),
            "examples": self.examples(batches[0]),
            "attacked": self.attacked(batches),
        }

    def attack_results(self, batches: Sequence[BatchResult]) -> tuple[AttackResult, ...]:
        """The results of each attack at each eps, over all batches."""
        found = []
        for eps, attack in itertools.product(self.radii, self.attacks):
            results = [batch[_key(attack, eps)] for batch in batches]
            measures = joined(results, "measures")
            forward, backward, seconds = torch.stack([result["cost"] for result in results]).sum(0).tolist()
            found.append(
                AttackResult(
                    attack=attack.name,
                    target=attack.target,
                    black_box=attack.black_box,
                    eps=eps,
                    measures=means(measures),
                    shift=torch.cat([result["shift"] for result in results]).nanmean().nan_to_num(0.0).item(),
                    forward_passes=int(forward),
                    backward_passes=int(backward),
                    seconds=seconds,
                    robust_flags=robust_flags(measures),
                )
            )
        return tuple(found)

    def worst_cases(self, batches: Sequence[BatchResult], labels: Tensor) -> tuple[WorstCase, ...]:
        """The worst case per query, by target and eps, over all batches; labels ``(Q,)`` of all queries."""
        found = []
        for target in TARGETS:
            lowest = joined(batches, "clean")
            attacks = [attack for attack in self.attacks if attack.target == target]
            for eps in self.radii if attacks else ():
                for attack in attacks:
                    measures = joined([batch[_key(attack, eps)] for batch in batches], "measures")
                    lowest = {name: torch.minimum(values, measures[name]) for name, values in lowest.items()}
                nmi = self.nmi_of(batches, str(eps), labels) if target == "query" else None
                found.append(WorstCase(target, eps, means(lowest), robust_flags(lowest), nmi))
        return tuple(found)

    def nmi_of(self, batches: Sequence[BatchResult], key: str, labels: Tensor) -> float | None:
        """NMI of the queries' embeddings, ``key`` being "clean" or an eps; None if it was not asked for."""
        if not self.nmi:
            return None
        return metrics.nmi(self._compared(torch.cat([batch["embeddings"][key] for batch in batches])), labels)

    def _compared(self, embeddings: Tensor) -> Tensor:
        return self.task.gallery.distance.query_vectors(finite_or_zero(embeddings))

    def attacked(self, batches: Sequence[BatchResult]) -> dict[float, Tensor] | None:
        """Eps -> ``(Q, C, H, W)`` perturbed queries; None if they were not kept."""
        if not self.keep_attacked:
            return None
        return {eps: torch.cat([batch["attacked"][str(eps)] for batch in batches]) for eps in self.radii}

    def examples(self, batch: BatchResult) -> tuple[Example, ...]:
        """Some queries with the items that they find, as `evaluate_batch` kept them."""
        kept = batch["examples"]
        names = [*(attack.name for attack in self.attacks), "none"]  # the number of no attack is -1
        return tuple(
            Example(
                query=query,
                label=int(self.task.queries.labels[query]),
                eps=float(kept["eps"][row]),
                attack=names[int(kept["attack"][row])],
                clean=kept["clean"][row].cpu(),
                perturbed=kept["perturbed"][row].cpu(),
                before=self._neighbours(query, kept["before"][row]),
                after=self._neighbours(query, kept["after"][row]),
                succeeded=bool(kept["succeeded"][row]),
                name=self.task.queries.name_of(query),
            )
            for row, query in enumerate(kept["queries"].tolist())
        )

    def _neighbours(self, query: int, items: Tensor) -> tuple[Neighbour, ...]:
        items = items[items >= 0]
        pixels = self.task.items[items].cpu() if self.task.items.has_images else [None] * len(items)
        labels, targets = self.task.items.labels, self.task.targets(items.new_tensor([query]))
        right = targets.is_right(labels)[0, items].tolist()
        names = map(self.task.items.name_of, items.tolist())
        parts = zip(items.tolist(), labels[items].tolist(), pixels, right, names, strict=True)
        return tuple(itertools.starmap(Neighbour, parts))


def _is_stronger(recall: Tensor, margin: Tensor, lowest: Tensor, largest: Tensor) -> Tensor:
    """``(n,)`` bool: attempts with a lower R@1 than the strongest so far, or with the same and a larger margin."""
    return (recall < lowest) | ((recall == lowest) & (margin > largest))


@dataclass
class _Attempt:
    """Of each query, the perturbed image ``(Q, C, H, W)`` of the strongest attempt so far.

    That is one with the lowest R@1, and of several the one with the largest ``margin`` ``(Q,)``: by how much the
    nearest wrong item is nearer than the nearest right one.
    """

    images: Tensor
    margin: Tensor

    @classmethod
    def none(cls, images: Tensor) -> _Attempt:
        """No attempt yet."""
        return cls(images.clone(), torch.full((len(images),), -torch.inf, device=images.device))

    def copy(self) -> _Attempt:
        return _Attempt(self.images.clone(), self.margin.clone())

    def update(self, rows: Tensor, outcome: AttackOutcome, found: Tensor, lowest: Tensor) -> None:
        """Takes what is stronger of an outcome on ``rows`` ``(n,)``, with its R@1 and the lowest so far, ``(n,)``."""
        margin = outcome.ranking.margin.to(self.margin)
        is_stronger = _is_stronger(found, margin, lowest, self.margin[rows])
        self.images[rows[is_stronger]] = outcome.images[is_stronger]
        self.margin[rows[is_stronger]] = margin[is_stronger]


class _WorstPerturbations:
    """Of each query, the perturbation with the lowest R@1: that which succeeded first, or the strongest attempt."""

    def __init__(self, images: Tensor) -> None:
        self.attack = torch.full((len(images),), -1, device=images.device)  # its number; -1: none was tried
        self.eps = torch.zeros(len(images), dtype=torch.float64)  # 0: none was tried
        self._strongest = _Attempt.none(images)
        self._lowest = torch.full((len(images),), torch.inf, device=images.device)

    @property
    def images(self) -> Tensor:
        return self._strongest.images

    @property
    def succeeded(self) -> Tensor:
        """``(Q,)`` bool: whether an attack succeeded."""
        return (self.attack >= 0) & (self._lowest <= _HALF)

    def update(self, attack: int, eps: float, attempt: _Attempt, result: BatchResult) -> None:
        found, tried = result["measures"]["recall_at_1"], ~result["shift"].isnan()
        is_stronger = _is_stronger(found, attempt.margin, self._lowest, self._strongest.margin)
        taken = (self._lowest > 0) & is_stronger & tried
        self._lowest = torch.where(taken, found, self._lowest)
        self._strongest = _Attempt(
            torch.where(per_image(taken, self.images), attempt.images, self.images),
            torch.where(taken, attempt.margin, self._strongest.margin),
        )
        self.attack[taken] = attack
        self.eps[taken.cpu()] = eps


def most_passes(attacks: Sequence[RetrievalAttack], queries: int, radii: int, is_random: bool = False) -> int | None:
    """Image passes of all attacks on some queries at some radii, at most; None: some attack does not say it."""
    draws, answers = (SAMPLES, 2 * ANSWERS) if is_random else (1, 0)
    each = [None if a.passes is None else (draws * a.passes + answers) * a.restarts for a in attacks]
    return None if None in each else queries * (radii * sum(filter(None, each)) + answers)


def choose_queries(labels: Tensor, preferred: Tensor, count: int) -> Tensor:
    """Up to ``count`` queries to show: one of each class before a second of any, preferred ones first."""
    order = preferred.to(torch.uint8).argsort(descending=True, stable=True)
    return order[rank_in_group(labels[order]).argsort(stable=True)][:count]


def _of_these(labels: Tensor, mask: Tensor, count: int) -> Tensor:
    """Up to ``count`` queries of a mask ``(Q,)``, of as many classes as there are."""
    rows = mask.nonzero().squeeze(1)
    return rows[choose_queries(labels[rows], mask[rows], count)]


def joined(batches: Sequence[BatchResult], key: str) -> PerQuery:
    """Measures ``(Q,)`` of the queries of all batches."""
    return {name: torch.cat([batch[key][name] for batch in batches]) for name in batches[0][key]}


def means(measures: PerQuery) -> dict[str, float]:
    """Each measure's mean over the queries."""
    return {name: values.double().mean().item() for name, values in measures.items()}


def robust_flags(measures: PerQuery) -> str:
    """One character per query: "1" if the nearest item is right (in more than half of all draws), else "0"."""
    return "".join("1" if right else "0" for right in (measures["recall_at_1"] > _HALF).tolist())


def _key(attack: RetrievalAttack, eps: float) -> str:
    return f"{attack.name}@{eps}"
