"""The scores that other papers report: RobRank's ten attacks and ERS, the score they are averaged into.

With f an embedding of length 1, d the Euclidean distance, X the clean gallery, q' the perturbed query, c' a perturbed
gallery item (each query serves as one) and [z]+ = max(z, 0):

=====  ==============================  ===========================  ======================================
score  fixed before the attack         minimised                    raw value
=====  ==============================  ===========================  ======================================
CA+    Q, any item                     mean_x [d(Q,c') - d(x,Q)]+   percentile of c' in the list of Q
CA-    Q, of the nearest 1 %           mean_x [d(x,Q) - d(Q,c')]+   the same
QA+    C, any item                     mean_x [d(q',C) - d(x,q')]+  percentile of C in the list of q'
QA-    C, of the nearest 1 %           mean_x [d(x,q') - d(q',C)]+  the same
TMA    t, any item                     1 - cos(q', t)               cosine of q' and t
ES:D   q                               -d(q', q)                    d(q', q)
ES:R   q                               the same run                 R@1 of q'
LTM    labels                          [d(q', furthest wrong item)  R@1 of q'
                                       - d(q', nearest right)]+
GTM    u, "the top-1 unmatching item"  d(q', u)                     R@1 of q'
GTT    i, the nearest item             the loss of QA- with C = i   whether i is still among the nearest 4
=====  ==============================  ===========================  ======================================

Percentiles, recalls and GTT are in percent here, as the papers print them; the percentile of the first item is 0. Every
run takes sign steps from the clean image, and its last iterate is scored. Sources: Zhou et al., "Adversarial Attack and
Defense in Deep Ranking", arXiv 2106.03614; Zhou and Patel, "Enhancing Adversarial Robustness for Deep Metric Learning",
arXiv 2203.01439; and their public code, which the version "published" follows where it and the papers differ.

The version "corrected" takes the same steps, but

- GTM leads to the nearest item of another class than the query's. The published u is not that item: it is near for
  *the nearest item's* class, and its place among the unmatching items is taken for its place in the whole gallery.
- LTM leaves the query's own clean item, which stays the nearest right one for long, out of the right items, and leads
  to the nearest wrong item, not the furthest.
- The own item is left out of X everywhere, and what is fixed is never the query itself. A percentile is the share of
  the other items that are ahead.
- ES:D counts in units of the query's mean distance d_q to the other items: min(2, sqrt(2) d(q', q) / d_q), unchanged
  where items are orthogonal, and 2 if all coincide. So contracting an embedding no longer raises the score.
- Ties count against the model. Published, equally near items are taken in the order of the gallery (CA: as behind).

What stays in both: one run without random start or restarts, so the recalls are upper bounds, and ranks, a cosine, a
distance and recalls in one mean. Two things the published code does are left out of both. It reads ES:D off one step
before the last. And it fails on galleries under 100 items, whose nearest 1 % is empty; here it is at least one item.

CA-TRIDE's ARS (arXiv 2312.07364), a later correction of ERS, is not offered: its formula is not in its public code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pairwise_distance

from ..errors import InputError
from ..training.isolation import isolated, random_stream
from ..training.pixels import Normalization, PixelSpace
from .gallery import Embed, chunks, embed_all

Version = Literal["published", "corrected"]
Loss = Callable[[Tensor], Tensor]
"""Embeddings ``(B, D)`` of the perturbed images, of length 1 -> ``(B,)``."""


@dataclass(frozen=True)
class Settings:
    """How far and how long each of the attacks goes.

    Attributes:
        eps: l-inf radius, in pixels of [0, 1].
        alpha: length of one sign step, in pixels of [0, 1].
        steps: sign steps.
    """

    eps: float
    alpha: float = 3 / 255
    steps: int = 32

    def __post_init__(self) -> None:
        if not (0 <= self.eps <= 1 and 0 < self.alpha <= 1 and isinstance(self.steps, int) and self.steps > 0):
            raise InputError(
                f"{self}; expected eps from 0 to 1 and alpha above 0 up to 1, in pixels of [0, 1] (such as 8 / 255), "
                "and one or more steps."
            )


PRESETS: dict[str, Settings] = {"28x28": Settings(eps=77 / 255), "224x224": Settings(eps=8 / 255)}
"""The published settings, by the size of the images."""


class _Scale(NamedTuple):
    lowest: float
    highest: float
    normalised: Callable[[float], float]


_RAISED = _Scale(0, 100, lambda percentile: 2 * percentile)
_SUNK = _Scale(0, 100, lambda percentile: 100 - percentile)
_RECALL = _Scale(0, 100, lambda recall: recall)
_SCALES: dict[str, _Scale] = {
    "CA+": _RAISED,
    "CA-": _SUNK,
    "QA+": _RAISED,
    "QA-": _SUNK,
    "TMA": _Scale(-1, 1, lambda cosine: 100 * (1 - cosine)),
    "ES:D": _Scale(0, 2, lambda distance: 50 * (2 - distance)),
    "ES:R": _RECALL,
    "LTM": _RECALL,
    "GTM": _RECALL,
    "GTT": _RECALL,
}
SCORES = tuple(_SCALES)
"""Names of the ten scores."""

HELD = tuple(name for name, scale in _SCALES.items() if scale is _RECALL)
"""The scores that are a share of queries."""


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """The ten raw scores on the scale on which ERS averages them: larger is more robust, mostly 0 to 100.

    Args:
        scores: raw values of all `SCORES`, as the papers print them: TMA a cosine, ES:D a distance, others percent.

    Raises:
        InputError: a score is missing, unknown, or out of its range.
    """
    if set(scores) != set(SCORES):
        raise InputError(f"Scores {sorted(scores)}; expected exactly {', '.join(SCORES)}.")
    for name, (lowest, highest, _) in _SCALES.items():
        if not lowest - 1e-6 <= scores[name] <= highest + 1e-6:
            raise InputError(
                f"{name} is {scores[name]}; expected {lowest} to {highest}. TMA is a cosine, ES:D a distance, all "
                "others are percent."
            )
    return {name: scale.normalised(scores[name]) for name, scale in _SCALES.items()}


def ers(scores: Mapping[str, float]) -> float:
    """RobRank's empirical robustness score, the mean of the ten normalised scores; larger is more robust.

    ``(2 CA+ + (100 - CA-) + 2 QA+ + (100 - QA-) + 100 (1 - TMA) + 50 (2 - ES:D) + ES:R + LTM + GTM + GTT) / 10``

    Args:
        scores: see `normalised`.

    Raises:
        InputError: see `normalised`.

    Example:
        >>> plain = {"CA+": 0.0, "CA-": 100.0, "QA+": 0.0, "QA-": 99.9, "TMA": 0.883, "ES:D": 1.762, "ES:R": 0.0}
        >>> round(ers({**plain, "LTM": 0.0, "GTM": 14.1, "GTT": 0.0}), 1)  # arXiv 2203.01439, CUB, no defence
        3.8
    """
    return sum(normalised(scores).values()) / len(SCORES)


@dataclass(frozen=True, eq=False)
class RobRankScores:
    """RobRank's scores of one model.

    Attributes:
        scores: raw values by name, as the papers print them: TMA a cosine, ES:D a distance, the others percent.
        version: "published" or "corrected".
        settings: of all attacks.
        queries: ``(Q,)`` indices of the images that were perturbed.
        left_out: how many of the wanted queries have no other image of their class and were left out.
        clean: ``(Q,)`` bool, R@1 of the queries without attack.
        held: for ES:R, LTM, GTM and GTT ``(Q,)`` bool, whether the query held: its nearest item is right, or, for GTT,
            what was nearest is among the nearest 4. All of them together are a worst case per query.
        seed: of the random choices.
    """

    scores: Mapping[str, float]
    version: Version
    settings: Settings
    queries: Tensor
    left_out: int
    clean: Tensor
    held: Mapping[str, Tensor]
    seed: int

    @property
    def ers(self) -> float:
        """See `ers`."""
        return ers(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON; they become ``num_queries`` and ``recall_at_1``, in percent."""
        return {
            "version": self.version,
            "settings": asdict(self.settings),
            "seed": self.seed,
            "num_queries": len(self.queries),
            "left_out": self.left_out,
            "recall_at_1": 100 * _mean(self.clean),
            "scores": dict(self.scores),
            "normalised": normalised(self.scores),
            "ers": self.ers,
        }


