"""Which attacks an embedding meets: on the query or on the gallery, with gradients or without, and in which suite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..attacks import Attack
from ..objective import Objective, Score
from .classifier import RetrievalClassifier, apart
from .retrieval import Changed, Embed, Gallery, Ranking, Sought, unit


@dataclass(frozen=True, eq=False)
class Scene:
    """Queries before a gallery: all that an attack is told.

    Attributes:
        embed: pixels ``(n, C, H, W)`` -> embeddings ``(n, D)``.
        modules: what ``embed`` runs through.
        gallery: what is searched.
        pixels_of: gallery items ``(n,)`` -> their pixels ``(n, C, H, W)``.
        images: ``(Q, C, H, W)`` clean pixels of the queries.
        clean: ``(Q, D)`` their embeddings.
        sought: what they are to find.
        norm: "Linf" or "L2".
    """

    embed: Embed
    modules: tuple[nn.Module, ...]
    gallery: Gallery
    pixels_of: Callable[[Tensor], Tensor]
    images: Tensor
    clean: Tensor
    sought: Sought
    norm: str

    def __getitem__(self, rows: Tensor) -> Scene:
        return replace(self, images=self.images[rows], clean=self.clean[rows], sought=self.sought[rows])

    def __len__(self) -> int:
        return len(self.images)

    def objective(self, score: Score, origin: Tensor | None = None) -> Objective:
        """A score of embeddings, to be raised from the clean queries' or from ``origin``."""
        return Objective(self.embed, score, self.clean if origin is None else origin, self.modules)

    def classifier(self) -> RetrievalClassifier:
        """The embedding as a classifier over the gallery's classes."""
        return RetrievalClassifier(self.embed, self.gallery, self.images, self.sought, self.norm, *self.modules)


@dataclass(frozen=True)
class QueryAttack:
    """Perturbs queries; the gallery stays clean.

    Attributes:
        name: in reports.
        find: scene, eps, restart -> perturbed queries ``(Q, C, H, W)``.
        restarts: runs from different starts; later ones take on only queries that still stand.
        black_box: whether it only asks for outputs.
        only_standing: whether it has no use for queries that fail already.
        num_classes: how many the gallery has to hold at least.
    """

    name: str
    find: Callable[[Scene, float, int], Tensor]
    restarts: int = 1
    black_box: bool = False
    only_standing: bool = False
    num_classes: int = 2
    target = "query"

    def run(self, scene: Scene, eps: float, restart: int, depth: int) -> Outcome:
        """Attacks all queries of a scene and ranks what they find."""
        images = within(self.find(scene, eps, restart), scene.images, eps, scene.norm)
        with torch.no_grad():
            embeddings = scene.embed(images)
        shift = (unit(embeddings) - unit(scene.clean)).norm(dim=1)
        return Outcome(images, scene.gallery.ranking(embeddings, scene.sought, depth), shift)


@dataclass(frozen=True)
class GalleryAttack:
    """Perturbs one item of the gallery per query; the query stays clean.

    Attributes:
        name: in reports.
        choose: scene, restart -> items ``(Q,)`` to perturb.
        score: scene -> the score of the items' embeddings that is raised.
        steps: of `momentum_pgd`.
        restarts: further runs, also on other items.
    """

    name: str
    choose: Callable[[Scene, int], Tensor]
    score: Callable[[Scene], Score]
    steps: int
    restarts: int = 1
    black_box = False
    only_standing = False
    num_classes = 2
    target = "gallery"

    def run(self, scene: Scene, eps: float, restart: int, depth: int) -> Outcome:
        """Attacks one item for each query of a scene and ranks what the queries find then."""
        items = self.choose(scene, restart)
        pixels, origin = scene.pixels_of(items), scene.gallery.embeddings[items]
        objective = scene.objective(self.score(scene), origin)
        found = momentum_pgd(objective, eps, self.steps, scene.norm)(pixels, objective.labels)
        images = within(found, pixels, eps, scene.norm)
        with torch.no_grad():
            embeddings = scene.embed(images)
        ranking = scene.gallery.ranking(scene.clean, scene.sought, depth, Changed(items, embeddings))
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


def within(found: Tensor, clean: Tensor, eps: float, norm: str) -> Tensor:
    """What was found, held to the ball and to [0, 1]; what is not finite becomes clean again."""
    difference = torch.nan_to_num(found.detach().to(clean) - clean, nan=0.0, posinf=0.0, neginf=0.0)
    if norm == "Linf":
        return (clean + difference.clamp(-eps, eps)).clamp(0, 1)
    length = like(difference.flatten(1).norm(dim=1), clean)
    return (clean + difference * (eps / length.clamp(min=eps))).clamp(0, 1)


