"""Which attacks an embedding meets: on the query or on the gallery, with gradients or without, and in which suite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchattacks
from torch import Tensor

from ..attacks.objective import Score
from ..attacks.pgd import MomentumPGD
from .attacks import AnyAttack, GalleryAttack, QueryAttack, QueryBatch
from .classifier import apart
from .gallery import Targets, unit

# What is raised, by query.


def toward_nearest_wrong(batch: QueryBatch, restart: int) -> Score:
    """Toward the nearest wrong item and away from the nearest right one, both chosen anew in every step."""
    return lambda queries: batch.gallery.margin(queries, batch.targets)


def toward_wrong_class(batch: QueryBatch, restart: int) -> Score:
    """Toward one wrong class and away from the nearest right item: the most similar class, in the next run the second.

    The items are chosen anew in every step, the class stays. What stands in the way of one class need not do so of
    another, so this finds breaks that restarts toward the nearest wrong item do not.
    """
    gallery, own = batch.gallery, batch.targets.own
    target = Targets(batch.classifier().wrong_classes(restart), own)

    def score(queries: Tensor) -> Tensor:
        wrong, right = (gallery.hardest(queries, targets)[1] for targets in (target, batch.targets))
        return (unit(queries) * (gallery.embeddings[wrong] - gallery.embeddings[right])).sum(1)

    return score


def embedding_shift(batch: QueryBatch, restart: int) -> Score:
    """Away from the query's own clean embedding, whatever the gallery holds."""
    origin = unit(batch.clean)
    return lambda queries: (unit(queries) - origin).square().sum(1)


def raising(score: Callable[[QueryBatch, int], Score], steps: int) -> Callable[[QueryBatch, float, int], Tensor]:
    """`MomentumPGD` of a score of the queries' embeddings, which may differ from run to run."""

    def find(batch: QueryBatch, eps: float, restart: int) -> Tensor:
        objective = batch.objective(score(batch, restart))
        return MomentumPGD(objective, eps, steps, batch.norm)(batch.images, objective.labels)

    return find


# Attacks of torchattacks on the embedding seen as a classifier.


def classified(make: Callable[..., Any], targets: int | None = None) -> Callable[[QueryBatch, float, int], Tensor]:
    """A torchattacks class, unmodified, on `RetrievalClassifier`.

    Args:
        make: called with the classifier and ``eps``, ``norm``, ``seed``.
        targets: how many of the most similar wrong classes it leads to, if it takes ``n_classes``.
    """

    def find(batch: QueryBatch, eps: float, restart: int) -> Tensor:
        found = batch.images.clone()
        for rows in apart(batch.images, batch.targets, eps, batch.norm):
            part = batch[rows]
            model = part.classifier()
            options: dict[str, Any] = {"eps": eps, "norm": batch.norm, "seed": int(torch.randint(2**31, ()))}
            if targets is not None:
                options["n_classes"] = min(model.num_classes, targets + 1)
            found[rows] = make(model, **options)(part.images.float().clone(), model.labels).to(found)
        return found

    return find


# Attacks on the gallery.


def nearest_wrong(batch: QueryBatch, restart: int) -> Tensor:
    """Of each query, the nearest wrong item, in the next run the second nearest, and so on."""
    return batch.gallery.hardest(batch.clean, batch.targets, restart)[0]


def nearest_right(batch: QueryBatch, restart: int) -> Tensor:
    """Of each query, the nearest right item, in the next run the second nearest, and so on."""
    return batch.gallery.hardest(batch.clean, batch.targets, restart)[1]


def promotion(batch: QueryBatch) -> Score:
    """The item comes nearer to the query."""
    query = unit(batch.clean)
    return lambda items: (unit(items) * query).sum(1)


def demotion(batch: QueryBatch) -> Score:
    """The item moves off the query."""
    query = unit(batch.clean)
    return lambda items: -(unit(items) * query).sum(1)


def standard(steps: int = 50, restarts: int = 3, queries: int = 500, targets: int = 5) -> tuple[AnyAttack, ...]:
    """The attacks of "standard-v1" at its defaults: the strongest that we know, at a bounded cost per query.

    Args:
        steps: gradient steps of a run.
        restarts: runs of the margin attack from different random starts.
        queries: forward passes of the black-box attack.
        targets: wrong classes to which targeted attacks lead, one after the other, the most similar first.
    """
    apgd = partial(torchattacks.APGD, steps=steps)
    apgd_t = partial(torchattacks.APGDT, steps=steps // 2)
    fab_t = partial(torchattacks.FAB, multi_targeted=True, steps=10)
    square = partial(torchattacks.Square, n_queries=queries)
    return (
        QueryAttack("margin", raising(toward_nearest_wrong, steps), restarts),
        QueryAttack("targeted", raising(toward_wrong_class, steps), targets, only_standing=True),
        QueryAttack("shift", raising(embedding_shift, steps)),
        QueryAttack("apgd-ce", classified(apgd), only_standing=True),
        QueryAttack("apgd-t", classified(apgd_t, targets), only_standing=True, num_classes=4),
        QueryAttack("fab-t", classified(fab_t, targets), only_standing=True),
        QueryAttack("square", classified(square), black_box=True, only_standing=True),
        GalleryAttack("promote", nearest_wrong, promotion, steps),
        GalleryAttack("demote", nearest_right, demotion, steps),
    )


def quick(steps: int = 40, restarts: int = 3) -> tuple[AnyAttack, ...]:
    """The attacks of "quick-v1" at its defaults: two on the query, for comparisons while one works."""
    return (
        QueryAttack("margin", raising(toward_nearest_wrong, steps), restarts),
        QueryAttack("shift", raising(embedding_shift, steps), restarts),
    )


SUITES: dict[str, tuple[str, Callable[[], tuple[AnyAttack, ...]]]] = {
    "standard": ("standard-v1", standard),
    "quick": ("quick-v1", quick),
}
"""What ``attacks="..."`` names -> the suite's name in reports, fixed for what it holds, and its attacks."""


def by_name() -> dict[str, AnyAttack]:
    """All attacks of the suites; those of "standard", where another suite has one of the same name."""
    return {attack.name: attack for _, make in reversed(SUITES.values()) for attack in make()}