def robrank_scores(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    settings: Settings | str,
    version: Version = "published",
    queries: int | Sequence[int] | Tensor | None = None,
    normalization: Normalization | None = None,
    seed: int = 0,
    chunk: int = 128,
    progress: Callable[[], object] | None = None,
) -> RobRankScores:
    """Perturbs queries by each of RobRank's attacks in turn; the gallery is all images, clean (leave one out).

    Args:
        model: images -> embeddings ``(N, D)``; it is attacked in eval mode and comes back as it was.
        images: ``(N, C, H, W)`` pixels in [0, 1].
        labels: ``(N,)``.
        settings: `Settings`, or the name of one of `PRESETS`.
        version: "published" or "corrected", see above.
        queries: how many images are drawn as queries, or which ones; None: all.
        normalization: ``(mean, std)`` if the model takes normalised inputs; images are given as pixels all the same.
        seed: of the choice of queries and of what the attacks aim at.
        chunk: queries that are attacked together; memory grows with it times the size of the gallery.
        progress: called after each of the nine runs (ES gives two scores) of each chunk.

    Raises:
        InputError: images, labels, queries or settings that cannot be used, or embeddings that are not finite or carry
            no gradient.
    """
    chosen = _settings(settings)
    if version not in ("published", "corrected"):
        raise InputError(f"version={version!r}; expected 'published' or 'corrected'.")
    if chunk < 1:
        raise InputError(f"chunk={chunk}; expected one or more queries.")
    pixels, space = PixelSpace().to_pixels(images), PixelSpace(normalization)
    labels = _labels(labels, pixels)

    def embed(points: Tensor) -> Tensor:
        return model(space.to_inputs(points))

    with isolated(model), random_stream(seed, -1):
        gallery = _checked(embed_all(embed, pixels, chunk), len(pixels))
        own, left_out = _queries(queries, labels)
        lots = torch.rand(len(own), len(_ATTACKS), dtype=torch.float64)
        parts = []
        for rows in chunks(len(own), chunk):
            batch = _QueryBatch(gallery, labels, own[rows], version == "corrected")
            part = {"clean": batch.recalled(batch.clean)}
            for attack, lot in zip(_ATTACKS, lots[rows].unbind(1), strict=True):
                target = attack.aim(batch, lot)
                found = _descend(embed, pixels[batch.own], attack.loss(batch, target), chosen)
                with torch.no_grad():
                    moved = _unit(embed(found))
                part |= {name: measure(batch, target, moved) for name, measure in attack.measures.items()}
                if progress is not None:
                    progress()
            parts.append(part)
    measured = {name: torch.cat([part[name] for part in parts]) for name in ("clean", *SCORES)}
    held = {name: measured[name] for name in HELD}
    scores = {name: _mean(measured[name]) * (100 if name in HELD else 1) for name in SCORES}
    return RobRankScores(scores, version, chosen, own, left_out, measured["clean"], held, seed)


