"""Measures of retrieval for each query, and signs that an embedding has collapsed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...errors import InputError
from .embedder import batches
from .gallery import Gallery, Ranking

_LARGEST_GRAM = 4096  # rows of a Gram matrix whose eigenvalues are computed: half a minute on one core

PerQuery = dict[str, Tensor]
"""Name of a measure -> ``(Q,)`` in [0, 1]."""


def per_query(ranking: Ranking, recall_at: Iterable[int]) -> PerQuery:
    """Measures of each query's ranking. A wrong item that is as near as a right one is ranked before it.

    Args:
        ranking: at least as deep as the largest class, and as the largest of ``recall_at``.
        recall_at: the k of R@k, which is 1 if a right item is among the first k.

    Returns:
        ``recall_at_k`` for each k; ``map_at_r`` and ``r_precision`` as in Musgrave et al., "A Metric Learning Reality
        Check", arXiv 2003.08505, with R the number of right items.
    """
    depth = ranking.right.shape[1]
    order = torch.arange(1, depth + 1, device=ranking.right.device).expand_as(ranking.right)
    before = torch.searchsorted(-ranking.wrong, ranking.tie - ranking.right, right=True)
    place = order + before  # of the j-th right item in the whole list
    total = ranking.num_right.unsqueeze(1)
    found = (place <= total) & (order <= total)
    precision = torch.where(found, order / place, 0.0)
    measures = {f"recall_at_{k}": ((place[:, 0] <= k) & (ranking.num_right > 0)).float() for k in recall_at}
    divisor = ranking.num_right.clamp(min=1)
    measures["map_at_r"] = precision.sum(1) / divisor
    measures["r_precision"] = found.sum(1) / divisor
    return measures


def mean_per_query(rankings: Iterable[Ranking], recall_at: Iterable[int]) -> PerQuery:
    """Means of `per_query` over rankings of the same queries, such as those of a model that answers at random."""
    recall_at, count, sums = tuple(recall_at), 0, dict[str, Tensor]()
    for ranking in rankings:
        count += 1
        found = per_query(ranking, recall_at)
        sums = {name: values + sums[name] if sums else values for name, values in found.items()}
    return {name: values / count for name, values in sums.items()}


def collapse(gallery: Gallery) -> dict[str, float]:
    """Signs that all embeddings are close to one point, or lie in few directions.

    Returns:
        ``mean_similarity``, the mean cosine of different items, and of those of the same and of other classes
        (``mean_similarity_same``, ``mean_similarity_other``). If lengths count in the search, the root of the mean
        squared Euclidean distance stands in place of each: ``rms_distance``, ``rms_distance_same``,
        ``rms_distance_other``. And ``effective_rank``, the exponential of the entropy of the singular values (Roy,
        Vetterli, "The effective rank", EUSIPCO 2007), between 1 and the dimension.
    """
    sums = gallery.embeddings.new_zeros(len(gallery.classes), gallery.embeddings.shape[1], dtype=torch.double)
    squares = sums.new_zeros(len(gallery.classes))
    for rows in batches(len(gallery), gallery.block):
        embeddings = gallery.embeddings[rows].double()
        sums.index_add_(0, gallery.columns[rows], embeddings)
        squares.index_add_(0, gallery.columns[rows], embeddings.square().sum(1))
    sizes = gallery.class_sizes.double()
    pairs, same_pairs = len(gallery) * (len(gallery) - 1), (sizes * (sizes - 1)).sum().item()
    all_, same = sums.sum(0).square().sum() - squares.sum(), sums.square().sum() - squares.sum()
    if not gallery.distance.has_unit_length:  # squared distances: |x - y|^2 = |x|^2 + |y|^2 - 2 xy, of different items
        all_ = 2 * (len(gallery) - 1) * squares.sum() - 2 * all_
        same = (2 * (sizes - 1) * squares).sum() - 2 * same
    means = [all_ / max(pairs, 1), same / max(same_pairs, 1), (all_ - same) / max(pairs - same_pairs, 1)]
    name = "mean_similarity" if gallery.distance.has_unit_length else "rms_distance"
    if name == "rms_distance":
        means = [mean.clamp(min=0).sqrt() for mean in means]
    found = {name + part: mean.item() for part, mean in zip(("", "_same", "_other"), means, strict=True)}
    return {**found, "effective_rank": effective_rank(gallery.embeddings)}


def effective_rank(embeddings: Tensor) -> float:
    """The exponential of the entropy of the singular values of embeddings ``(N, D)``, see `collapse`.

    The singular values are those of the smaller one of the two Gram matrices. If both are large, an even sample of the
    embeddings is taken.
    """
    count, dimension = embeddings.shape
    if min(count, dimension) > _LARGEST_GRAM:
        embeddings = embeddings[torch.linspace(0, count - 1, _LARGEST_GRAM, dtype=torch.float64).long()]
    if len(embeddings) < dimension:
        wide = embeddings.double()
        products = wide @ wide.T
    else:
        products = embeddings.new_zeros(dimension, dimension, dtype=torch.double)
        for rows in batches(len(embeddings), _LARGEST_GRAM):
            wide = embeddings[rows].double()
            products += wide.T @ wide
    strength = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    share = strength / strength.sum().clamp(min=torch.finfo(strength.dtype).tiny)
    return torch.special.entr(share).sum().exp().item()


def nmi(embeddings: Tensor, labels: Tensor) -> float:
    """Normalised mutual information of k-means clusters and classes, as PML computes it (with faiss).

    Raises:
        InputError: faiss is not installed.
    """
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator  # brings scikit-learn

    try:
        import faiss  # noqa: F401
    except ImportError as error:
        raise InputError("nmi=True needs faiss for k-means; install it with `pip install faiss-cpu`.") from error
    calculator = AccuracyCalculator(include=("NMI",), device=embeddings.device)
    return float(calculator.get_accuracy(embeddings, labels)["NMI"])
