"""Attacks on verification: genuine pairs are pushed apart (dodging), impostor pairs pulled together (impersonation).

The first image of each pair is perturbed; the second one is enrolled, and stays clean. The words are those of RobFR
(Yang et al., arXiv 2007.04118).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ...attacks.ball import per_image, project
from ...attacks.objective import Objective, Score
from ...attacks.pgd import PGD, MomentumPGD
from ..attacks.kinds import held_to_budget
from ..attacks.square import search_squares
from ..retrieval.batch import ANSWERS, SAMPLES
from ..retrieval.distance import Distance
from ..retrieval.embedder import Embed
from ..retrieval.gallery import finite_or_zero
from ..retrieval.modes import SteadyObjective

STEPS, RESTARTS, QUERIES = 50, 3, 200  #: Of "pairs-v1", see `pair_attacks`.
REJECTED = -1e300  #: Similarity of an embedding that is not finite: no threshold accepts it.

_HIGHEST = 1e30  # score; attacks that are not ours may multiply scores by 0


@dataclass(frozen=True, eq=False)
class PairBatch:
    """A batch of pairs: all that an attack is given.

    Attributes:
        embed: pixels ``(n, C, H, W)`` -> embeddings ``(n, D)``.
        modules: the modules that ``embed`` runs.
        distance: how embeddings are compared.
        images: ``(n, C, H, W)`` clean pixels of the first images.
        clean: ``(n, D)`` their embeddings.
        enrolled_images: ``(n, C, H, W)`` pixels of the second images.
        enrolled: ``(n, D)`` their embeddings, as they are compared.
        same: ``(n,)`` bool, whether a pair is genuine.
        norm: of the perturbations, one of `ball.NORMS`.
        is_random: whether the model gives another answer each time.
    """

    embed: Embed
    modules: tuple[nn.Module, ...]
    distance: Distance
    images: Tensor
    clean: Tensor
    enrolled_images: Tensor
    enrolled: Tensor
    same: Tensor
    norm: str
    is_random: bool = False

    def __getitem__(self, rows: Tensor) -> PairBatch:
        names = ("images", "clean", "enrolled_images", "enrolled", "same")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def __len__(self) -> int:
        return len(self.images)

    def score(self, embeddings: Tensor) -> Tensor:
        """``(n,)`` what attacks raise: the similarity of impostor pairs, minus the similarity of genuine pairs."""
        finite = embeddings.isfinite().all(1)
        vectors = self.distance.vectors(finite_or_zero(embeddings))
        similarity = self.distance.to_each(vectors, self.enrolled)
        similarity = torch.where(finite, similarity, torch.nan)
        return self.toward_goal(similarity.nan_to_num(-_HIGHEST, _HIGHEST, -_HIGHEST))

    def toward_goal(self, similarities: Tensor) -> Tensor:
        """``(n,)`` similarities, with a minus sign for genuine pairs."""
        return torch.where(self.same, -similarities, similarities)

    @torch.no_grad()
    def similarities(self, images: Tensor) -> Tensor:
        """``(n,)`` similarities of pairs whose first images are ``(n, C, H, W)``, in double precision."""
        embeddings = self.embed(images)
        vectors = self.distance.vectors(finite_or_zero(embeddings))
        found = self.distance.to_each(vectors.double(), self.enrolled.double())
        found = torch.where(embeddings.isfinite().all(1), found, torch.nan)
        return found.nan_to_num(REJECTED, -REJECTED, REJECTED)

    def mean_similarities(self, images: Tensor) -> Tensor:
        """The same; of a model that answers at random, the means over `ANSWERS` draws."""
        draws = ANSWERS if self.is_random else 1
        return torch.stack([self.similarities(images) for _ in range(draws)]).mean(0)

    def objective(self) -> Objective:
        """The score, as attacks of this package and of torchattacks take it.

        Of a model that answers at random, gradients are means over `SAMPLES` draws.
        """
        samples = SAMPLES if self.is_random else 1
        return SteadyObjective(self.embed, self.score, self.clean, self.modules, samples)


@dataclass(frozen=True)
class PairAttack:
    """Perturbs the first images of pairs.

    Attributes:
        name: of the attack in reports.
        perturb: batch, eps, number of the restart -> perturbed first images ``(n, C, H, W)``.
        restarts: how often it runs.
        black_box: whether it uses outputs of the model only, no gradients.
    """

    name: str
    perturb: Callable[[PairBatch, float, int], Tensor]
    restarts: int = 1
    black_box: bool = False

    def run(self, batch: PairBatch, eps: float, restart: int) -> tuple[Tensor, Tensor]:
        """Perturbed first images within eps of the clean ones, and the mean similarities ``(n,)`` of their pairs."""
        images = held_to_budget(self.name, lambda: self.perturb(batch, eps, restart), batch.images, eps, batch.norm)
        return images, batch.mean_similarities(images)


def momentum(batch: PairBatch, eps: float, restart: int, steps: int, random_start: bool = True) -> Tensor:
    """`MomentumPGD` from a random start."""
    objective = batch.objective()
    attack = MomentumPGD(objective, eps, steps, batch.norm, random_start=random_start)
    return attack(batch.images, objective.labels)


def plain(batch: PairBatch, eps: float, restart: int, steps: int) -> Tensor:
    """`PGD` with steps of a constant length, without momentum, from a random start."""
    objective = batch.objective()
    return PGD(objective, eps, steps=steps, norm=batch.norm)(batch.images, objective.labels)


def from_enrolled(batch: PairBatch, eps: float, restart: int, steps: int) -> Tensor:
    """`MomentumPGD` that starts, for an impostor pair, at the point within eps that is nearest to the enrolled image.

    Where the enrolled image itself is within eps, impersonation succeeds with any model. Genuine pairs start at random.
    """
    objective = batch.objective()
    return _FromEnrolled(objective, eps, steps, batch)(batch.images, objective.labels)


class _FromEnrolled(MomentumPGD):
    def __init__(self, objective: Objective, eps: float, steps: int, batch: PairBatch) -> None:
        super().__init__(objective, eps, steps, batch.norm)
        self._batch = batch

    def start(self, inputs: Tensor) -> Tensor:
        """See `PGD.start`."""
        random = super().start(inputs)
        if self._batch.enrolled_images.shape != inputs.shape:
            return random
        nearest = project(self._batch.enrolled_images, inputs, self.eps, self.norm)
        return torch.where(per_image(self._batch.same, inputs), random, nearest)


def square(batch: PairBatch, eps: float, restart: int, queries: int) -> Tensor:
    """Square (Andriushchenko et al., arXiv 1912.00049), which sees similarities only, see the module `square`."""
    return search_squares(batch, eps, restart, score=_score, queries=queries, goal=torch.inf)


def _score(batch: PairBatch, restart: int) -> Score:
    return batch.score


def pair_attacks(steps: int = STEPS, restarts: int = RESTARTS, queries: int = QUERIES) -> tuple[PairAttack, ...]:
    """The attacks of "pairs-v1", if called without arguments.

    Args:
        steps: gradient steps of each run.
        restarts: runs of the attack "momentum", from different random starts.
        queries: forward passes of the black-box attack; 0: it is left out.
    """
    black_box = PairAttack("square", partial(square, queries=queries), black_box=True)
    return (
        PairAttack("momentum", partial(momentum, steps=steps), restarts),
        PairAttack("enrolled", partial(from_enrolled, steps=steps)),
        PairAttack("pgd", partial(plain, steps=steps)),
        *([black_box] if queries else []),
    )
