"""Targeted attacks: how often a query can be made to find an item of a class or identity that the attacker chose."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attacks.ball import radius_text
from ..attacks.checks import check_choice, check_steps, check_whole
from ..attacks.objective import Score
from ..errors import InputError
from ..training.isolation import random_stream
from ..training.pixels import Bounds, Normalization
from .attacks.gradients import gradient_attack
from .attacks.kinds import QueryAttack
from .attacks.square import square_attack
from .checks import FEW, plausible
from .reports import fingerprints, provenance
from .reports.binomial import CONFIDENCE, Interval, rate_interval
from .reports.saved import Saved
from .retrieval.batch import QueryBatch
from .retrieval.embedder import Embedder, plain_surroundings
from .retrieval.forms import Images
from .retrieval.gallery import Ranking, Targets
from .retrieval.options import NORMS, settings_of_inputs, to_radii, to_seed, to_whole_numbers
from .retrieval.task import JUNK, Mask, RetrievalTask, Search

STEPS, RESTARTS, QUERIES = 50, 3, 500  #: Defaults of `evaluate_targeted`.

Flags = Mapping[int, str]
"""k -> one character per query: "1" if an item of the target is among the first k, "0" if not."""


@dataclass(frozen=True, eq=False)
class TargetedReport(Saved):
    """How often queries find an item of a class that they should not find. ``print(report)`` shows a table.

    Attributes:
        k: how many items of the list count.
        num_queries: how many queries were evaluated.
        num_gallery: how many items were searched.
        left_out: how many queries were left out, because items of the target are right for them, or are never found.
        queries: indices of the queries.
        targets: of each query, the label of the target.
        flags: eps -> see `Flags`; in the worst case over all attacks, starts and smaller eps. Eps 0 is without attack.
        passes: eps -> image passes of all attacks, forward and backward ones counted separately.
        settings: all settings that are needed to repeat the evaluation.
        versions: of Python and the libraries.
        provenance: fingerprints of model and images, and the machine, time and command.
        notes: what else a reader has to know.
    """

    SCHEMA: ClassVar[int] = 1

    k: tuple[int, ...]
    num_queries: int
    num_gallery: int
    left_out: int
    queries: tuple[int, ...] = field(repr=False)
    targets: tuple[int, ...] = field(repr=False)
    flags: Mapping[float, Flags] = field(repr=False)
    passes: Mapping[float, int]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]

    def success(self, eps: float = 0.0, k: int = 1) -> float:
        """Share of the queries that find an item of their target among the first k, in the worst case at one eps.

        Raises:
            InputError: the evaluation did not measure this.
        """
        return self._flags(eps, k).count("1") / self.num_queries

    def interval(self, eps: float = 0.0, k: int = 1) -> Interval:
        """The 95 % confidence interval (Clopper-Pearson) of `success`, for queries of which these are a sample.

        Raises:
            InputError: the evaluation did not measure this.
        """
        return rate_interval(self._flags(eps, k).count("1"), self.num_queries)

    def _flags(self, eps: float, k: int) -> str:
        if eps not in self.flags or k not in self.k:
            raise InputError(
                f"k={k} at eps={eps} was not evaluated; choose k of {', '.join(map(str, self.k))}, eps of "
                f"{', '.join(radius_text(radius, self.settings['norm']) for radius in self.flags)}."
            )
        return self.flags[eps][k]

    def __str__(self) -> str:
        """A table in percent, then a line on the setting and one per note."""
        rows = [["success", "eps", *(f"top {k}" for k in self.k), "passes"], *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        setting = (
            f"targeted, {self.settings['norm']}, {self.settings['distance']}: {self.num_queries} queries "
            f"({self.left_out} left out), {len(set(self.targets))} target(s), {self.num_gallery} items; percent, "
            f"{100 * CONFIDENCE:.0f} % intervals"
        )
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", setting, *notes])

    def _rows(self) -> Iterator[list[str]]:
        for eps in self.flags:
            passes = f"{self.passes[eps]:,}" if eps else ""
            yield [
                "worst" if eps else "none",
                radius_text(eps, self.settings["norm"]) if eps else "",
                *(self._cell(eps, k) for k in self.k),
                passes,
            ]

    def _cell(self, eps: float, k: int) -> str:
        low, high = self.interval(eps, k)
        return f"{100 * self.success(eps, k):.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def to_dict(self) -> dict[str, Any]:
        """All results in types that JSON knows."""
        return {"schema": self.SCHEMA, **vars(self)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> TargetedReport:
        """A report from what JSON makes of `to_dict`, without ``schema``."""
        parts: dict[str, Any] = {name: tuple(found[name]) for name in ("k", "queries", "targets", "notes")}
        parts["passes"] = {float(eps): count for eps, count in found["passes"].items()}
        parts["flags"] = {
            float(eps): {int(k): flags for k, flags in by_k.items()} for eps, by_k in found["flags"].items()
        }
        return cls(**{**found, **parts})


def evaluate_targeted(
    model: Any,
    queries: Images,
    gallery: Images | None = None,
    *,
    target: int | Sequence[int] | Tensor,
    eps: float | Iterable[float],
    k: int | Iterable[int] = (1, 5),
    norm: str = "Linf",
    distance: Any = "cosine",
    steps: int = STEPS,
    restarts: int = RESTARTS,
    square: int = QUERIES,
    normalization: Normalization | None = None,
    bounds: Bounds | None = None,
    subset: Sequence[int] | Tensor | None = None,
    own: Sequence[int] | Tensor | str | None = None,
    ignore: Mask = None,
    relevant: Mask = None,
    junk_label: int | None = JUNK,
    gallery_embeddings: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> TargetedReport:
    """Attacks queries so that they find an item of a chosen class, and measures how often this succeeds.

    An attack succeeds at k if an item of the target is among the first k that the query finds. It raises the similarity
    of the nearest item of the target over that of the k-th nearest other item; both are chosen anew in each step. For
    each query any success counts: that of any attack, from any start, at any smaller eps, and without attack. Ties
    count as successes. So the shares can only be too low: a stronger attack may succeed more often.

    Args:
        model: as in `evaluate_robustness`.
        queries: as in `evaluate_robustness`.
        gallery: as in `evaluate_robustness`.
        target: a label of the gallery, or ``(Q,)`` labels, one for each query. With one label for all, queries for
            which its items are right are left out.
        eps: as in `evaluate_robustness`.
        k: how many items of the list count; one or more numbers.
        norm: as in `evaluate_robustness`.
        distance: as in `evaluate_robustness`.
        steps: gradient steps of each run.
        restarts: runs for each k, from different random starts.
        square: forward passes of the black-box attack for each k, on queries that the gradients did not lead to the
            target; 0: it is left out.
        normalization: as in `evaluate_robustness`.
        bounds: as in `evaluate_robustness`.
        subset: as in `evaluate_robustness`.
        own: as in `evaluate_robustness`.
        ignore: as in `evaluate_robustness`.
        relevant: as in `evaluate_robustness`.
        junk_label: as in `evaluate_robustness`.
        gallery_embeddings: as in `evaluate_robustness`.
        seed: as in `evaluate_robustness`.
        batch_size: as in `evaluate_robustness`.

    Raises:
        InputError: the inputs cannot be evaluated; a target is not in the gallery; or, with a label for each query, its
            items are right for the query.
    """
    check_choice("norm", norm, NORMS)
    batch_size, seed = check_whole("batch_size", batch_size), to_seed(seed)
    check_steps(steps, error=InputError)
    check_whole("restarts", restarts)
    check_whole("square", square, 0, hint=", as the number of passes of the black-box attack")
    radii, depths = to_radii(eps, norm), _to_depths(k)
    subset = None if subset is None else to_whole_numbers(subset, "subset")
    embed = Embedder(model, normalization, bounds)
    search = Search(distance, own, ignore, relevant, junk_label)
    settings = {
        **{"eps": list(radii), "k": list(depths), "norm": norm},
        **{"steps": steps, "restarts": restarts, "square": square, "seed": seed, "batch_size": batch_size},
        **search.settings(),
        **settings_of_inputs(normalization, bounds),
        "subset": subset,
    }
    with plain_surroundings(), random_stream(seed, -1):
        task = RetrievalTask(embed, queries, gallery, norm, search)
        task.probe(radii)
        with embed.isolated():
            asked = task.rows(subset)
            task.embed_and_set(asked, batch_size, gallery_embeddings)
            origin = fingerprints.of_task(task, asked, gallery_embeddings)
            rows, targets = _aims(task, asked, target)
            run = _Run(task, rows, targets, depths, radii, batch_size, seed)
            run.make(tuple(_attacks(depths, steps, restarts, square)))
            task.note_not_finite(embed.not_finite)
        return TargetedReport(
            k=depths,
            num_queries=len(rows),
            num_gallery=len(task.gallery),
            left_out=len(asked) - len(rows),
            queries=tuple(rows.tolist()),
            targets=tuple(targets.tolist()),
            flags=run.flags,
            passes=run.passes,
            settings={**settings, "device": str(embed.device), "precision": embed.precision},
            versions=provenance.versions(),
            provenance={**origin, **provenance.surroundings(embed.device)},
            notes=tuple(task.notes),
        )


def lead_score(batch: QueryBatch, restart: int, *, k: int) -> Score:
    """How much nearer the nearest right item is than the k-th nearest wrong one, plus the width of a tie.

    At 0 or above, a right item is among the first k. Both items are chosen anew in each step.
    """
    gallery = batch.gallery

    def score(queries: Tensor) -> Tensor:
        nearest, other = gallery.hardest(queries, batch.targets)[1], gallery.hardest(queries, batch.targets, k - 1)[0]
        return gallery.lead(queries, nearest, other) + gallery.tie

    return score


def _attacks(depths: Sequence[int], steps: int, restarts: int, square: int) -> Iterator[tuple[int, QueryAttack]]:
    """For each k, the attacks that aim at the first k; those with gradients first."""
    scores = {k: partial(lead_score, k=k) for k in depths}
    for k, score in scores.items():
        yield k, QueryAttack(f"top {k}", gradient_attack(score, steps), restarts)
    for k, score in scores.items() if square else ():
        yield k, QueryAttack(f"square, top {k}", square_attack(score, square), black_box=True)


@dataclass(eq=False)
class _Run:
    """The queries ``rows`` ``(n,)`` with the labels of their targets ``(n,)``, and what was reached so far.

    Attributes:
        flags, passes: see `TargetedReport`.
        reached: ``(n, K)`` bool, for each k.
    """

    task: RetrievalTask
    rows: Tensor
    targets: Tensor
    depths: tuple[int, ...]
    radii: tuple[float, ...]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        batches = map(self._batch, torch.arange(len(self.rows)).split(self.batch_size))
        rankings = (batch.rankings(max(self.depths)) for batch in batches)
        self.reached = torch.cat([_mostly_reached(ranking, self.depths) for ranking in rankings]).cpu()
        self.flags, self.passes = {0.0: self._as_flags()}, dict[float, int]()

    def make(self, attacks: Sequence[tuple[int, QueryAttack]]) -> None:
        """Makes all attacks at all eps, and notes if those without gradients reach more."""
        for eps in self.radii:
            before = self._count_passes()
            for k, attack in attacks:
                known = self.reached[:, self.depths.index(k)].clone()
                for restart in range(attack.restarts):
                    self._attack(attack, k, eps, restart)
                if attack.black_box:
                    self._note(int((self.reached[:, self.depths.index(k)] & ~known).sum()), k, eps)
            self.flags[eps], self.passes[eps] = self._as_flags(), self._count_passes() - before

    def _attack(self, attack: QueryAttack, k: int, eps: float, restart: int) -> None:
        """One run on the queries that have not reached their targets."""
        left = (~self.reached[:, self.depths.index(k)]).nonzero().squeeze(1)
        for part in left.split(self.batch_size) if len(left) else ():
            with random_stream(self.seed, zlib.crc32(repr((attack.name, eps, restart, int(part[0]))).encode())):
                outcome = attack.run(self._batch(part), eps, restart, max(self.depths))
                reached = _mostly_reached(outcome.rankings, self.depths)
                if outcome.is_finite is not None:
                    reached = reached & outcome.is_finite.unsqueeze(1)  # what is not finite finds nothing
                self.reached[part] |= reached.cpu()

    def _note(self, alone: int, k: int, eps: float) -> None:
        if not plausible(alone, len(self.rows), FEW):
            self.task.notes.append(
                f"{alone} of {len(self.rows)} queries reach their target (top {k}, eps {eps:.4g}) only by Square, "
                "which uses no gradients: gradients lead nowhere, and the shares are too low"
            )

    def _batch(self, part: Tensor) -> QueryBatch:
        """Queries, of which the items of their targets are the right ones."""
        part = part.to(self.rows.device)
        batch = self.task.batch(self.rows[part])
        return replace(batch, targets=_aimed(batch.targets, self.targets[part]))

    def _count_passes(self) -> int:
        return self.task.embed.forward_passes + self.task.embed.backward_passes

    def _as_flags(self) -> Flags:
        columns = zip(self.depths, self.reached.T.tolist(), strict=True)
        return {k: "".join("01"[hit] for hit in column) for k, column in columns}


def _aimed(targets: Targets, labels: Tensor) -> Targets:
    """Targets whose right items are those with other labels ``(Q,)``; all others are wrong."""
    return replace(targets, labels=labels, relevant=None)


def _mostly_reached(rankings: Iterable[Ranking], depths: Sequence[int]) -> Tensor:
    """``(Q, K)`` bool: whether `_reached` is true of half of some rankings of the same queries, or of more."""
    count, total = 0, torch.zeros(())
    for ranking in rankings:
        count, total = count + 1, total.to(ranking.right.device) + _reached(ranking, depths).float()
    return total >= count / 2


def _reached(ranking: Ranking, depths: Sequence[int]) -> Tensor:
    """``(Q, K)`` bool: whether a right item is among the first k, for each k. Of equally near items it is the first."""
    nearest = ranking.right[:, :1] + ranking.tie
    others = torch.nn.functional.pad(ranking.wrong, (0, max(depths)), value=-torch.inf)  # where there are fewer
    return nearest >= others[:, [k - 1 for k in depths]]


def _aims(task: RetrievalTask, rows: Tensor, target: int | Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Those of the queries ``rows`` that can be led to their targets, and the labels of the targets."""
    if task.queries.label_sets is not None:
        raise InputError("The images have several labels each; expected one label, which can be the target.")
    labels, is_one = _to_labels(target, len(task.queries))
    labels = labels.to(rows.device)[rows]
    unknown = labels[~torch.isin(labels, task.gallery.classes)].unique()
    if len(unknown):
        raise InputError(
            f"target holds {unknown.tolist()[:8]}, which are no labels of the gallery; expected some that are."
        )
    parts = [_relations(task, rows[part], labels[part]) for part in torch.arange(len(rows)).split(1024)]
    is_own, is_found = (torch.cat(found) for found in zip(*parts, strict=True))
    if is_own.any() and not is_one:
        raise InputError(
            f"Items of their target are right for the queries {rows[is_own].tolist()[:8]}; expected for each query a "
            "label other than its own. Leave them out with subset=..., or choose another target for them."
        )
    kept = is_found & ~is_own
    if not kept.any():
        raise InputError(
            f"None of {len(rows)} queries can be led to its target: it is the query's own class, or none of its items "
            "is ever found. Expected another target."
        )
    return rows[kept], labels[kept]


