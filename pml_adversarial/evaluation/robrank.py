"""RobRank's ten attacks, which other papers report, and ERS, the mean of their scores.

In the table, d is the Euclidean distance between embeddings of length 1, X the clean gallery, q a query, q' a perturbed
query, c' a perturbed gallery item (each query serves as one), and [z]+ = max(z, 0):

=====  ==============================  ===========================  ======================================
score  chosen before the attack        minimised                    raw value
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

Percentiles, recalls and GTT are in percent, as the papers print them; the percentile of the first item is 0. Each
attack takes sign steps from the clean image, and its last iterate is scored. The papers use 32 steps of 3/255, with eps
77/255 for images of 28x28 pixels and 8/255 for images of 224x224. Sources: Zhou et al., "Adversarial Attack and Defense
in Deep Ranking", arXiv 2106.03614; Zhou and Patel, "Enhancing Adversarial Robustness for Deep Metric Learning", arXiv
2203.01439; and their public code. Where papers and code differ, the version "published" follows the code.

The version "corrected" takes the same steps, with these differences:

- GTM leads to the nearest item of another class than the query's. The published u is another item: it is the nearest
  item of another class than *the nearest item's*, and the code takes its index among the items of other classes for an
  index into the whole gallery.
- LTM leaves the query itself out of the right items, since it stays the nearest right item for long. LTM leads to the
  nearest wrong item, not to the furthest.
- The query itself is left out of X in all attacks, and is never the chosen item. A percentile is the share of the other
  items that are ahead.
- ES:D is measured in units of the query's mean distance d_q to the other items: min(2, sqrt(2) d(q', q) / d_q). It does
  not change where items are orthogonal, and is 2 if all items coincide. So contracting an embedding does not raise the
  score.
- Ties count against the model. In the version "published", equally near items are ranked in the order of the gallery
  (in CA, behind the chosen item).

Both versions make one run without random start or restarts, so the recalls are upper bounds. Two details of the
published code are in neither version: it measures ES:D one step before the last, and it fails on galleries of fewer
than 100 items, because their nearest 1 % is empty (here, it is at least one item).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pairwise_distance

from ..attacks import PGD, Objective
from ..attacks.checks import check_choice, check_number, check_whole
from ..errors import InputError
from ..training.isolation import random_stream
from ..training.numeric import unit_length
from ..training.pixels import Bounds, Normalization
from .retrieval.distance import check_unit_length
from .retrieval.embedder import Embed, Embedder, batches, check_finite, embed_all, plain_surroundings
from .retrieval.forms import Images
from .retrieval.images import ImageSet
from .retrieval.options import to_rows, to_seed
from .runs.progress import progress_bar

Version = Literal["published", "corrected"]
Loss = Callable[[Tensor], Tensor]
"""Embeddings ``(B, D)`` of the perturbed images, of length 1 -> one number per row ``(B,)`` that is minimised."""


_RAISED = 0, 100, lambda percentile: 2 * percentile
_SUNK = 0, 100, lambda percentile: 100 - percentile
_RECALL = 0, 100, lambda recall: recall
_SCALES: dict[str, tuple[float, float, Callable[[float], float]]] = {  # lowest and highest raw value, normalisation
    "CA+": _RAISED,
    "CA-": _SUNK,
    "QA+": _RAISED,
    "QA-": _SUNK,
    "TMA": (-1, 1, lambda cosine: 100 * (1 - cosine)),
    "ES:D": (0, 2, lambda distance: 50 * (2 - distance)),
    "ES:R": _RECALL,
    "LTM": _RECALL,
    "GTM": _RECALL,
    "GTT": _RECALL,
}
SCORES = tuple(_SCALES)  #: Names of the ten scores.
SHARES = tuple(name for name, scale in _SCALES.items() if scale is _RECALL)  #: Those that are a share of queries.


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """The ten raw scores on the scale on which ERS averages them. Larger is more robust; most are between 0 and 100.

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
    return {name: normalise(scores[name]) for name, (_, _, normalise) in _SCALES.items()}


