"""Measures of retrieval for each query, and signs that an embedding has collapsed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import InputError
from .embedder import batches
from .gallery import Gallery, Ranking

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


def collapse(gallery: Gallery) -> dict[str, float]:
    """Signs that all embeddings are close to one point, or lie in few directions.

    Returns:
        ``mean_similarity`` of different items, and of those of the same and of other classes
        (``mean_similarity_same``, ``mean_similarity_other``); ``effective_rank``, the exponential of the entropy of the
        singular values (Roy, Vetterli, "The effective rank", EUSIPCO 2007), between 1 and the dimension.
    """
    dimension = gallery.embeddings.shape[1]
    sums = gallery.embeddings.new_zeros(len(gallery.classes), dimension, dtype=torch.double)
    products = sums.new_zeros(dimension, dimension)
    for rows in batches(len(gallery), gallery.block):
        embeddings = gallery.embeddings[rows].double()
        sums.index_add_(0, gallery.columns[rows], embeddings)
        products += embeddings.T @ embeddings
    lengths = products.trace().item()
    sizes = gallery.class_sizes.double()
    total = sums.sum(0).square().sum().item() - lengths
    same = sums.square().sum().item() - lengths
    pairs, same_pairs = len(gallery) * (len(gallery) - 1), (sizes * (sizes - 1)).sum().item()
    strength = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    share = strength / strength.sum().clamp(min=torch.finfo(strength.dtype).tiny)
    return {
        "mean_similarity": total / max(pairs, 1),
        "mean_similarity_same": same / max(same_pairs, 1),
        "mean_similarity_other": (total - same) / max(pairs - same_pairs, 1),
        "effective_rank": torch.special.entr(share).sum().exp().item(),
    }


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