def _descend(embed: Embed, images: Tensor, loss: Loss, settings: Settings) -> Tensor:
    """The last of the sign steps that lower each row's loss, from the clean image, within the ball and [0, 1]."""
    low, high = (images - settings.eps).clamp(min=0), (images + settings.eps).clamp(max=1)
    point = images
    for _ in range(settings.steps):
        point = point.detach().requires_grad_()
        embeddings = embed(point)
        if not embeddings.requires_grad:
            raise InputError("The embeddings carry no gradient; expected a model without detach() or no_grad().")
        (gradient,) = torch.autograd.grad(loss(_unit(embeddings)).sum(), point)
        point = (point.detach() - settings.alpha * gradient.sign()).clamp(low, high)
    return point


@dataclass(frozen=True, eq=False)
class _QueryBatch:
    """The clean gallery, and the queries of one chunk in it.

    Attributes:
        gallery: ``(G, D)`` embeddings of length 1.
        labels: ``(G,)``.
        own: ``(B,)`` items of the gallery that the queries are.
        corrected: which version is wanted.
    """

    gallery: Tensor
    labels: Tensor
    own: Tensor
    corrected: bool

    @cached_property
    def clean(self) -> Tensor:
        """``(B, D)`` embeddings of the queries."""
        return self.gallery[self.own]

    @cached_property
    def same(self) -> Tensor:
        """``(B, G)`` bool, items of the query's class, itself included."""
        return self.labels[self.own].unsqueeze(1) == self.labels

    @cached_property
    def away(self) -> Tensor:
        """``(B, G)`` distances from the clean queries to the others."""
        return self.to_others(self.clean)

    def to_others(self, embeddings: Tensor) -> Tensor:
        """``(B, G)`` distances; the own item is infinitely far."""
        return _distances(embeddings, self.gallery).scatter(1, self.own.unsqueeze(1), torch.inf)

    def rivals(self, target: Tensor) -> Tensor:
        """``(B, G)`` bool, the items X that the target is compared with."""
        everyone = torch.ones_like(self.same)
        if not self.corrected:
            return everyone
        return everyone.scatter(1, self.own.unsqueeze(1), False).scatter(1, target.unsqueeze(1), False)

    def recalled(self, embeddings: Tensor) -> Tensor:
        """``(B,)`` bool, whether the nearest item, itself left out, is right."""
        away = self.to_others(embeddings)
        if not self.corrected:
            return self.same.gather(1, away.argmin(1, keepdim=True)).squeeze(1)
        return away.masked_fill(~self.same, torch.inf).amin(1) < away.masked_fill(self.same, torch.inf).amin(1)


