"""Lower bounds of R@1 that no l2 perturbation of a query can break, by randomised smoothing.

The smoothed model embeds a query ``x`` as ``g(x) = E f(x + z)``, with ``f`` the normalised embedding and ``z``
Gaussian noise of standard deviation ``sigma`` in every pixel (Cohen et al., arXiv 1902.02918; for embeddings: Pautov
et al., arXiv 2202.01186; for R@1: RetrievalGuard, arXiv 2206.11225). It searches a gallery of fixed unit vectors
``e``.

The nearest item is right at ``x + d`` if for every wrong item ``n`` there is a right item ``p(n)`` with
``g(x + d) . (e_p - e_n) > 0``, because then the nearest right item is nearer than every wrong one. So each pair has a
radius of its own, and the query's radius is the smallest of them. Let ``h = f . (e_p - e_n) / |e_p - e_n|``, which
lies in [-1, 1]. There are two bounds of ``E h`` at ``x + d``:

- From its mean (Salman et al., arXiv 1906.04584, lemma 2): ``Phi^-1((1 + E h) / 2)`` changes by at most ``|d| /
  sigma``. With ``E h >= m`` at ``x``, ``E h > 0`` within ``sigma Phi^-1((1 + m) / 2)``. ``m`` is an empirical
  Bernstein bound (Maurer, Pontil, arXiv 0907.3740, theorem 4).
- From its distribution (Kumar et al., arXiv 2009.08061): for all thresholds ``-1 = t_0 <= t_1 <= ... <= t_k``,
  ``h >= -1 + sum_i (t_i - t_{i-1}) [h >= t_i]``. A set that noise around ``x`` hits with probability ``q`` or more is
  hit around ``x + d`` with probability ``Phi(Phi^-1(q) - |d| / sigma)`` or more (Neyman-Pearson). So ``E h > 0`` as
  long as ``sum_i (t_i - t_{i-1}) Phi(Phi^-1(q_i) - |d| / sigma) > 1``. Each ``q_i`` is a Clopper-Pearson bound. Where
  ``h`` varies little, which is the usual case, this radius is several times the first.

The larger of the two radii is taken. RetrievalGuard uses the Lipschitz constant ``sqrt(2 / (pi sigma^2))`` of ``g``,
which gives ``sigma sqrt(pi / 2) m`` from the same ``m``. That is never more than the first radius, since ``Phi^-1`` is
convex above 1/2 and has this slope there. ``p(n)`` and the thresholds are chosen on separate samples, so they are fixed
when the bounds are taken. Each of the ``N`` wrong items gets ``alpha / N`` of the failure probability: half of it for
the mean, half for the shares, in equal parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from ..attacks.checks import check_number, check_whole
from ..errors import InputError
from ..training.isolation import random_stream
from ..training.numeric import unit_length
from ..training.pixels import Bounds, Normalization
from .reports import binomial
from .retrieval.distance import check_unit_length
from .retrieval.embedder import Embed, Embedder, batches, embed_all, plain_surroundings
from .retrieval.forms import Images
from .retrieval.images import ImageSet
from .retrieval.options import check_probability, to_radii, to_seed
from .retrieval.task import JUNK, Mask, RetrievalTask, Search
from .runs.progress import progress_bar

_QUANTILES = ndtr(torch.linspace(-3, 2.5, 15, dtype=torch.float64)).tolist()  # denser at both ends
_THRESHOLDS = 1 + len(_QUANTILES)
_CANDIDATES = 32  # right items, of those nearest to the query, among which p(n) is chosen
_ROUNDING = 1e-9  # more than the rounding error of a dot product in double precision
_BISECTIONS = 50


@dataclass(frozen=True, eq=False)
class Certificate:
    """Lower bounds of the smoothed model's R@1 under l2 perturbations of the query.

    For each single query, with a probability of at least ``1 - alpha`` over the noise: under every perturbation of its
    pixels whose l2 norm is below the query's ``radius``, the item nearest to the smoothed embedding is right.

    The settings are those of `certify`.

    Attributes:
        radius: ``(Q,)`` certified radius, in l2 of pixels in [0, 1]; 0: nothing is certified. Infinite where the query
            finds no wrong item.
        radius_lipschitz: ``(Q,)`` radius from the Lipschitz constant of the embedding alone, for comparison.
        right: ``(Q,)`` bool, whether the smoothed model seems right without perturbation. This is an estimate.
        has_right_item: ``(Q,)`` bool, whether the gallery holds a right item. Queries without one count in no share.
        items: ``(G, D)`` unit vectors of the gallery, for which the certificate holds.
        queries: ``(Q,)`` indices of the queries.
        notes: what else a reader has to know, such as queries that find their own image.
    """

    radius: Tensor
    radius_lipschitz: Tensor
    right: Tensor
    has_right_item: Tensor
    items: Tensor
    sigma: float
    radii: tuple[float, ...]
    samples: int
    selection_samples: int
    gallery_samples: int
    alpha: float
    seed: int
    queries: Tensor
    notes: tuple[str, ...] = ()

    def recall_at_1(self, radius: float = 0.0) -> float:
        """Share of queries that are certified beyond ``radius``, the number that papers report.

        Each query is certified with probability ``1 - alpha``, so on average up to ``alpha`` of all queries are counted
        wrongly.
        """
        return self._share(self.radius > radius)

    def recall_at_1_lower_bound(self, radius: float = 0.0, beta: float = 0.001) -> float:
        """A lower bound of the smoothed model's R@1 under perturbations whose l2 norm is at most ``radius``.

        It holds at all radii at once, with probability ``1 - beta`` over the noise of all queries. Their noise is
        independent, so the number of radii that are too large is at most binomial. Its upper ``beta`` quantile is
        subtracted.

        Raises:
            InputError: beta is not between 0 and 1.
        """
        check_probability("beta", beta)
        queries = int(self.has_right_item.sum())
        return max(0.0, self.recall_at_1(radius) - binomial.upper_quantile(queries, self.alpha, beta) / queries)

    @property
    def smoothed_recall_at_1(self) -> float:
        """R@1 of the smoothed model without perturbation. This is an estimate, not a bound."""
        return self._share(self.right)

    @property
    def abstained(self) -> float:
        """Share of queries that seem right but are not certified at any radius; more samples may certify some."""
        return self._share(self.right & (self.radius == 0))

    def to_dict(self) -> dict[str, Any]:
        """Everything but ``items`` and ``queries``, in types that JSON knows, and the shares at all ``radii``."""
        kept = {key: value for key, value in vars(self).items() if key not in ("items", "radii", "queries", "notes")}
        return {
            "norm": "L2",
            **{key: value.tolist() if isinstance(value, Tensor) else value for key, value in kept.items()},
            "num_queries": int(self.has_right_item.sum()),
            "left_out": int((~self.has_right_item).sum()),
            "smoothed_recall_at_1": self.smoothed_recall_at_1,
            "abstained": self.abstained,
            "certified": self._certified(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        num_queries, left_out = int(self.has_right_item.sum()), int((~self.has_right_item).sum())
        row = "\n{radius:>8g}{recall_at_1:>8.3f}{recall_at_1_lower_bound:>13.3f}{recall_at_1_lipschitz:>11.3f}"
        header = (
            f"Certified R@1, l2, noise of {self.sigma:g}: {num_queries} queries "
            f"({left_out} left out), {self.samples} samples each, alpha {self.alpha:g}\n"
            f"smoothed R@1 {self.smoothed_recall_at_1:.3f}, of which {self.abstained:.3f} not certified at any radius\n"
            f"{'radius':>8}{'R@1':>8}{'lower bound':>13}{'Lipschitz':>11}"
        )
        notes = [f"\nnote: {note}" for note in self.notes]
        return "".join([header, *(row.format(**shares) for shares in self._certified()), *notes])

    def _certified(self) -> list[dict[str, float]]:
        """The shares at all ``radii``."""
        return [
            {
                "radius": radius,
                "recall_at_1": self.recall_at_1(radius),
                "recall_at_1_lower_bound": self.recall_at_1_lower_bound(radius),
                "recall_at_1_lipschitz": self._share(self.radius_lipschitz > radius),
            }
            for radius in self.radii
        ]

    def _share(self, queries: Tensor) -> float:
        return int((queries & self.has_right_item).sum()) / int(self.has_right_item.sum())


def certify(
    model: Any,
    queries: Images,
    gallery: Images | None = None,
    *,
    sigma: float,
    radii: float | Iterable[float],
    distance: Any = "cosine",
    normalization: Normalization | None = None,
    bounds: Bounds | None = None,
    subset: Sequence[int] | Tensor | None = None,
    own: Sequence[int] | Tensor | str | None = None,
    ignore: Mask = None,
    relevant: Mask = None,
    junk_label: int | None = JUNK,
    gallery_embeddings: Tensor | None = None,
    samples: int = 10_000,
    selection_samples: int = 1_000,
    gallery_samples: int = 100,
    alpha: float = 0.001,
    seed: int = 0,
    batch_size: int = 1024,
    block: int = 256,
    progress: bool = False,
) -> Certificate:
    """Certifies R@1 of the smoothed model against every l2 perturbation of a query. The module has the proof.

    The certificate is about the smoothed model, not about the model itself. Train the model with noise of about
    ``sigma``, else its smoothed version is poor. The noise is added after the perturbation and is not clamped, so the
    model sees values outside [0, 1]. The adversary knows everything but the noise, and may leave [0, 1] too. The
    gallery is not attacked.

    Args:
        model: as in `evaluate_robustness`.
        queries: labelled images, see `forms.Images`; pixels in [0, 1].
        gallery: what is searched, in the same form. None: the queries; then no query finds itself (leave-one-out).
        sigma: standard deviation of the noise, in pixels of [0, 1].
        radii: one or more radii, in l2 of pixels in [0, 1], that tables show. The bounds hold at all other radii too.
        distance: "cosine" or "normalized_euclidean", which rank alike: the proof needs embeddings of length 1.
        normalization: as in `evaluate_robustness`.
        bounds: as in `evaluate_robustness`.
        subset: as in `evaluate_robustness`.
        own: as in `evaluate_robustness`.
        ignore: as in `evaluate_robustness`.
        relevant: as in `evaluate_robustness`.
        junk_label: as in `evaluate_robustness`.
        gallery_embeddings: ``(G, D)`` vectors that are searched as they are, in place of smoothed ones.
        samples: noisy copies per query. No radius is above 3 to 4 ``sigma``, however many there are.
        selection_samples: further noisy copies per query, on which right items and thresholds are chosen.
        gallery_samples: noisy copies per gallery item, whose normalised mean is searched; 0: its clean embedding.
        alpha: probability that the radius of a single query is too large.
        seed: of the noise. The same seed and batch size give the same result.
        batch_size: noisy copies that are embedded together.
        block: wrong items that are compared together; ``samples * block`` numbers are in memory at once.
        progress: whether to show a progress bar (needs tqdm).

    Raises:
        InputError: a setting is out of range, there are too few samples to certify anything at ``alpha``, the images
            cannot be evaluated, no query has a right item, or embeddings are not finite.
    """
    check_number("sigma", sigma, above=True, hint=", in pixels of [0, 1], such as 0.25")
    check_probability("alpha", alpha)
    check_whole("samples", samples, 2)
    check_whole("selection_samples", selection_samples, 2)
    check_whole("gallery_samples", gallery_samples, 0)
    batch_size, seed = check_whole("batch_size", batch_size), to_seed(seed)
    check_whole("block", block)
    check_unit_length(distance, "the certificate holds")
    radii = to_radii(radii, "L2", zero=True, name="radii")
    embed = Embedder(model, normalization, bounds)
    with plain_surroundings(), random_stream(seed, -2):
        search = Search(distance, own, ignore, relevant, junk_label)
        task = RetrievalTask(embed, queries, gallery, "L2", search)
    with embed.isolated(), torch.no_grad():
        rows = task.rows(subset)
        radius, lipschitz = torch.zeros(2, len(rows), dtype=torch.float64, device=embed.device)
        right = torch.zeros(len(rows), dtype=torch.bool, device=embed.device)
        with random_stream(seed, len(task.queries)):
            items = _items(task, rows, gallery_embeddings, sigma, gallery_samples, batch_size)
        has_right_item = _has_right_item(task, rows, samples, alpha)
        with progress_bar(progress, int(has_right_item.sum()), "certify") as bar:
            for place in has_right_item.nonzero().flatten().tolist():
                query = int(rows[place])
                is_right, is_wrong = _right_and_wrong(task, rows[[place]])
                if not is_wrong.any():
                    right[place], radius[place], lipschitz[place] = True, torch.inf, torch.inf
                    bar.update()
                    continue
                with random_stream(seed, query):
                    image = task.queries[[query]]
                    chosen_on = _embed_noisy(embed, image, sigma, selection_samples, batch_size)
                    sample = _embed_noisy(embed, image, sigma, samples, batch_size)
                mean = sample.mean(0)
                right[place] = (items[is_right] @ mean).amax() > (items[is_wrong] @ mean).amax() + _ROUNDING
                smallest = _smallest_radii(chosen_on, sample, items[is_right], items[is_wrong], alpha, block)
                radius[place], lipschitz[place] = sigma * smallest
                bar.update()
    settings = sigma, radii, samples, selection_samples, gallery_samples, alpha, seed
    return Certificate(radius, lipschitz, right, has_right_item, items, *settings, rows, tuple(task.notes))


def _items(
    task: RetrievalTask, rows: Tensor, known: Tensor | None, sigma: float, gallery_samples: int, batch_size: int
) -> Tensor:
    """``(G, D)`` unit vectors of the gallery in double precision, which the task then searches."""
    if task.own_by_image and not task.items.has_images:
        raise InputError("own='same' compares images, and gallery has labels only; expected own as indices.")
    task.embed_and_set(rows, batch_size, known)  # without noise, as this finds copies of queries in the gallery
    if known is None:
        items = smoothed_embeddings(task.embed, task.items, sigma, gallery_samples, batch_size)
    else:
        items = _unit(task.check_embeddings(known))
    task.set_gallery(items)
    return items


def _right_and_wrong(task: RetrievalTask, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(G,)`` bool each: items that are right for a query, and items that are wrong for it."""
    targets, everything = task.targets(rows), slice(0, len(task.gallery))
    found, right = ~targets.is_left_out(everything)[0], targets.is_right(task.gallery.labels)[0]
    return found & right, found & ~right


