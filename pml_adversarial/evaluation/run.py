"""How an evaluation runs: every attack on one chunk of queries after the other, and what comes of all chunks."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attacks.ball import per_image
from ..training.isolation import random_stream
from ..training.tuples import rank_in_group
from . import metrics
from .attacks import AnyAttack, QueryBatch
from .gallery import embed_all, unit
from .metrics import PerQuery
from .report import TARGETS, AttackResult, Example, Neighbour, WorstCase
from .task import RetrievalTask

Part = dict[str, Any]
"""What is known of a chunk, in tensors: per-query measures, costs, and what is to be shown."""

_NEIGHBOURS, _EXAMPLES = 5, 8


@dataclass(frozen=True)
class Run:
    """All attacks at all eps, on one chunk of queries after the other."""

    task: RetrievalTask
    members: tuple[AnyAttack, ...]
    radii: tuple[float, ...]
    recall_at: Sequence[int]
    seed: int
    keep_attacked: bool
    nmi: bool

    @property
    def num_steps(self) -> int:
        """How often a chunk reports progress."""
        return len(self.radii) * sum(attack.restarts for attack in self.members)

    def chunk(self, rows: Tensor, first: bool, advance: Callable[[], object]) -> Part:
        """Attacks some queries; the first chunk also gives the examples."""
        batch = self.task.batch(rows)
        depth = max(int(self.task.gallery.num_right(batch.targets).max()), *self.recall_at)
        clean = metrics.per_query(self.task.gallery.ranking(batch.clean, batch.targets, depth), self.recall_at)
        part: Part = {"clean": clean, "attacked": {}, "embeddings": {"clean": batch.clean} if self.nmi else {}}
        measures = dict.fromkeys((attack.name for attack in self.members), clean)
        worst, by, at = batch.images.clone(), torch.full_like(rows, -1), torch.zeros(len(rows), dtype=torch.float64)
        for eps in self.radii:
            for number, attack in enumerate(self.members):
                stream = partial(_stream, attack.name, eps, int(rows[0]))
                result, images = self._attack(attack, batch, eps, measures[attack.name], depth, stream, advance)
                measures[attack.name] = result["measures"]
                part[_key(attack, eps)] = result
                if attack.target == "query":
                    taken = (by < 0) & ~result["shift"].isnan()
                    worst = torch.where(per_image(taken, worst), images, worst)
                    fell = taken & (result["measures"]["recall_at_1"] == 0)
                    by[fell], at[taken.cpu()] = number, eps
            if self.keep_attacked:
                part["attacked"][str(eps)] = worst.clone()
            if self.nmi:
                part["embeddings"][str(eps)] = embed_all(self.task.embed, worst, len(worst))
            if first and eps == self.radii[len(self.radii) // 2]:
                part["examples"] = self._examples(batch, rows, clean, worst, by, at)
        return part

    def _attack(
        self,
        attack: AnyAttack,
        batch: QueryBatch,
        eps: float,
        before: PerQuery,
        depth: int,
        stream: Callable[[int], int],
        advance: Callable[[], object],
    ) -> tuple[Part, Tensor]:
        """One attack, all its restarts: of each query's measures the lowest, and what it was perturbed to."""
        embed, start = self.task.embed, time.perf_counter()
        passes = embed.forward_passes, embed.backward_passes
        measures = {name: values.clone() for name, values in before.items()}
        images = batch.images.clone()
        shift = torch.full((len(batch),), torch.nan, device=images.device)
        for restart in range(attack.restarts):
            standing = measures["recall_at_1"] > 0
            everyone = restart == 0 and not attack.only_standing
            chosen = (torch.ones_like(standing) if everyone else standing).nonzero().squeeze(1)
            if len(chosen):
                with random_stream(self.seed, stream(restart)):
                    outcome = attack.run(batch[chosen], eps, restart, depth)
                found = metrics.per_query(outcome.ranking, self.recall_at)
                met = (standing[chosen] | (found["recall_at_1"] == 0)).nonzero().squeeze(1)  # not: failed, now stands
                images[chosen[met]] = outcome.images[met]
                for name, values in found.items():
                    measures[name][chosen] = torch.minimum(measures[name][chosen], values)
                shift[chosen] = outcome.shift.to(shift).fmax(shift[chosen])
            advance()
        cost = [embed.forward_passes - passes[0], embed.backward_passes - passes[1], time.perf_counter() - start]
        return {"measures": measures, "shift": shift, "cost": torch.tensor(cost, dtype=torch.float64)}, images

    def _examples(
        self, batch: QueryBatch, rows: Tensor, clean: PerQuery, worst: Tensor, by: Tensor, at: Tensor
    ) -> Part:
        chosen = choose_queries(batch.targets.labels, (by >= 0) & (clean["recall_at_1"] > 0), _EXAMPLES)
        part = batch[chosen]
        gallery, count = self.task.gallery, min(_NEIGHBOURS, len(self.task.gallery) - 1)
        return {
            "eps": at[chosen.cpu()],
            "queries": rows[chosen],
            "by": by[chosen],
            "clean": part.images,
            "perturbed": worst[chosen],
            "before": gallery.nearest(part.clean, part.targets.own, count),
            "after": gallery.nearest(embed_all(self.task.embed, worst[chosen], len(chosen)), part.targets.own, count),
        }

    def results(self, parts: Sequence[Part]) -> tuple[AttackResult, ...]:
        """What is left under each attack."""
        found = []
        for eps in self.radii:
            for attack in self.members:
                key = _key(attack, eps)
                measures = joined([part[key] for part in parts], "measures")
                shift = torch.cat([part[key]["shift"] for part in parts])
                forward, backward, seconds = torch.stack([part[key]["cost"] for part in parts]).sum(0).tolist()
                found.append(
                    AttackResult(
                        attack=attack.name,
                        target=attack.target,
                        black_box=attack.black_box,
                        eps=eps,
                        measures=means(measures),
                        shift=shift.nanmean().nan_to_num(0.0).item(),
                        forward_passes=int(forward),
                        backward_passes=int(backward),
                        seconds=seconds,
                        standing=marks(measures),
                    )
                )
        return tuple(found)

    def worst(self, parts: Sequence[Part], labels: Tensor) -> tuple[WorstCase, ...]:
        """What is left if each query meets the worst attack for it, by target and eps."""
        found = []
        for target in TARGETS:
            lowest = joined(parts, "clean")
            members = [attack for attack in self.members if attack.target == target]
            for eps in self.radii if members else ():
                for attack in members:
                    measures = joined([part[_key(attack, eps)] for part in parts], "measures")
                    lowest = {name: torch.minimum(values, measures[name]) for name, values in lowest.items()}
                nmi = self.nmi_of(parts, str(eps), labels) if self.nmi and target == "query" else None
                found.append(WorstCase(target, eps, means(lowest), marks(lowest), nmi))
        return tuple(found)

    def nmi_of(self, parts: Sequence[Part], key: str, labels: Tensor) -> float:
        """Of the queries, clean or each under its worst attack."""
        return metrics.nmi(unit(torch.cat([part["embeddings"][key] for part in parts])), labels)