def _relations(task: RetrievalTask, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(n,)`` bool, twice: whether items with a label ``(n,)`` are right for the query; whether it can find any."""
    targets, items = task.targets(rows), task.gallery.labels
    aimed, everything = _aimed(targets, labels), slice(0, len(items))
    found = aimed.is_right(items) & ~targets.is_left_out(everything)
    is_own = (found & targets.is_right(items)).any(1)
    if targets.relevant is None:
        is_own |= targets.labels == labels
    return is_own, found.any(1)


def _to_labels(target: Any, total: int) -> tuple[Tensor, bool]:
    """A label for each of all queries ``(Q,)``, and whether it is one label for all."""
    is_one = isinstance(target, int) or getattr(target, "ndim", 1) == 0
    labels = to_whole_numbers([target] * total if is_one else target, "target")
    if len(labels) != total:
        raise InputError(f"target holds {len(labels)} labels for {total} queries; expected one, or one for each query.")
    return torch.tensor(labels), is_one


def _to_depths(k: int | Iterable[int]) -> tuple[int, ...]:
    """Different numbers of items, ascending."""
    found = sorted(set(to_whole_numbers(k if isinstance(k, Iterable) else [k], "k")))
    if not found or found[0] < 1:
        raise InputError(f"k={k!r}; expected one or more whole numbers from 1 on, such as (1, 5).")
    return tuple(found)