def smoothed_embeddings(
    embed: Embed, images: Tensor | ImageSet, sigma: float, samples: int, batch_size: int = 1024
) -> Tensor:
    """``(N, D)`` unit vectors in double precision: normalised means of the normalised embeddings of noisy copies.

    The global generator draws the noise. With 0 ``samples`` per image, clean embeddings are taken.
    """
    if not samples:
        return embed_all(lambda pixels: _unit(embed(pixels)), images, batch_size)
    means = [
        _embed_noisy(embed, images[rows], sigma, samples, batch_size).unflatten(0, (-1, samples)).mean(1)
        for rows in batches(len(images), max(1, batch_size // samples))
    ]
    return unit_length(torch.cat(means))


def _smallest_radii(
    chosen_on: Tensor, sample: Tensor, right: Tensor, wrong: Tensor, alpha: float, block: int
) -> Tensor:
    """``(2,)`` the query's smallest radius over all wrong items, and that by the Lipschitz constant, in sigmas."""
    mean, covariance = chosen_on.mean(0), torch.cov(chosen_on.T).reshape(2 * chosen_on.shape[1:])
    right = right[(right @ mean).topk(min(_CANDIDATES, len(right))).indices]
    risk = alpha / (2 * len(wrong))

    def variance(items: Tensor) -> Tensor:
        return (items @ covariance * items).sum(1)

    def smallest(wrong: Tensor) -> Tensor:
        # p(n) is the right item whose lead over the wrong one has the largest mean, in units of its standard deviation
        lead = (right @ mean).unsqueeze(1) - wrong @ mean
        spread = variance(right).unsqueeze(1) + variance(wrong) - 2 * right @ covariance @ wrong.T
        best = (lead / spread.clamp(min=_ROUNDING**2).sqrt()).argmax(0)
        normals = unit_length(right[best] - wrong)
        values, thresholds = sample @ normals.T, choose_thresholds(chosen_on @ normals.T)
        hits = torch.stack([(values >= threshold).sum(0) for threshold in thresholds])
        shares = binomial.rate_lower_bounds(hits, len(values), risk / _THRESHOLDS)
        bound = mean_bound(values, risk)
        radius = torch.maximum(radius_of_mean(bound), radius_of_shares(thresholds, shares))
        return torch.stack([radius.amin(), radius_lipschitz(bound).amin()])

    return torch.stack([smallest(part) for part in wrong.split(block)]).amin(0)


def mean_bound(values: Tensor, risk: float) -> Tensor:
    """Lower bounds ``(N,)`` of means, from values ``(S, N)`` in [-1, 1].

    These are empirical Bernstein bounds; each is above the true mean with probability ``risk`` at most.
    """
    count, log = len(values), math.log(2 / risk)
    slack = (2 * values.var(0) * log / count).sqrt() + 2 * 7 * log / (3 * (count - 1))
    return (values.mean(0) - slack).clamp(min=-1)


def choose_thresholds(values: Tensor) -> Tensor:
    """Ascending thresholds ``(k, N)`` in [-1, 1]: quantiles of values ``(S, N)``, and one far below them."""
    ordered = values.sort(0).values
    quantiles = ordered[[int(q * len(values)) for q in _QUANTILES]]
    below = 2 * ordered[0] - ordered[len(values) // 20]
    return (torch.cat([below.unsqueeze(0), quantiles]) - _ROUNDING).clamp(min=-1)


def radius_of_mean(mean: Tensor) -> Tensor:
    """Radius, in units of sigma, within which a mean of at least ``mean`` stays above 0."""
    return ndtri((1 + mean) / 2).clamp(min=0)


def radius_lipschitz(mean: Tensor) -> Tensor:
    """The same radius, from the Lipschitz constant of the embedding."""
    return math.sqrt(math.pi / 2) * mean.clamp(min=0)


def radius_of_shares(thresholds: Tensor, shares: Tensor) -> Tensor:
    """Radii ``(N,)``, in units of sigma, within which the mean of values in [-1, 1] stays above 0.

    ``shares`` ``(k, N)`` are lower bounds of the probability that a value reaches its threshold, one of ``thresholds``
    ``(k, N)``, which ascend in [-1, 1].
    """
    steps = thresholds.diff(dim=0, prepend=torch.full_like(thresholds[:1], -1))
    scores = ndtri(shares)
    high = scores.amax(0).clamp(min=0)  # beyond it, each probability is below 1/2 and the sum below 1
    low = torch.zeros_like(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        holds = (steps * ndtr(scores - middle)).sum(0) > 1
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low


def _embed_noisy(embed: Embed, images: Tensor, sigma: float, samples: int, batch_size: int) -> Tensor:
    """``(N * samples, D)`` embeddings of noisy copies; the copies of one image are next to one another."""
    total = len(images) * samples
    sources = torch.arange(total, device=images.device) // samples
    copies = (images[sources[rows]] for rows in batches(total, batch_size))
    return torch.cat([_unit(embed(batch + sigma * torch.randn_like(batch))) for batch in copies])


def _unit(embeddings: Tensor) -> Tensor:
    bad = int((~embeddings.isfinite()).any(1).sum())
    if bad:
        raise InputError(
            f"The model returned NaN or infinite embeddings for {bad} of {len(embeddings)} noisy images; expected "
            "finite ones. The noise leaves [0, 1]; a model that cannot take this may clamp its inputs."
        )
    if embeddings.shape[1] == 1:
        raise InputError("The embeddings have one dimension: of length 1 they are 1 or -1. Expected more dimensions.")
    return unit_length(embeddings.double())


def _has_right_item(task: RetrievalTask, rows: Tensor, samples: int, alpha: float) -> Tensor:
    """``(Q,)`` bool: whether the gallery holds a right item; also checks whether anything can be certified."""
    parts = [task.targets(rows[part]) for part in batches(len(rows), 1024)]
    right = torch.cat([task.gallery.num_right(part) for part in parts])
    searched = torch.cat([task.gallery.num_searched(part) for part in parts])
    if not right.any():
        raise InputError(
            "No query has a right item in the gallery, other than itself; expected images of the same classes in both."
        )
    wrong = int((searched - right).max())
    needed = (
        math.floor(math.log2(2 * _THRESHOLDS * max(wrong, 1) / alpha)) + 1
    )  # if all are hits, the bound is above 1/2
    if samples < needed:
        raise InputError(
            f"samples={samples} certify nothing at alpha={alpha:g} against {wrong} wrong items, whatever the model "
            f"does; at least {needed} are needed, and 10000 are usual."
        )
    return right > 0
