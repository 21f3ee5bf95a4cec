"""What no attack can break: lower bounds of R@1 under l2 perturbations of the query, by randomised smoothing.

The smoothed model embeds a query ``x`` as ``g(x) = E f(x + z)``, with ``f`` the normalised embedding and ``z``
Gaussian noise of standard deviation ``sigma`` in every pixel (Cohen et al., arXiv 1902.02918; for embeddings: Pautov
et al., arXiv 2202.01186; for R@1: RetrievalGuard, arXiv 2206.11225). It is searched in a gallery of fixed unit
vectors ``e``.

R@1 holds at ``x + d`` if for every wrong item ``n`` there is a right item ``p(n)`` with ``g(x + d) . (e_p - e_n) >
0``: the nearest right item is then nearer than every wrong one. So each pair has a radius of its own, and the query's
is the least of the best. Let ``h = f . (e_p - e_n) / |e_p - e_n|``, which lies in [-1, 1]. Two bounds of ``E h`` at
``x + d``:

- From its mean (Salman et al., arXiv 1906.04584, lemma 2): ``Phi^-1((1 + E h) / 2)`` changes by at most ``|d| /
  sigma``. With ``E h >= m`` at ``x``, ``E h > 0`` within ``sigma Phi^-1((1 + m) / 2)``. ``m`` is an empirical
  Bernstein bound (Maurer, Pontil, arXiv 0907.3740, theorem 4).
- From its distribution (Kumar et al., arXiv 2009.08061): whatever the thresholds ``-1 = t_0 <= t_1 <= ... <= t_k``,
  ``h >= -1 + sum_i (t_i - t_{i-1}) [h >= t_i]``, and a set that noise around ``x`` hits with probability at least
  ``q`` is hit around ``x + d`` with at least ``Phi(Phi^-1(q) - |d| / sigma)`` (Neyman-Pearson). So ``E h > 0`` as
  long as ``sum_i (t_i - t_{i-1}) Phi(Phi^-1(q_i) - |d| / sigma) > 1``. Each ``q_i`` is a Chernoff bound of a binomial
  share. Where ``h`` varies little, which is the rule, this radius is several times the first.

The larger of the two counts. The Lipschitz constant ``sqrt(2 / (pi sigma^2))`` of ``g``, which RetrievalGuard uses,
gives ``sigma sqrt(pi / 2) m`` from the same ``m``; that is never more than the first, since ``Phi^-1`` is convex
above 1/2 and has this slope there. ``p(n)`` and the thresholds are chosen on samples of their own, so that they are
fixed when the bounds are taken. Each of the ``N`` wrong items gets ``alpha / N``, half for the mean, half for the
shares, an equal part each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.special import ndtr, ndtri

from ..errors import InputError
from ..training.isolation import isolated, random_stream
from ..training.pixels import PixelSpace
from .gallery import chunks

_QUANTILES = [0.5 * (1 + math.erf((-3 + 5.5 * i / 14) / math.sqrt(2))) for i in range(15)]  # denser at both ends
_THRESHOLDS = 1 + len(_QUANTILES)
_CANDIDATES = 32  # right items, of those nearest to the query, among which p(n) is chosen
_ROUNDING = 1e-9  # of a dot product in double precision, generously
_BISECTIONS = 50


@dataclass(frozen=True, eq=False)
class Certified:
    """Lower bounds of the smoothed model's R@1, for queries perturbed in l2 before the noise is added.

    With a probability of at least ``1 - alpha`` for each single query, over its noise: whatever is added to its pixels,
    as long as its l2 norm is below the query's ``radius``, the nearest of ``items`` to the smoothed embedding is right.

    Attributes:
        radius: ``(Q,)``, in the norm of pixels in [0, 1]; 0: nothing is certified.
        radius_lipschitz: ``(Q,)``, from the Lipschitz constant of the embedding alone, for comparison.
        right: ``(Q,)`` bool, queries that the smoothed model finds right unperturbed, as far as its samples tell.
        judged: ``(Q,)`` bool, queries with a right item in the gallery; the others are left out of every share.
        items: ``(G, D)`` unit vectors of the gallery, which the statements are about.
        sigma: standard deviation of the noise.
        radii: at which a table reports.
        samples: noisy copies of each query that the bounds are from.
        selection: noisy copies of each query on which right items and thresholds were chosen.
        gallery_samples: noisy copies that each of ``items`` is the mean of; 0: clean embeddings.
        alpha: probability with which a single query's radius may be too large.
        seed: of the noise.
    """

    radius: Tensor
    radius_lipschitz: Tensor
    right: Tensor
    judged: Tensor
    items: Tensor
    sigma: float
    radii: tuple[float, ...]
    samples: int
    selection: int
    gallery_samples: int
    alpha: float
    seed: int

    def recall_at_1(self, radius: float = 0.0) -> float:
        """Share of queries that are certified beyond ``radius``.

        Each of them with ``1 - alpha``: on average, a share of up to ``alpha`` of all queries is counted by mistake.
        """
        return self._share(self.radius > radius)

    def recall_at_1_surely(self, radius: float = 0.0, beta: float = 0.001) -> float:
        """A lower bound of the share that stands, at all radii at once, with a probability of ``1 - beta``.

        The noise of one query is independent of all others', so the number of radii that are too large is at most a
        binomial one; its upper ``beta`` quantile is taken off.

        Args:
            radius: of the perturbations, in l2.
            beta: probability with which the statement may be false, over the noise of all queries.

        Raises:
            InputError: beta is not between 0 and 1.
        """
        _check_share("beta", beta)
        queries = int(self.judged.sum())
        return max(0.0, self.recall_at_1(radius) - _binomial_quantile(queries, self.alpha, beta) / queries)

    @property
    def smoothed_recall_at_1(self) -> float:
        """R@1 of the smoothed model without perturbation, as far as the samples tell; no bound."""
        return self._share(self.right)

    @property
    def abstained(self) -> float:
        """Share of queries that look right but are not certified at any radius; more samples may settle some."""
        return self._share(self.right & (self.radius == 0))

    def to_dict(self) -> dict[str, object]:
        """Everything but ``items``, ready for JSON."""
        return {
            "norm": "L2",
            "sigma": self.sigma,
            "samples": self.samples,
            "selection": self.selection,
            "gallery_samples": self.gallery_samples,
            "alpha": self.alpha,
            "seed": self.seed,
            "queries": int(self.judged.sum()),
            "left_out": int((~self.judged).sum()),
            "smoothed_recall_at_1": self.smoothed_recall_at_1,
            "abstained": self.abstained,
            "certified": [
                {
                    "radius": radius,
                    "recall_at_1": self.recall_at_1(radius),
                    "recall_at_1_surely": self.recall_at_1_surely(radius),
                    "recall_at_1_lipschitz": self._share(self.radius_lipschitz > radius),
                }
                for radius in self.radii
            ],
            "radius": self.radius.tolist(),
            "radius_lipschitz": self.radius_lipschitz.tolist(),
            "right": self.right.tolist(),
            "judged": self.judged.tolist(),
        }

    def __str__(self) -> str:
        queries, left_out = int(self.judged.sum()), int((~self.judged).sum())
        lines = [
            f"Certified R@1, l2, noise of {self.sigma:g}: {queries} queries ({left_out} left out), {self.samples} "
            f"samples each, alpha {self.alpha:g}",
            f"smoothed R@1 {self.smoothed_recall_at_1:.3f}, of which {self.abstained:.3f} not certified at any radius",
            f"{'radius':>8}{'R@1':>8}{'surely':>8}{'Lipschitz':>11}",
        ]
        for radius in self.radii:
            shares = (
                self.recall_at_1(radius),
                self.recall_at_1_surely(radius),
                self._share(self.radius_lipschitz > radius),
            )
            lines.append("{:>8g}{:>8.3f}{:>8.3f}{:>11.3f}".format(radius, *shares))
        return "\n".join(lines)

    def _share(self, queries: Tensor) -> float:
        return int((queries & self.judged).sum()) / int(self.judged.sum())


def certify(
    model: nn.Module,
    queries: tuple[Tensor, Tensor],
    gallery: tuple[Tensor, Tensor] | None = None,
    *,
    sigma: float,
    radii: Iterable[float],
    samples: int = 10_000,
    selection: int = 1_000,
    gallery_samples: int = 100,
    alpha: float = 0.001,
    seed: int = 0,
    chunk: int = 1024,
    block: int = 256,
    progress: Callable[[], object] | None = None,
) -> Certified:
    """Certifies R@1 of the smoothed model against every l2 perturbation of a query, see the module for the proof.

    The statement is about the smoothed model, not about the one passed in. Train with noise of about ``sigma``, else
    its smoothed version finds little. Noisy copies are not clamped: noise comes last, after the adversary, and leaves
    [0, 1]. The adversary knows everything but the noise, and may leave [0, 1] as well; the gallery is not attacked.

    Args:
        model: pixels -> embeddings; in eval mode here, and it comes back as it was.
        queries: images ``(Q, C, H, W)`` in [0, 1] and labels ``(Q,)``.
        gallery: the same of the items that are searched; None: the queries, each without itself.
        sigma: standard deviation of the noise, in pixels of [0, 1].
        radii: at which the table reports R@1; the bounds hold at every other as well.
        samples: noisy copies per query. No radius is beyond about 3 to 4 ``sigma``, whatever the number.
        selection: further noisy copies per query, to choose what is bounded.
        gallery_samples: noisy copies per item, whose normalised mean embedding is searched; 0: its clean embedding.
        alpha: probability with which a single query's radius may be too large.
        seed: of the noise; the same seed and chunk give the same result.
        chunk: noisy copies that are embedded together.
        block: wrong items that are looked at together; ``samples * block`` numbers are held at once.
        progress: called after every query that has a right item in the gallery.

    Raises:
        InputError: a setting is out of range, there are fewer samples than a certificate at ``alpha`` takes, images
            are no pixels, labels do not fit them, there is one class only, no query has a right item, or the model
            returns no finite embeddings.
    """
    counts = {"samples": samples, "selection": selection, "chunk": chunk, "block": block}
    radii = _check_settings(sigma, radii, alpha, counts, gallery_samples)
    images, labels = _checked("queries", queries)
    item_images, item_labels = (images, labels) if gallery is None else _checked("gallery", gallery)
    judged = _judged(labels, item_labels, alone=gallery is None, samples=samples, alpha=alpha)
    radius, lipschitz = torch.zeros(2, len(images), dtype=torch.float64, device=images.device)
    right = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    with isolated(model), torch.no_grad():
        with random_stream(seed, len(images)):
            items = smoothed_embeddings(model, item_images, sigma, gallery_samples, chunk)
        for query in judged.nonzero().flatten().tolist():
            with random_stream(seed, query):
                chosen_on = _embed_noisy(model, images[query : query + 1], sigma, selection, chunk)
                sample = _embed_noisy(model, images[query : query + 1], sigma, samples, chunk)
            is_right = item_labels == labels[query]
            wrong_items = items[~is_right]
            if gallery is None:
                is_right[query] = False
            mean = sample.mean(0)
            right[query] = (items[is_right] @ mean).amax() > (wrong_items @ mean).amax() + _ROUNDING
            found = _Pairs(chosen_on, sample, items[is_right], len(wrong_items), alpha)
            least = torch.stack([found.radii(wrong_items[rows]) for rows in chunks(len(wrong_items), block)])
            radius[query], lipschitz[query] = sigma * least.amin(0)
            if progress is not None:
                progress()
    settings = sigma, radii, samples, selection, gallery_samples, alpha, seed
    return Certified(radius, lipschitz, right, judged, items, *settings)


def smoothed_embeddings(model: nn.Module, images: Tensor, sigma: float, samples: int, chunk: int = 1024) -> Tensor:
    """``(N, D)`` unit vectors: normalised means of the normalised embeddings of noisy copies, in double precision.

    Args:
        model: pixels -> embeddings, in the mode that it is in.
        images: ``(N, C, H, W)``.
        sigma: standard deviation of the noise, from the global generator.
        samples: noisy copies per image; 0: the clean embeddings.
        chunk: copies that are embedded together.
    """
    if not samples:
        return torch.cat([_embed(model, images[rows]) for rows in chunks(len(images), chunk)])
    means = [
        _embed_noisy(model, images[rows], sigma, samples, chunk).unflatten(0, (-1, samples)).mean(1)
        for rows in chunks(len(images), max(1, chunk // samples))
    ]
    return normalize(torch.cat(means))


class _Pairs:
    """Radii, in units of sigma, of one query against wrong items, each with the right item that holds best."""

    def __init__(self, chosen_on: Tensor, sample: Tensor, right: Tensor, num_wrong: int, alpha: float) -> None:
        self.chosen_on, self.sample = chosen_on, sample
        self.mean, self.covariance = chosen_on.mean(0), torch.cov(chosen_on.T).reshape(2 * chosen_on.shape[1:])
        self.right = right[(right @ self.mean).topk(min(_CANDIDATES, len(right))).indices]
        self.risk = alpha / (2 * num_wrong)

    def radii(self, wrong: Tensor) -> Tensor:
        """``(2,)``: the least radius over the wrong items ``(N, D)``, and the same by the Lipschitz constant."""
        normals = self.normals(wrong)
        values = self.sample @ normals.T
        mean = mean_bound(values, self.risk)
        thresholds = choose_thresholds(self.chosen_on @ normals.T)
        shares = share_bound(
            torch.stack([(values >= t).sum(0) for t in thresholds]), len(values), self.risk / _THRESHOLDS
        )
        radius = torch.maximum(radius_of_mean(mean), radius_of_shares(thresholds, shares))
        return torch.stack([radius.amin(), radius_lipschitz(mean).amin()])

    def normals(self, wrong: Tensor) -> Tensor:
        """``(N, D)`` of length 1, or 0 for a wrong item that coincides with the right one and is nowhere behind it.

        The right item is the one whose lead over the wrong one is largest, counted in its own standard deviations.
        """
        lead = (self.right @ self.mean).unsqueeze(1) - wrong @ self.mean
        spread = self._variance(self.right).unsqueeze(1) + self._variance(wrong)
        spread = spread - 2 * self.right @ self.covariance @ wrong.T
        best = (lead / spread.clamp(min=_ROUNDING**2).sqrt()).argmax(0)
        return normalize(self.right[best] - wrong)

    def _variance(self, items: Tensor) -> Tensor:
        return (items @ self.covariance * items).sum(1)


def mean_bound(values: Tensor, risk: float) -> Tensor:
    """Lower bounds ``(N,)`` of means, from values ``(S, N)`` in [-1, 1]: empirical Bernstein, false with ``risk``."""
    count, log = len(values), math.log(2 / risk)
    slack = (2 * values.var(0) * log / count).sqrt() + 2 * 7 * log / (3 * (count - 1))
    return (values.mean(0) - slack).clamp(min=-1)


def share_bound(hits: Tensor, count: int, risk: float) -> Tensor:
    """Lower bounds of probabilities from hits among ``count`` draws, any shape: Chernoff, false with ``risk`` each.

    The least ``q`` with ``KL(hits / count || q) <= log(1 / risk) / count``; with all draws hits, the exact bound.
    """
    share, limit = hits.double() / count, math.log(1 / risk) / count
    own = torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)
    low, high = torch.zeros_like(share), share
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        apart = own - torch.xlogy(share, middle) - torch.xlogy(1 - share, 1 - middle) > limit
        low, high = torch.where(apart, middle, low), torch.where(apart, high, middle)
    return low


def choose_thresholds(values: Tensor) -> Tensor:
    """Ascending thresholds ``(k, N)`` in [-1, 1]: quantiles of values ``(S, N)``, and one well below all of them."""
    ordered = values.sort(0).values
    quantiles = ordered[[int(q * len(values)) for q in _QUANTILES]]
    below = 2 * ordered[0] - ordered[len(values) // 20]
    return (torch.cat([below.unsqueeze(0), quantiles]) - _ROUNDING).clamp(min=-1)


def radius_of_mean(mean: Tensor) -> Tensor:
    """How far, in units of sigma, a mean of at least ``mean`` stays above 0."""
    return ndtri((1 + mean) / 2).clamp(min=0)


def radius_lipschitz(mean: Tensor) -> Tensor:
    """The same, from the Lipschitz constant of the embedding."""
    return math.sqrt(math.pi / 2) * mean.clamp(min=0)


def radius_of_shares(thresholds: Tensor, shares: Tensor) -> Tensor:
    """How far, in units of sigma, the mean of values in [-1, 1] stays above 0, ``(N,)``.

    Args:
        thresholds: ``(k, N)``, ascending, in [-1, 1].
        shares: ``(k, N)``, each the least probability of a value of at least its threshold.
    """
    steps = thresholds.diff(dim=0, prepend=torch.full_like(thresholds[:1], -1))
    scores = ndtri(shares)
    high = scores.amax(0).clamp(min=0)  # beyond it each probability is below 1/2, the sum below 1
    low = torch.zeros_like(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        holds = (steps * ndtr(scores - middle)).sum(0) > 1
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low


def _embed_noisy(model: nn.Module, images: Tensor, sigma: float, samples: int, chunk: int) -> Tensor:
    """``(N * samples, D)``, the copies of one image next to one another."""
    total = len(images) * samples
    sources = torch.arange(total, device=images.device) // samples
    batches = (images[sources[rows]] for rows in chunks(total, chunk))
    return torch.cat([_embed(model, batch + sigma * torch.randn_like(batch)) for batch in batches])


def _embed(model: nn.Module, images: Tensor) -> Tensor:
    embeddings = model(images)
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != len(images):
        found = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise InputError(f"The model returned {found} for {len(images)} images; expected one embedding each, (N, D).")
    if not embeddings.isfinite().all():
        raise InputError("The model returned NaN or infinite embeddings; nothing can be certified about them.")
    return normalize(embeddings.double())


def _binomial_quantile(draws: int, chance: float, beta: float) -> int:
    """The least count that a binomial variable exceeds with a probability of at most ``beta``."""
    left = 1.0
    for count in range(draws):
        ways = math.lgamma(draws + 1) - math.lgamma(count + 1) - math.lgamma(draws - count + 1)
        left -= math.exp(ways + count * math.log(chance) + (draws - count) * math.log1p(-chance))
        if left <= beta:
            return count
    return draws


def _judged(labels: Tensor, item_labels: Tensor, *, alone: bool, samples: int, alpha: float) -> Tensor:
    """``(Q,)`` bool: the queries with a right item; checks that there is something to certify, and a chance to."""
    held = Counter(item_labels.tolist())
    if len(held) < 2:
        raise InputError(f"The gallery holds the classes {list(held)}; expected two or more, else no item is wrong.")
    judged = [held[label] > alone for label in labels.tolist()]
    if not any(judged):
        raise InputError(
            "No query has a right item in the gallery, other than itself; expected images of the same classes in both."
        )
    wrong = max(len(item_labels) - held[label] for label in labels.tolist())
    needed = math.floor(math.log2(2 * _THRESHOLDS * wrong / alpha)) + 1  # all hits, and still the bound is at 1/2
    if samples < needed:
        raise InputError(
            f"samples={samples} certify nothing at alpha={alpha:g} against {wrong} wrong items, whatever the model "
            f"does; at least {needed} are needed, and 10000 are usual."
        )
    return torch.tensor(judged, device=labels.device)


def _checked(name: str, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(isinstance(part, Tensor) for part in given):
        raise InputError(f"{name} is {type(given).__name__}; expected a tuple of two tensors, images and labels.")
    images, labels = given
    if labels.ndim != 1 or images.ndim < 2 or len(images) != len(labels) or not len(labels):
        raise InputError(
            f"{name} has images {tuple(images.shape)} and labels {tuple(labels.shape)}; expected (N, C, H, W) and "
            "(N,), N above 0."
        )
    return PixelSpace().to_pixels(images.detach()), labels


def _check_settings(
    sigma: float, radii: Iterable[float], alpha: float, counts: dict[str, int], gallery_samples: int
) -> tuple[float, ...]:
    if not (0 < sigma < math.inf):
        raise InputError(f"sigma={sigma}; expected a finite number above 0, in pixels of [0, 1], such as 0.25.")
    radii = tuple(sorted(radii))
    if not radii or not all(0 <= radius < math.inf for radius in radii):
        raise InputError(f"radii={radii}; expected one or more finite numbers from 0 on, l2 norms in pixels of [0, 1].")
    _check_share("alpha", alpha)
    for name, count in counts.items():
        least = 1 if name in ("chunk", "block") else 2
        if not isinstance(count, int) or count < least:
            raise InputError(f"{name}={count!r}; expected a whole number from {least} on.")
    if not isinstance(gallery_samples, int) or gallery_samples < 0:
        raise InputError(f"gallery_samples={gallery_samples!r}; expected a whole number, or 0 for clean embeddings.")
    return radii


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name}={value}; expected a probability between 0 and 1, such as 0.001.")
