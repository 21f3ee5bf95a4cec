"""A batch of queries and the gallery that they search: what attacks and measures are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from ...attacks.objective import Objective, Score
from .classifier import RetrievalClassifier
from .embedder import Embed
from .gallery import Gallery, Ranking, Targets
from .modes import SteadyObjective

SAMPLES = 10  #: Draws of a model that answers at random over which gradients are averaged (EOT).
ANSWERS = 100  #: Draws of such a model over which each measure of a query is averaged.


@dataclass(frozen=True, eq=False)
class QueryBatch:
    """A batch of queries and the gallery that they search: all that an attack is given.

    Attributes:
        embed: pixels ``(n, C, H, W)`` -> embeddings ``(n, D)``.
        modules: the modules that ``embed`` runs.
        gallery: what is searched.
        pixels_of: indices of gallery items ``(n,)`` -> their pixels ``(n, C, H, W)``.
        images: ``(Q, C, H, W)`` clean pixels of the queries.
        clean: ``(Q, D)`` embeddings of the clean queries.
        targets: what the queries should find.
        norm: of the perturbations, one of `ball.NORMS`.
        rows: ``(Q,)`` indices of the queries among all queries that were passed to the evaluation.
        is_random: whether the model gives another answer each time.
    """

    embed: Embed
    modules: tuple[nn.Module, ...]
    gallery: Gallery
    pixels_of: Callable[[Tensor], Tensor]
    images: Tensor
    clean: Tensor
    targets: Targets
    norm: str
    rows: Tensor
    is_random: bool = False

    def __getitem__(self, rows: Tensor) -> QueryBatch:
        parts = {name: getattr(self, name)[rows] for name in ("images", "clean", "targets", "rows")}
        return replace(self, **parts)

    def __len__(self) -> int:
        return len(self.images)

    def objective(self, score: Score, origin: Tensor | None = None, samples: int | None = None) -> Objective:
        """The objective of an attack that starts at the embeddings ``origin`` (None: of the clean queries).

        Gradients are means over ``samples`` draws; None: see `num_samples`.
        """
        origin, samples = self.clean if origin is None else origin, self.num_samples(samples)
        return SteadyObjective(self.embed, score, origin, self.modules, samples)

    def num_samples(self, samples: int | None) -> int:
        """The number itself; None: `SAMPLES` draws of a model that answers at random, else one."""
        if samples is None:
            return SAMPLES if self.is_random else 1
        return samples

    @torch.no_grad()
    def more_answers(self, images: Tensor) -> Iterator[Tensor]:
        """The embeddings ``(Q, D)`` of images in further calls, if the model answers at random."""
        for _ in range(ANSWERS - 1 if self.is_random else 0):
            yield self.embed(images)

    def rankings(self, depth: int) -> Iterator[Ranking]:
        """What the clean queries find, down to ``depth``; a model that answers at random is asked several times."""
        for embeddings in chain((self.clean,), self.more_answers(self.images)):
            yield self.gallery.ranking(embeddings, self.targets, depth)

    def classifier(self) -> RetrievalClassifier:
        """The model as a classifier over the classes of the gallery."""
        return RetrievalClassifier(self.embed, self.gallery, self.images, self.targets, self.norm, *self.modules)