def ers(scores: Mapping[str, float]) -> float:
    """RobRank's empirical robustness score, the mean of the ten normalised scores; larger is more robust.

    ``(2 CA+ + (100 - CA-) + 2 QA+ + (100 - QA-) + 100 (1 - TMA) + 50 (2 - ES:D) + ES:R + LTM + GTM + GTT) / 10``

    Args:
        scores: see `normalised`, also for errors.

    Example:
        >>> plain = {"CA+": 0.0, "CA-": 100.0, "QA+": 0.0, "QA-": 99.9, "TMA": 0.883, "ES:D": 1.762, "ES:R": 0.0}
        >>> round(ers({**plain, "LTM": 0.0, "GTM": 14.1, "GTT": 0.0}), 1)  # arXiv 2203.01439, CUB, no defence
        3.8
    """
    return sum(normalised(scores).values()) / len(SCORES)


@dataclass(frozen=True, eq=False)
class RobRankScores:
    """RobRank's scores of one model, with the settings of `robrank_scores`.

    Attributes:
        scores: raw values by name, as the papers print them: TMA is a cosine, ES:D a distance, all others are percent.
        queries: ``(Q,)`` indices of the images that were perturbed.
        left_out: how many queries were left out because no other image has their class.
        clean_flags: ``(Q,)`` bool, whether the nearest item is right without attack.
        robust_flags: for ES:R, LTM, GTM and GTT, ``(Q,)`` bool: whether the nearest item is right under attack; for
            GTT, whether the item that was nearest is among the nearest 4.
    """

    scores: Mapping[str, float]
    version: Version
    eps: float
    alpha: float
    steps: int
    queries: Tensor
    left_out: int
    clean_flags: Tensor
    robust_flags: Mapping[str, Tensor]
    seed: int

    @property
    def ers(self) -> float:
        """See `ers`."""
        return ers(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, in types that JSON knows, with ``num_queries``, and ``recall_at_1`` in percent."""
        tensors = ("queries", "clean_flags", "robust_flags")
        return {
            **{key: value for key, value in vars(self).items() if key not in tensors},
            "num_queries": len(self.queries),
            "recall_at_1": 100 * _mean(self.clean_flags),
            "scores": dict(self.scores),
            "normalised": normalised(self.scores),
            "ers": self.ers,
        }


def robrank_scores(
    model: Any,
    images: Images,
    *,
    eps: float,
    alpha: float = 3 / 255,
    steps: int = 32,
    version: Version = "published",
    distance: Any = "cosine",
    subset: int | Sequence[int] | Tensor | None = None,
    normalization: Normalization | None = None,
    bounds: Bounds | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> RobRankScores:
    """Perturbs queries by each of RobRank's attacks. Each query searches all other images, which stay clean.

    Args:
        model: as in `evaluate_robustness`.
        images: labelled images, see `forms.Images`; pixels in [0, 1].
        eps: l-inf radius, in pixels of [0, 1]; in the papers 77/255 for 28x28 pixels, 8/255 for 224x224.
        alpha: length of one sign step, in pixels of [0, 1].
        steps: sign steps of each attack.
        version: "published" or "corrected", see the module.
        distance: "cosine" or "normalized_euclidean", which rank alike: the scores are defined for no other.
        subset: indices of the queries, or how many are drawn; None: all images are queries.
        normalization: as in `evaluate_robustness`.
        bounds: as in `evaluate_robustness`.
        seed: of the choice of queries and of the items that attacks are about.
        batch_size: queries that are attacked together; memory grows with it times the size of the gallery.
        progress: whether to show a progress bar (needs tqdm).

    Raises:
        InputError: images, labels, queries or settings cannot be used, embeddings are not finite, or they have no
            gradient.
    """
    check_number("eps", eps, 0, 1, hint=", in pixels of [0, 1], such as 8/255")
    check_number("alpha", alpha, 0, 1, above=True, hint=", in pixels of [0, 1], such as 3/255")
    check_whole("steps", steps)
    batch_size, seed = check_whole("batch_size", batch_size), to_seed(seed)
    check_choice("version", version, ("published", "corrected"))
    check_unit_length(distance, "RobRank's scores are defined")
    embed = Embedder(model, normalization, bounds)
    with plain_surroundings(), random_stream(seed, -2):
        gallery = ImageSet(images, embed.device, "images", embed.pixel_dtype)
        gallery.check(embed.space)
        embed.probe(gallery[:1], gallery.given_dtype)
        embed.check_gradient(gallery[:1])
    if len(gallery.labels.unique()) < 2:
        raise InputError(f"labels hold the classes {gallery.labels.unique().tolist()}; expected two or more.")
    with embed.isolated(), random_stream(seed, -1):
        embeddings = unit_length(check_finite(embed_all(embed, gallery, batch_size)))
        queries, left_out = _queries(subset, gallery.labels)
        draws = torch.rand(len(queries), len(_ATTACKS), dtype=torch.float64)
        measured = []
        with progress_bar(progress, len(queries) * len(_ATTACKS), "RobRank") as bar:
            for rows in batches(len(queries), batch_size):
                batch = _QueryBatch(embeddings, gallery.labels, queries[rows], version == "corrected")
                found, pixels = {"clean": _nearest_is_right(batch, batch.own, batch.clean)}, gallery[batch.own]
                for attack, draw in zip(_ATTACKS, draws[rows].unbind(1), strict=True):
                    target = attack.choose(batch, draw)
                    perturbed = _lower(embed, pixels, batch.clean, attack.loss(batch, target), eps, alpha, steps)
                    with torch.no_grad():
                        moved = unit_length(embed(perturbed))
                    found |= {name: measure(batch, target, moved) for name, measure in attack.measures.items()}
                    bar.update(len(batch.own))
                measured.append(found)
    values = {name: torch.cat([found[name] for found in measured]) for name in ("clean", *SCORES)}
    scores = {name: _mean(values[name]) * (100 if name in SHARES else 1) for name in SCORES}
    flags = {name: values[name] for name in SHARES}
    return RobRankScores(scores, version, eps, alpha, steps, queries, left_out, values["clean"], flags, seed)


def _lower(embed: Embed, images: Tensor, clean: Tensor, loss: Loss, eps: float, alpha: float, steps: int) -> Tensor:
    """Images whose loss was lowered by sign steps from the clean ones, within the ball and [0, 1]."""
    if not eps:
        return images
    objective = Objective(embed, lambda embeddings: -loss(unit_length(embeddings)), clean)
    return PGD(objective, eps, alpha, steps, random_start=False)(images)


@dataclass(frozen=True, eq=False)
class _QueryBatch:
    """A clean gallery ``(G, D)`` of length 1, its labels, and indices ``(B,)`` of the items that are the queries."""

    gallery: Tensor
    labels: Tensor
    own: Tensor
    corrected: bool

    @cached_property
    def clean(self) -> Tensor:
        return self.gallery[self.own]

    @cached_property
    def same(self) -> Tensor:
        """``(B, G)`` bool, items of the query's class, itself included."""
        return self.labels[self.own].unsqueeze(1) == self.labels

    @cached_property
    def clean_distances(self) -> Tensor:
        """``(B, G)`` distances from the clean queries to the other items."""
        return self.to_others(self.clean)

    def to_others(self, embeddings: Tensor) -> Tensor:
        """``(B, G)`` distances; that to the query itself is infinite."""
        return _distances(embeddings, self.gallery).scatter(1, self.own.unsqueeze(1), torch.inf)

    def compared(self, target: Tensor) -> Tensor:
        """``(B, G)`` bool, the items X with which the target is compared."""
        left_out = torch.stack([self.own, target], 1)
        return torch.ones_like(self.same).scatter(1, left_out, not self.corrected)


def _candidate_gaps(batch: _QueryBatch, target: Tensor) -> Loss:
    """d(Q, c') - d(x, Q): the query Q stays, and the item c' is perturbed."""
    query = batch.gallery[target]
    away = _distances(query, batch.gallery)
    return lambda moved: _pairs(moved, query).unsqueeze(1) - away


def _query_gaps(batch: _QueryBatch, target: Tensor) -> Loss:
    """d(q', C) - d(x, q'): the query q' is perturbed, and the item C stays."""

    def gaps(moved: Tensor) -> Tensor:
        away = _distances(moved, batch.gallery)
        return away.gather(1, target.unsqueeze(1)) - away

    return gaps


@dataclass(frozen=True)
class _RankAttack:
    """Moves an item up in a list (sign 1) or down (sign -1).

    ``gaps`` gives, for queries and an item for each, ``(B, G)`` how much nearer each item x is than the item for it.
    """

    gaps: Callable[[_QueryBatch, Tensor], Loss]
    sign: int

    def loss(self, batch: _QueryBatch, target: Tensor) -> Loss:
        gaps, compared = self.gaps(batch, target), batch.compared(target)
        return lambda moved: (self.sign * gaps(moved)).clamp(min=0).mul(compared).sum(1) / compared.sum(1)

    def ahead(self, batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
        """``(B, G)`` bool, the items that are ranked before the target."""
        gaps = self.gaps(batch, target)(moved)
        if batch.corrected:
            return batch.compared(target) & (gaps >= 0 if self.sign < 0 else gaps > 0)
        earlier = torch.arange(len(batch.gallery), device=target.device) < target.unsqueeze(1)
        return (gaps > 0) | ((gaps == 0) & earlier if self.gaps is _query_gaps else torch.zeros_like(earlier))

    def percentile(self, batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
        return 100 * self.ahead(batch, target, moved).sum(1).to(moved.dtype) / batch.compared(target).sum(1)

    def in_top_4(self, batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
        return self.ahead(batch, target, moved).scatter(1, batch.own.unsqueeze(1), False).sum(1) < 4


def _dissimilarity(batch: _QueryBatch, target: Tensor) -> Loss:
    aimed = batch.gallery[target]
    return lambda moved: 1 - (moved * aimed).sum(1)


def _closeness(batch: _QueryBatch, target: Tensor) -> Loss:
    return lambda moved: -pairwise_distance(moved, batch.clean)  # adds 1e-6, so that it has a gradient at 0


def _ranking_margin(batch: _QueryBatch, target: Tensor) -> Loss:
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


def _distance_to_target(batch: _QueryBatch, target: Tensor) -> Loss:
    aimed = batch.gallery[target]
    return lambda moved: _pairs(moved, aimed)


def _cosine(batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
    return (moved * batch.gallery[target]).sum(1).clamp(-1, 1)


def _shift(batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
    shift = _pairs(moved, batch.clean)
    if not batch.corrected:
        return shift
    spread = batch.clean_distances.scatter(1, batch.own.unsqueeze(1), 0).sum(1) / (len(batch.gallery) - 1)
    return (math.sqrt(2) * shift / spread).nan_to_num(nan=2).clamp(max=2)


def _nearest_is_right(batch: _QueryBatch, target: Tensor, moved: Tensor) -> Tensor:
    away = batch.to_others(moved)
    if not batch.corrected:
        return batch.same.gather(1, away.argmin(1, keepdim=True)).squeeze(1)
    return away.masked_fill(~batch.same, torch.inf).amin(1) < away.masked_fill(batch.same, torch.inf).amin(1)


def _query_itself(batch: _QueryBatch, draws: Tensor) -> Tensor:
    return batch.own


def _random_item(batch: _QueryBatch, draws: Tensor) -> Tensor:
    drawn = (draws * (len(batch.gallery) - batch.corrected)).long().to(batch.own.device)
    return drawn + (drawn >= batch.own).long() if batch.corrected else drawn


def _random_near_item(batch: _QueryBatch, draws: Tensor) -> Tensor:
    count = max(1, int(0.01 * len(batch.gallery)))
    near = batch.clean_distances.topk(count, dim=1, largest=False).indices
    return near.gather(1, (draws * count).long().to(near.device).unsqueeze(1)).squeeze(1)


def _nearest_item(batch: _QueryBatch, draws: Tensor) -> Tensor:
    return batch.clean_distances.argmin(1)


def _nearest_unmatching(batch: _QueryBatch, draws: Tensor) -> Tensor:
    if batch.corrected:
        return batch.clean_distances.masked_fill(batch.same, torch.inf).argmin(1)
    unmatching = batch.labels != batch.labels[batch.clean_distances.argmin(1)].unsqueeze(1)
    nearest = batch.clean_distances.masked_fill(~unmatching, torch.inf).argmin(1, keepdim=True)
    return unmatching.long().cumsum(1).gather(1, nearest).squeeze(1) - 1


class _Attack(NamedTuple):
    choose: Callable[[_QueryBatch, Tensor], Tensor]
    """Queries, and one random number in [0, 1) for each -> an item ``(B,)`` for each, the target."""
    loss: Callable[[_QueryBatch, Tensor], Loss]
    """Queries and targets -> what is minimised."""
    measures: Mapping[str, Callable[[_QueryBatch, Tensor, Tensor], Tensor]]
    """Name of a score -> its value for each query, given queries, targets and perturbed embeddings."""


_RAISE_ITEM, _SINK_ITEM = _RankAttack(_candidate_gaps, 1), _RankAttack(_candidate_gaps, -1)
_RAISE_IN_LIST, _SINK_IN_LIST = _RankAttack(_query_gaps, 1), _RankAttack(_query_gaps, -1)
_ATTACKS = (
    _Attack(_random_item, _RAISE_ITEM.loss, {"CA+": _RAISE_ITEM.percentile}),
    _Attack(_random_near_item, _SINK_ITEM.loss, {"CA-": _SINK_ITEM.percentile}),
    _Attack(_random_item, _RAISE_IN_LIST.loss, {"QA+": _RAISE_IN_LIST.percentile}),
    _Attack(_random_near_item, _SINK_IN_LIST.loss, {"QA-": _SINK_IN_LIST.percentile}),
    _Attack(_random_item, _dissimilarity, {"TMA": _cosine}),
    _Attack(_query_itself, _closeness, {"ES:D": _shift, "ES:R": _nearest_is_right}),
    _Attack(_query_itself, _ranking_margin, {"LTM": _nearest_is_right}),
    _Attack(_nearest_unmatching, _distance_to_target, {"GTM": _nearest_is_right}),
    _Attack(_nearest_item, _SINK_IN_LIST.loss, {"GTT": _SINK_IN_LIST.in_top_4}),
)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """``(B, G)`` Euclidean distances, exact also where embeddings are close."""
    distances = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
    return distances * (distances > 1e-5)  # those below may be rounding errors, whose gradient means nothing


def _pairs(one: Tensor, other: Tensor) -> Tensor:
    """``(B,)`` distances row by row, the same numbers as in `_distances`."""
    return _distances(one.unsqueeze(1), other.unsqueeze(1)).flatten()


def _mean(values: Tensor) -> float:
    return values.cpu().double().mean().item()


def _queries(subset: int | Sequence[int] | Tensor | None, labels: Tensor) -> tuple[Tensor, int]:
    """Indices of the queries, and how many were left out because no other image has their class."""
    if isinstance(subset, int):
        if not 0 < subset <= len(labels):
            raise InputError(f"subset={subset}; expected 1 to {len(labels)}, the number of images.")
        rows = torch.randperm(len(labels))[:subset]
    else:
        rows = to_rows(subset, len(labels))
    rows = rows.to(labels.device)
    _, columns, sizes = labels.unique(return_inverse=True, return_counts=True)
    kept = rows[sizes[columns[rows]] > 1]
    if not len(kept):
        raise InputError(f"None of the {len(rows)} queries has another image of its class; expected at least one.")
    return kept, len(rows) - len(kept)
