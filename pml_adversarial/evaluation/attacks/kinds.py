"""The two kinds of attack on retrieval: on the query, and on the gallery."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...attacks.ball import NORMS, project
from ...attacks.objective import Score
from ...attacks.pgd import MomentumPGD
from ...errors import InputError
from ..retrieval.batch import QueryBatch
from ..retrieval.gallery import Ranking, ReplacedItems

Perturb = Callable[[QueryBatch, float, int], Tensor]
"""Batch, eps, number of the restart -> perturbed queries ``(Q, C, H, W)``."""


@dataclass(frozen=True)
class QueryAttack:
    """Perturbs queries; the gallery stays clean.

    Attributes:
        name: of the attack in reports.
        perturb: see `Perturb`. Whatever it returns is held to the budget. If it has a method ``prepared``, this is
            called once, with all queries, before the first run; see `preparation`.
        restarts: how often it runs. Later runs attack only queries that it has not broken yet, at this eps or a smaller
            one.
        black_box: whether it uses outputs of the model only, no gradients.
        only_robust: whether the first run, too, attacks only queries that it has not broken yet. A query that is wrong
            without attack counts as broken.
        num_classes: how many classes the gallery must have; with fewer, the attack is left out.
        needs_items: whether it needs the images of the gallery; where only their embeddings are known, it is left out.
        passes: how many image passes one run takes for each query, at most; None: it is not known.
        follows: whether it attacks only queries that are still robust after the attacks before it. Its measures are
            then the lowest of these attacks and of its own.
        norms: in which it can be made; in others it is left out.
    """

    name: str
    perturb: Perturb
    restarts: int = 1
    black_box: bool = False
    only_robust: bool = False
    num_classes: int = 2
    needs_items: bool = False
    passes: int | None = None
    follows: bool = False
    norms: tuple[str, ...] = NORMS
    target = "query"

    def run(self, batch: QueryBatch, eps: float, restart: int, depth: int) -> AttackOutcome:
        """Attacks all queries of a batch and ranks what the perturbed queries find, down to ``depth``."""
        images = held_to_budget(self.name, lambda: self.perturb(batch, eps, restart), batch.images, eps, batch.norm)
        with torch.no_grad():
            embeddings = batch.embed(images)
        shift = batch.gallery.shift(embeddings, batch.clean)

        def ranking(embeddings: Tensor) -> Ranking:
            return batch.gallery.ranking(embeddings, batch.targets, depth)

        more, is_finite = map(ranking, batch.more_answers(images)), embeddings.isfinite().all(1)
        return AttackOutcome(images, ranking(embeddings), shift, more, is_finite)


def held_to_budget(name: str, perturb: Callable[[], Any], images: Tensor, eps: float, norm: str) -> Tensor:
    """What an attack makes of images ``(n, C, H, W)``, within their balls and [0, 1]. They stay as they are.

    Raises:
        InputError: the attack returned something else than as many finite images.
    """
    clean = images.clone()
    found = perturb()
    if not isinstance(found, Tensor) or found.shape != clean.shape:
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"The attack {name} returned {shown}; expected perturbed images {tuple(clean.shape)}.")
    if not found.isfinite().all():
        raise InputError(f"The attack {name} returned NaN or infinite pixels; expected finite ones.")
    held = project(found, clean, eps, norm)
    if not torch.equal(images, clean):  # the attack changed them in place
        images.copy_(clean)
    return held


@dataclass(frozen=True)
class GalleryAttack:
    """Perturbs one item of the gallery for each query; the query stays clean.

    Attributes:
        name: of the attack in reports.
        choose: batch, number of the restart -> indices of the items ``(Q,)`` to perturb.
        score: batch -> the score of the items' embeddings that is raised.
        steps: of `MomentumPGD`.
        restarts: how often it runs. Later runs attack only queries that are still robust.
        norms: in which it can be made; in others it is left out.
        samples: see `QueryBatch.objective`.
    """

    name: str
    choose: Callable[[QueryBatch, int], Tensor]
    score: Callable[[QueryBatch], Score]
    steps: int
    restarts: int = 1
    norms: tuple[str, ...] = NORMS
    samples: int | None = None
    black_box = False
    only_robust = False
    num_classes = 2
    needs_items = True
    follows = False
    target = "gallery"

    @property
    def passes(self) -> int:
        """How many image passes one run takes for each query."""
        return (self.samples or 1) * (2 * self.steps + 1) + 1

    def run(self, batch: QueryBatch, eps: float, restart: int, depth: int) -> AttackOutcome:
        """Attacks one item for each query of a batch and ranks what the queries find then, down to ``depth``."""
        items = self.choose(batch, restart)
        pixels, origin = batch.pixels_of(items), batch.gallery.embeddings[items]
        objective = batch.objective(self.score(batch), origin, self.samples)
        found = MomentumPGD(objective, eps, self.steps, batch.norm)(pixels, objective.labels)
        images = project(found, pixels, eps, batch.norm)
        with torch.no_grad():
            embeddings = batch.embed(images)
        shift = batch.gallery.shift(embeddings, origin)

        def ranking(queries: Tensor, embeddings: Tensor) -> Ranking:
            return batch.gallery.ranking(queries, batch.targets, depth, ReplacedItems(items, embeddings))

        more = map(ranking, batch.more_answers(batch.images), batch.more_answers(images))
        return AttackOutcome(images, ranking(batch.clean, embeddings), shift, more)


@dataclass(frozen=True, eq=False)
class AttackOutcome:
    """What an attack gives.

    Attributes:
        images: ``(Q, C, H, W)`` the perturbed queries, or the perturbed items.
        ranking: what the queries find.
        shift: ``(Q,)`` Euclidean distance between perturbed and clean embeddings, as they are compared.
        more: what the queries find in further calls of a model that answers at random.
        is_finite: ``(Q,)`` bool, whether each perturbed query has a finite embedding; None: all have.
    """

    images: Tensor
    ranking: Ranking
    shift: Tensor
    more: Iterable[Ranking] = ()
    is_finite: Tensor | None = None

    @property
    def rankings(self) -> Iterator[Ranking]:
        """What the queries find in all calls, one after the other; they can be gone through once."""
        return chain((self.ranking,), self.more)


RetrievalAttack = QueryAttack | GalleryAttack
