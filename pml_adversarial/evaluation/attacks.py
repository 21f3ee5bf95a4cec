"""What an attack is told, and what kinds of attack there are: on the query, and on the gallery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attacks.ball import projected
from ..attacks.objective import Objective, Score
from ..attacks.pgd import MomentumPGD
from .classifier import RetrievalClassifier
from .gallery import Changed, Embed, Gallery, Ranking, Targets, unit


@dataclass(frozen=True, eq=False)
class QueryBatch:
    """Queries before a gallery: all that an attack is told.

    Attributes:
        embed: pixels ``(n, C, H, W)`` -> embeddings ``(n, D)``.
        modules: what ``embed`` runs through.
        gallery: what is searched.
        pixels_of: gallery items ``(n,)`` -> their pixels ``(n, C, H, W)``.
        images: ``(Q, C, H, W)`` clean pixels of the queries.
        clean: ``(Q, D)`` their embeddings.
        targets: what they are to find.
        norm: "Linf" or "L2".
    """

    embed: Embed
    modules: tuple[nn.Module, ...]
    gallery: Gallery
    pixels_of: Callable[[Tensor], Tensor]
    images: Tensor
    clean: Tensor
    targets: Targets
    norm: str

    def __getitem__(self, rows: Tensor) -> QueryBatch:
        return replace(self, images=self.images[rows], clean=self.clean[rows], targets=self.targets[rows])

    def __len__(self) -> int:
        return len(self.images)

    def objective(self, score: Score, origin: Tensor | None = None) -> Objective:
        """A score of embeddings, to be raised from the clean queries' or from ``origin``."""
        return Objective(self.embed, score, self.clean if origin is None else origin, self.modules)

    def classifier(self) -> RetrievalClassifier:
        """The embedding as a classifier over the gallery's classes."""
        return RetrievalClassifier(self.embed, self.gallery, self.images, self.targets, self.norm, *self.modules)


@dataclass(frozen=True)
class QueryAttack:
    """Perturbs queries; the gallery stays clean.

    Attributes:
        name: in reports.
        find: batch, eps, restart -> perturbed queries ``(Q, C, H, W)``.
        restarts: runs from different starts; later ones take on only queries that still stand.
        black_box: whether it only asks for outputs.
        only_standing: whether it has no use for queries that fail already.
        num_classes: how many the gallery has to hold at least.
    """

    name: str
    find: Callable[[QueryBatch, float, int], Tensor]
    restarts: int = 1
    black_box: bool = False
    only_standing: bool = False
    num_classes: int = 2
    target = "query"

    def run(self, batch: QueryBatch, eps: float, restart: int, depth: int) -> Outcome:
        """Attacks all queries of a batch and ranks what they find."""
        images = projected(self.find(batch, eps, restart), batch.images, eps, batch.norm)
        with torch.no_grad():
            embeddings = batch.embed(images)
        shift = (unit(embeddings) - unit(batch.clean)).norm(dim=1)
        return Outcome(images, batch.gallery.ranking(embeddings, batch.targets, depth), shift)


@dataclass(frozen=True)
class GalleryAttack:
    """Perturbs one item of the gallery per query; the query stays clean.

    Attributes:
        name: in reports.
        choose: batch, restart -> items ``(Q,)`` to perturb.
        score: batch -> the score of the items' embeddings that is raised.
        steps: of `MomentumPGD`.
        restarts: further runs, also on other items.
    """

    name: str
    choose: Callable[[QueryBatch, int], Tensor]
    score: Callable[[QueryBatch], Score]
    steps: int
    restarts: int = 1
    black_box = False
    only_standing = False
    num_classes = 2
    target = "gallery"

    def run(self, batch: QueryBatch, eps: float, restart: int, depth: int) -> Outcome:
        """Attacks one item for each query of a batch and ranks what the queries find then."""
        items = self.choose(batch, restart)
        pixels, origin = batch.pixels_of(items), batch.gallery.embeddings[items]
        objective = batch.objective(self.score(batch), origin)
        found = MomentumPGD(objective, eps, self.steps, batch.norm)(pixels, objective.labels)
        images = projected(found, pixels, eps, batch.norm)
        with torch.no_grad():
            embeddings = batch.embed(images)
        ranking = batch.gallery.ranking(batch.clean, batch.targets, depth, Changed(items, embeddings))
        return Outcome(images, ranking, (unit(embeddings) - origin).norm(dim=1))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an attack found and what it did.

    Attributes:
        images: ``(Q, C, H, W)`` within the budget: the perturbed queries, or the perturbed items.
        ranking: what the queries find.
        shift: ``(Q,)`` how far the perturbed embeddings moved, in [0, 2].
    """

    images: Tensor
    ranking: Ranking
    shift: Tensor


AnyAttack = QueryAttack | GalleryAttack