Gaps = Callable[[_QueryBatch, Tensor], Loss]
"""What is moved, as ``(B, G)``: by how much item x of a list is nearer to its query than the one that is watched."""


def _of_candidate(batch: _QueryBatch, target: Tensor) -> Loss:
    """d(Q, c') - d(x, Q): the query is fixed, and the perturbed item is watched."""
    query = batch.gallery[target]
    away = _distances(query, batch.gallery)
    return lambda moved: _pairs(moved, query).unsqueeze(1) - away


def _of_query(batch: _QueryBatch, target: Tensor) -> Loss:
    """d(q', C) - d(x, q'): the query is perturbed, and a fixed item is watched."""

    def gaps(moved: Tensor) -> Tensor:
        away = _distances(moved, batch.gallery)
        return away.gather(1, target.unsqueeze(1)) - away

    return gaps


@dataclass(frozen=True)
class _Placing:
    """An item is to rise in a list (sign 1) or to sink (-1)."""

    gaps: Gaps
    sign: int

    def loss(self, batch: _QueryBatch, target: Tensor) -> Loss:
        gaps, rivals = self.gaps(batch, target), batch.rivals(target)
        return lambda moved: (self.sign * gaps(moved)).clamp(min=0).mul(rivals).sum(1) / rivals.sum(1)

    def ahead(self, batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
        """``(B, G)`` bool, items that stand before the watched one."""
        gaps = self.gaps(batch, target)(moved)
        if batch.corrected:
            return batch.rivals(target) & (gaps >= 0 if self.sign < 0 else gaps > 0)
        earlier = torch.arange(len(batch.gallery), device=target.device) < target.unsqueeze(1)
        return (gaps > 0) | ((gaps == 0) & earlier if self.gaps is _of_query else torch.zeros_like(earlier))

    def percentile(self, batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
        return 100 * self.ahead(batch, target, moved).sum(1).to(moved.dtype) / batch.rivals(target).sum(1)

    def retained(self, batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
        return self.ahead(batch, target, moved).scatter(1, batch.own.unsqueeze(1), False).sum(1) < 4


def _mismatch(batch: _QueryBatch, target: Tensor) -> Loss:
    aimed = batch.gallery[target]
    return lambda moved: 1 - (moved * aimed).sum(1)


def _stay(batch: _QueryBatch, target: Tensor) -> Loss:
    return lambda moved: -pairwise_distance(moved, batch.clean)  # adds 1e-6, so that it has a gradient at 0


def _misrank(batch: _QueryBatch, target: Tensor) -> Loss:
    right = batch.same.scatter(1, batch.own.unsqueeze(1), False) if batch.corrected else batch.same

    def loss(moved: Tensor) -> Tensor:
        away = _distances(moved, batch.gallery)
        nearest_right = away.masked_fill(~right, torch.inf).amin(1)
        if batch.corrected:
            wrong = away.masked_fill(batch.same, torch.inf).amin(1)
        else:
            wrong = away.masked_fill(batch.same, -torch.inf).amax(1)
        return (wrong - nearest_right).clamp(min=0)

    return loss


def _approach(batch: _QueryBatch, target: Tensor) -> Loss:
    aimed = batch.gallery[target]
    return lambda moved: _pairs(moved, aimed)


def _cosine(batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
    return (moved * batch.gallery[target]).sum(1).clamp(-1, 1)


def _shift(batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
    shift = _pairs(moved, batch.clean)
    if not batch.corrected:
        return shift
    spread = batch.away.scatter(1, batch.own.unsqueeze(1), 0).sum(1) / (len(batch.gallery) - 1)
    return (math.sqrt(2) * shift / spread).nan_to_num(nan=2).clamp(max=2)


def _recalled(batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
    return batch.recalled(moved)


def _itself(batch: _QueryBatch, lots: Tensor) -> Tensor:
    return batch.own


def _anyone(batch: _QueryBatch, lots: Tensor) -> Tensor:
    drawn = (lots * (len(batch.gallery) - batch.corrected)).long().to(batch.own.device)
    return drawn + (drawn >= batch.own).long() if batch.corrected else drawn


def _nearby(batch: _QueryBatch, lots: Tensor) -> Tensor:
    count = max(1, int(0.01 * len(batch.gallery)))
    near = batch.away.topk(count, dim=1, largest=False).indices
    return near.gather(1, (lots * count).long().to(near.device).unsqueeze(1)).squeeze(1)


def _nearest(batch: _QueryBatch, lots: Tensor) -> Tensor:
    return batch.away.argmin(1)


def _unmatching(batch: _QueryBatch, lots: Tensor) -> Tensor:
    if batch.corrected:
        return batch.away.masked_fill(batch.same, torch.inf).argmin(1)
    unmatching = batch.labels != batch.labels[batch.away.argmin(1)].unsqueeze(1)
    nearest = batch.away.masked_fill(~unmatching, torch.inf).argmin(1, keepdim=True)
    return unmatching.long().cumsum(1).gather(1, nearest).squeeze(1) - 1


class _Attack(NamedTuple):
    """One run of an attack.

    Attributes:
        aim: the queries, and one number in [0, 1) for each ``(B,)`` -> the item ``(B,)`` that its attack is about.
        loss: what is lowered.
        measures: the scores that are read off the perturbed queries.
    """

    aim: Callable[[_QueryBatch, Tensor], Tensor]
    loss: Callable[[_QueryBatch, Tensor], Loss]
    measures: Mapping[str, Callable[[_QueryBatch, Tensor, Tensor], Tensor]]


def _placed(name: str, aim: Callable[[_QueryBatch, Tensor], Tensor], placing: _Placing) -> _Attack:
    return _Attack(aim, placing.loss, {name: placing.percentile})


_ATTACKS = (
    _placed("CA+", _anyone, _Placing(_of_candidate, 1)),
    _placed("CA-", _nearby, _Placing(_of_candidate, -1)),
    _placed("QA+", _anyone, _Placing(_of_query, 1)),
    _placed("QA-", _nearby, _Placing(_of_query, -1)),
    _Attack(_anyone, _mismatch, {"TMA": _cosine}),
    _Attack(_itself, _stay, {"ES:D": _shift, "ES:R": _recalled}),
    _Attack(_itself, _misrank, {"LTM": _recalled}),
    _Attack(_unmatching, _approach, {"GTM": _recalled}),
    _Attack(_nearest, _Placing(_of_query, -1).loss, {"GTT": _Placing(_of_query, -1).retained}),
)


def _unit(embeddings: Tensor) -> Tensor:
    return normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """``(B, G)``, by differences, which are exact also where embeddings are close; under 1e-5 they count as equal.

    Closer ones may differ by rounding alone, whose direction means nothing: their distance is 0 and has no gradient.
    """
    distances = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
    return distances * (distances > 1e-5)


def _pairs(one: Tensor, other: Tensor) -> Tensor:
    """``(B,)`` distances row by row, the same numbers as in `_distances`."""
    return _distances(one.unsqueeze(1), other.unsqueeze(1)).flatten()


def _mean(values: Tensor) -> float:
    return values.cpu().double().mean().item()


def _settings(settings: Settings | str) -> Settings:
    if isinstance(settings, str) and settings in PRESETS:
        return PRESETS[settings]
    if not isinstance(settings, Settings):
        raise InputError(f"settings={settings!r}; expected Settings(eps=...) or one of {', '.join(PRESETS)}.")
    return settings


def _labels(labels: Tensor, pixels: Tensor) -> Tensor:
    if labels.shape != (len(pixels),):
        raise InputError(f"labels have shape {tuple(labels.shape)}; expected ({len(pixels)},), one per image.")
    if len(labels.unique()) < 2:
        raise InputError(f"labels hold the classes {labels.unique().tolist()}; expected two or more.")
    return labels.to(pixels.device)


def _checked(embeddings: Tensor, count: int) -> Tensor:
    if embeddings.ndim != 2 or len(embeddings) != count:
        raise InputError(f"Embeddings have shape {tuple(embeddings.shape)} for {count} images; expected ({count}, D).")
    if not embeddings.isfinite().all():
        raise InputError("Embeddings of clean images hold NaN or infinite values; expected finite ones.")
    return _unit(embeddings)


def _queries(wanted: int | Sequence[int] | Tensor | None, labels: Tensor) -> tuple[Tensor, int]:
    """Indices of the queries, and how many were left out for want of a right item."""
    total = len(labels)
    if isinstance(wanted, int):
        if not 0 < wanted <= total:
            raise InputError(f"queries={wanted}; expected 1 to {total}, the number of images.")
        rows = torch.randperm(total)[:wanted]
    else:
        try:
            rows = torch.arange(total) if wanted is None else torch.as_tensor(wanted, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            rows = torch.empty(0)
    if rows.ndim != 1 or rows.dtype != torch.long or not ((rows >= 0) & (rows < total)).all():
        raise InputError(f"queries={wanted!r}; expected how many, or indices from 0 to {total - 1}.")
    _, column, sizes = labels.unique(return_inverse=True, return_counts=True)
    rows = rows.to(labels.device)
    kept = rows[sizes[column[rows]] > 1]
    if not len(kept):
        raise InputError(f"None of the {len(rows)} queries has another image of its class; expected at least one.")
    return kept, len(rows) - len(kept)