def momentum_pgd(
    objective: Objective, eps: float, steps: int, norm: str = "Linf", momentum: float = 0.75, random_start: bool = True
) -> Attack:
    """An attack from a random start, by steps that fall from eps to 0 along a cosine.

    Projected gradient ascent (Madry et al., arXiv 1706.06083) with the momentum of MI-FGSM (Dong et al., arXiv
    1710.06081); like APGD (Croce, Hein, arXiv 2003.01690) it returns the best point of each row's path. It breaks
    more queries than torchattacks' PGD with the same gradients, and hardly depends on its settings.

    Args:
        objective: what is raised.
        eps: radius, in pixels of [0, 1].
        steps: gradient steps; one more forward pass looks at the last point.
        norm: "Linf", by sign steps, or "L2".
        momentum: share of the past direction that is kept.
        random_start: whether it starts anywhere in the ball, or at the clean inputs.
    """

    def attack(inputs: Tensor, labels: Tensor) -> Tensor:
        point = within(inputs + eps * in_ball(inputs, norm), inputs, eps, norm) if random_start else inputs.clone()
        best, highest = inputs, torch.full((len(inputs),), -torch.inf, device=inputs.device)
        direction = torch.zeros_like(inputs)
        for step in range(steps + 1):
            point.requires_grad_(step < steps)
            value = cross_entropy(objective(point), labels, reduction="none")
            higher = value.detach() > highest
            best, highest = torch.where(like(higher, point), point.detach(), best), highest.maximum(value.detach())
            if step < steps:
                gradient = torch.autograd.grad(value.sum(), point)[0].nan_to_num(0.0, 0.0, 0.0)
                direction = momentum * direction + gradient / _size(gradient, norm)
                size = eps * (1 + math.cos(math.pi * step / steps)) / 2
                step_taken = direction.sign() if norm == "Linf" else direction / _size(direction, norm)
                point = within(point.detach() + size * step_taken, inputs, eps, norm)
        return best

    return attack


def in_ball(like_inputs: Tensor, norm: str) -> Tensor:
    """A random point of the unit ball per row."""
    if norm == "Linf":
        return 2 * torch.rand_like(like_inputs) - 1
    noise = torch.randn_like(like_inputs)
    radius = torch.rand(len(noise), device=noise.device, dtype=noise.dtype) ** (1 / noise[0].numel())
    return noise * like(radius / noise.flatten(1).norm(dim=1), noise)


def _size(gradient: Tensor, norm: str) -> Tensor:
    flat = gradient.flatten(1)
    size = flat.abs().mean(1) if norm == "Linf" else flat.norm(dim=1)
    return like(size.clamp(min=torch.finfo(size.dtype).tiny), gradient)


def like(per_row: Tensor, images: Tensor) -> Tensor:
    """``(Q,)`` in a shape that goes with ``(Q, ...)``."""
    return per_row.reshape(-1, *[1] * (images.ndim - 1))


# What is raised, by query.


def toward_nearest_wrong(scene: Scene, restart: int) -> Score:
    """Toward the nearest wrong item and away from the nearest right one, both chosen anew in every step."""
    return lambda queries: scene.gallery.margin(queries, scene.sought)


def toward_wrong_class(scene: Scene, restart: int) -> Score:
    """Toward one wrong class and away from the nearest right item: the most similar class, in the next run the second.

    The items are chosen anew in every step, the class stays. What stands in the way of one class need not do so of
    another, so this finds breaks that restarts toward the nearest wrong item do not.
    """
    gallery, own = scene.gallery, scene.sought.own
    target = Sought(scene.classifier().wrong_classes(restart), own)

    def score(queries: Tensor) -> Tensor:
        wrong, right = (gallery.hardest(queries, sought)[1] for sought in (target, scene.sought))
        return (unit(queries) * (gallery.embeddings[wrong] - gallery.embeddings[right])).sum(1)

    return score


def embedding_shift(scene: Scene, restart: int) -> Score:
    """Away from the query's own clean embedding, whatever the gallery holds."""
    origin = unit(scene.clean)
    return lambda queries: (unit(queries) - origin).square().sum(1)


def raising(score: Callable[[Scene, int], Score], steps: int) -> Callable[[Scene, float, int], Tensor]:
    """`momentum_pgd` of a score of the queries' embeddings, which may differ from run to run."""

    def find(scene: Scene, eps: float, restart: int) -> Tensor:
        objective = scene.objective(score(scene, restart))
        return momentum_pgd(objective, eps, steps, scene.norm)(scene.images, objective.labels)

    return find


# Attacks of torchattacks on the embedding seen as a classifier.


def classified(make: Callable[..., Any], targets: int | None = None) -> Callable[[Scene, float, int], Tensor]:
    """A torchattacks class, unmodified, on `RetrievalClassifier`.

    Args:
        make: called with the classifier and ``eps``, ``norm``, ``seed``.
        targets: how many of the most similar wrong classes it leads to, if it takes ``n_classes``.
    """

    def find(scene: Scene, eps: float, restart: int) -> Tensor:
        found = scene.images.clone()
        for rows in apart(scene.images, scene.sought, eps, scene.norm):
            part = scene[rows]
            model = part.classifier()
            options: dict[str, Any] = {"eps": eps, "norm": scene.norm, "seed": int(torch.randint(2**31, ()))}
            if targets is not None:
                options["n_classes"] = min(model.num_classes, targets + 1)
            found[rows] = make(model, **options)(part.images.float().clone(), model.labels).to(found)
        return found

    return find


# Attacks on the gallery.


def nearest_wrong(scene: Scene, restart: int) -> Tensor:
    """Of each query, the nearest wrong item, in the next run the second nearest, and so on."""
    return scene.gallery.hardest(scene.clean, scene.sought, restart)[0]


def nearest_right(scene: Scene, restart: int) -> Tensor:
    """Of each query, the nearest right item, in the next run the second nearest, and so on."""
    return scene.gallery.hardest(scene.clean, scene.sought, restart)[1]


def promotion(scene: Scene) -> Score:
    """The item comes nearer to the query."""
    query = unit(scene.clean)
    return lambda items: (unit(items) * query).sum(1)


def demotion(scene: Scene) -> Score:
    """The item moves off the query."""
    query = unit(scene.clean)
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
