"""Attacks by gradients: what they raise, and attacks of torchattacks on the model as a classifier."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...attacks.objective import Score
from ...attacks.pgd import MomentumPGD
from ..retrieval.batch import QueryBatch
from ..retrieval.classifier import separable_groups
from .kinds import Perturb

# Scores of perturbed queries, by batch and number of the restart.


def margin_score(batch: QueryBatch, restart: int) -> Score:
    """How much nearer the nearest wrong item is than the nearest right item. Both are chosen anew in every step."""
    return lambda queries: batch.gallery.margin(queries, batch.targets)


def targeted_score(batch: QueryBatch, restart: int) -> Score:
    """How much nearer one wrong class is than the nearest right item.

    The class is the most similar one in the first run, the second most similar one in the second run, and so on. The
    nearest items of both classes are chosen anew in every step. What blocks the way to one class need not block the
    way to another, so this succeeds on some queries on which all restarts of `margin_score` fail.
    """
    gallery, wrong_class = batch.gallery, batch.targets.aimed_at(batch.classifier().wrong_classes(restart))

    def score(queries: Tensor) -> Tensor:
        wrong, right = (gallery.hardest(queries, targets)[1] for targets in (wrong_class, batch.targets))
        return gallery.lead(queries, wrong, right)

    return score


def shift_score(batch: QueryBatch, restart: int) -> Score:
    """How far the embedding is from that of the clean query, whatever the gallery holds."""
    return lambda queries: batch.gallery.shift_squared(queries, batch.clean)


def gradient_attack(score: Callable[[QueryBatch, int], Score], steps: int, samples: int | None = None) -> Perturb:
    """`MomentumPGD` that raises a score, as `QueryAttack` takes it.

    Args:
        score: what is raised.
        steps: gradient steps.
        samples: draws of the model over which each gradient is averaged (EOT, Athalye et al., arXiv 1707.07397); None:
            `batch.SAMPLES` if the model answers at random, else one.
    """
    return partial(raise_score, score=score, steps=steps, **_if_given(samples))


def raise_score(
    batch: QueryBatch,
    eps: float,
    restart: int,
    *,
    score: Callable[[QueryBatch, int], Score],
    steps: int,
    samples: int | None = None,
) -> Tensor:
    """Queries ``(Q, C, H, W)`` whose score was raised by `MomentumPGD`, see `gradient_attack`."""
    objective = batch.objective(score(batch, restart), samples=samples)
    return MomentumPGD(objective, eps, steps, batch.norm)(batch.images, objective.labels)


def classifier_attack(make: Callable[..., Any], targets: int | None = None, samples: int | None = None) -> Perturb:
    """An attack of torchattacks on `RetrievalClassifier`, as `QueryAttack` takes it.

    Args:
        make: a class of torchattacks, or one with options bound. It is called with the classifier and with those of
            ``eps``, ``norm``, ``seed``, ``n_classes`` and ``eot_iter`` that it takes. Whatever it returns is held to
            the budget.
        targets: how many of the most similar wrong classes are targeted; None: all, for attacks that take
            ``n_classes``.
        samples: ``eot_iter``, for attacks that take it: see `gradient_attack`.
    """
    return partial(fool_classifier, make=make, targets=targets, **_if_given(samples))


def fool_classifier(
    batch: QueryBatch,
    eps: float,
    restart: int,
    *,
    make: Callable[..., Any],
    targets: int | None = None,
    samples: int | None = None,
) -> Tensor:
    """Queries ``(Q, C, H, W)`` as an attack on `RetrievalClassifier` returns them, see `classifier_attack`."""
    taken, found = options_taken(make), batch.images.clone()
    for rows in separable_groups(batch.images, batch.targets, eps, batch.norm):
        part = batch[rows]
        model = part.classifier()
        options: dict[str, Any] = {"eps": eps, "norm": batch.norm, "seed": int(torch.randint(2**31, ()))}
        options["eot_iter"] = batch.num_samples(samples)
        options["n_classes"] = model.num_classes if targets is None else min(model.num_classes, targets + 1)
        options = {name: value for name, value in options.items() if taken(name)}
        images = part.images.float().clone()
        if images.ndim != 4:  # vectors, sounds or clips, which torchattacks does not know
            images = images.reshape(len(images), 1, 1, -1)
        found[rows] = make(model, **options)(images, model.labels).reshape(part.images.shape).to(found)
    return found


def _if_given(samples: int | None) -> dict[str, Any]:
    return {} if samples is None else {"samples": samples}


def options_taken(make: Callable[..., Any]) -> Callable[[str], bool]:
    """Which of the names of `classifier_attack` a maker takes and has not bound to a value."""
    parameters = inspect.signature(make).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    bound = make.keywords if isinstance(make, partial) else {}
    return lambda name: (name in parameters or (any_name and name not in _SELDOM)) and name not in bound


_SELDOM = ("n_classes", "eot_iter")  # options that are given only to what names them
LENGTHS = ("Linf", "L2")  # the norms of torchattacks

# Attacks on the gallery: which item is perturbed, and to what end.


def nearest_wrong(batch: QueryBatch, restart: int) -> Tensor:
    """Each query's nearest wrong item; in the second run the second nearest, and so on."""
    return batch.gallery.hardest(batch.clean, batch.targets, restart)[0]


def nearest_right(batch: QueryBatch, restart: int) -> Tensor:
    """Each query's nearest right item; in the second run the second nearest, and so on."""
    return batch.gallery.hardest(batch.clean, batch.targets, restart)[1]


def promotion(batch: QueryBatch) -> Score:
    """How similar the item is to the query."""
    return lambda items: batch.gallery.similarity_of_items(batch.clean, items)


def demotion(batch: QueryBatch) -> Score:
    """How dissimilar the item is to the query."""
    return lambda items: -batch.gallery.similarity_of_items(batch.clean, items)
