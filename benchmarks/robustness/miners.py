"""One triplet per pair of images of a class, as RobRank's code draws them (arXiv 2106.03614, 2203.01439).

Images of a class stand side by side in a batch: the first is an anchor, the second its positive, the third an anchor,
and so on. With two images per class that is one triplet per class. They draw from torch's global generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pml_adversarial.defenses.triplets import draw_columns, draw_negatives, draw_positives, unit_distances

Triplets = tuple[Tensor, Tensor, Tensor]


def random_negatives(embeddings: Tensor, labels: Tensor) -> Triplets:
    """Any image of another class is the negative."""
    anchors, positives = _neighbours(labels)
    return anchors, positives, draw_columns(labels[anchors, None] != labels)


def soft_hard(embeddings: Tensor, labels: Tensor, itself: bool = False) -> Triplets:
    """A negative nearer than the furthest positive, a positive further than the nearest negative; else any.

    Args:
        embeddings: ``(N, D)``.
        labels: ``(N,)``.
        itself: whether, where no positive is hard, the anchor may be its own positive.
    """
    anchors, _ = _neighbours(labels)
    embeddings = embeddings.detach()
    same = labels[anchors, None] == labels
    positive = same.scatter(1, anchors[:, None], False)
    candidates = positive, ~same, unit_distances(embeddings[anchors], embeddings)
    positives = draw_positives("softhard", *candidates, otherwise=same if itself else positive)
    return anchors, positives, draw_negatives("softhard", *candidates, positives)


def soft_hard_as_coded(embeddings: Tensor, labels: Tensor) -> Triplets:
    """As RobRank's code draws them: where no positive is hard, the anchor may be its own."""
    return soft_hard(embeddings, labels, itself=True)


def _neighbours(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors and positives: neighbours in the batch of one class, no image twice."""
    row = torch.arange(len(labels), device=labels.device)
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[1:] = labels[1:] != labels[:-1]
    place = row - torch.where(starts, row, 0).cummax(0).values  # within its class
    anchors = row[:-1][(place[:-1] % 2 == 0) & ~starts[1:]]
    return anchors, anchors + 1