def choose_queries(labels: Tensor, preferred: Tensor, count: int) -> Tensor:
    """Up to ``count`` queries to show: one of each class before a second of any, preferred ones first."""
    order = preferred.to(torch.uint8).argsort(descending=True, stable=True)
    return order[rank_in_group(labels[order]).argsort(stable=True)][:count]


def examples_of(task: RetrievalTask, part: Part, members: Sequence[AnyAttack]) -> tuple[Example, ...]:
    """Some queries with what they find, as the first chunk has them."""

    def neighbours(items: Tensor) -> tuple[Neighbour, ...]:
        pixels, labels = task.items.pixels(items).cpu(), task.items.labels[items].tolist()
        return tuple(Neighbour(*parts) for parts in zip(items.tolist(), labels, pixels, strict=True))

    found = part["examples"]
    return tuple(
        Example(
            query=query,
            label=int(task.queries.labels[query]),
            eps=eps,
            attack=members[by].name if by >= 0 else "none",
            clean=clean.cpu(),
            perturbed=perturbed.cpu(),
            before=neighbours(before),
            after=neighbours(after),
        )
        for eps, query, by, clean, perturbed, before, after in zip(
            found["eps"].tolist(),
            found["queries"].tolist(),
            found["by"].tolist(),
            *(found[key] for key in ("clean", "perturbed", "before", "after")),
            strict=True,
        )
    )


def joined(parts: Sequence[Part], key: str) -> PerQuery:
    """Measures of all chunks, one after the other."""
    return {name: torch.cat([part[key][name] for part in parts]) for name in parts[0][key]}


def means(measures: PerQuery) -> dict[str, float]:
    """Over the queries."""
    return {name: values.double().mean().item() for name, values in measures.items()}


def marks(measures: PerQuery) -> str:
    """One character per query, "1" if R@1 held."""
    return "".join("1" if stands else "0" for stands in (measures["recall_at_1"] > 0).tolist())


def marked(standing: str) -> Tensor:
    """``(Q,)`` bool: what `marks` wrote.

    >>> marked("10")
    tensor([ True, False])
    """
    return torch.tensor([mark == "1" for mark in standing], dtype=torch.bool)


def _key(attack: AnyAttack, eps: float) -> str:
    return f"{attack.name}@{eps}"


def _stream(name: str, eps: float, first_row: int, restart: int) -> int:
    return zlib.crc32(repr((name, eps, restart, first_row)).encode())
