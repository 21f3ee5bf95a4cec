"""What a query finds: the nearest right and wrong items of a gallery, the query itself left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor
from torch.nn.functional import normalize

Embed = Callable[[Tensor], Tensor]


class Gallery:
    """Clean items to be searched, by cosine similarity.

    Args:
        embeddings: ``(G, D)``.
        labels: ``(G,)``.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor) -> None:
        self.embeddings = normalize(embeddings.detach())
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def similarities(self, queries: Tensor, own: Tensor) -> Tensor:
        """``(Q, G)`` cosine similarities; a query's own item, at ``own`` ``(Q,)``, has -inf and is never found."""
        similarities = normalize(queries) @ self.embeddings.T
        return similarities.scatter(1, own.unsqueeze(1), -torch.inf)

    def margin(self, queries: Tensor, own: Tensor) -> Tensor:
        """How much nearer the nearest wrong item is than the nearest right one, ``(Q,)``; above 0, R@1 fails.

        A tie counts as a failure. A query without a right item has no margin and gets inf.
        """
        similarities = self.similarities(queries, own)
        right = self.labels[own].unsqueeze(1) == self.labels
        nearest_wrong = similarities.masked_fill(right, -torch.inf).amax(1)
        nearest_right = similarities.masked_fill(~right, -torch.inf).amax(1)
        return nearest_wrong - nearest_right

    def nearest(self, queries: Tensor, own: Tensor, count: int) -> Tensor:
        """``(Q, count)`` indices of the nearest items, nearest first."""
        return self.similarities(queries, own).topk(count, dim=1).indices

    def accuracy(self) -> dict[str, float]:
        """R@1 and mAP@R of the clean gallery searched with its own items (leave one out), in [0, 1]."""
        calculator = AccuracyCalculator(
            include=("precision_at_1", "mean_average_precision_at_r"),
            knn_func=CustomKNN(CosineSimilarity()),
            device=self.embeddings.device,
        )
        found = calculator.get_accuracy(self.embeddings, self.labels)
        return {"recall_at_1": found["precision_at_1"], "map_at_r": found["mean_average_precision_at_r"]}


def embed_all(embed: Embed, images: Tensor, chunk: int) -> Tensor:
    """Embeddings of all images, without gradient, ``chunk`` at a time."""
    with torch.no_grad():
        return torch.cat([embed(images[rows]) for rows in chunks(len(images), chunk)])


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices that cover ``range(total)``, each of at most ``size``."""
    return (slice(start, start + size) for start in range(0, total, size))
