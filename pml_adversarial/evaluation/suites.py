"""Which attacks a query meets, and what is left of R@1 after the worst of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from .. import attacks
from ..attacks import Attack
from ..isolation import isolated, random_stream
from ..objective import Objective, Score
from .retrieval import Gallery, chunks, embed_all

QueryAttack = Callable[[Gallery, Tensor, Tensor], Score]
"""Gallery, clean query embeddings ``(Q, D)`` and own items ``(Q,)`` -> the score that the attack raises."""


def toward_nearest_wrong(gallery: Gallery, clean: Tensor, own: Tensor) -> Score:
    """Toward the nearest wrong item and away from the nearest right one, both chosen anew in every step."""
    return lambda queries: gallery.margin(queries, own)


def embedding_shift(gallery: Gallery, clean: Tensor, own: Tensor) -> Score:
    """Away from the query's own clean embedding, whatever the gallery holds."""
    origin = normalize(clean)
    return lambda queries: (normalize(queries) - origin).square().sum(1)


def momentum_pgd(objective: Objective, eps: float, steps: int, momentum: float = 0.75) -> Attack:
    """An l-inf attack from a random start, by sign steps that fall from eps to 0 along a cosine.

    Projected gradient ascent (Madry et al., arXiv 1706.06083) with the momentum of MI-FGSM (Dong et al., arXiv
    1710.06081); like APGD (Croce, Hein, arXiv 2003.01690) it returns the best point of each row's path. It breaks
    more queries than torchattacks' PGD with the same gradients, and hardly depends on its settings.

    Args:
        objective: what is raised.
        eps: radius, in pixels of [0, 1].
        steps: gradient steps; one more forward pass looks at the last point.
        momentum: share of the past direction that is kept.
    """

    def attack(inputs: Tensor, labels: Tensor) -> Tensor:
        low, high = (inputs - eps).clamp(min=0), (inputs + eps).clamp(max=1)
        point = low + (high - low) * torch.rand_like(inputs)
        best, highest = inputs, torch.full((len(inputs),), -torch.inf, device=inputs.device)
        direction = torch.zeros_like(inputs)
        for step in range(steps + 1):
            point.requires_grad_()
            value = cross_entropy(objective(point), labels, reduction="none")
            higher = value.detach() > highest
            best, highest = torch.where(_like(higher, point), point.detach(), best), highest.maximum(value.detach())
            if step < steps:
                (gradient,) = torch.autograd.grad(value.sum(), point)
                scale = gradient.abs().flatten(1).mean(1).clamp(min=torch.finfo(gradient.dtype).tiny)
                direction = momentum * direction + gradient / _like(scale, gradient)
                size = eps * (1 + math.cos(math.pi * step / steps)) / 2
                point = (point.detach() + size * direction.sign()).clamp(low, high)
        return best

    return attack


QUERY_ATTACKS: dict[str, QueryAttack] = {"margin": toward_nearest_wrong, "shift": embedding_shift}
"""The attacks of `robust_recall`, by name."""


@dataclass(frozen=True, eq=False)
class RobustRecall:
    """R@1 of attacked queries at one eps, in [0, 1]; a query that is wrong when clean counts as broken.

    Attributes:
        eps: l-inf radius, in pixels of [0, 1].
        by_attack: R@1 under each attack, over all its restarts.
        worst_case: R@1 under the worst attack of each single query.
        wrong: ``(Q,)`` bool, queries whose nearest item is wrong without attack.
        broken: ``(Q,)`` bool, queries whose nearest item is wrong, clean or under some attack.
        attacked: ``(Q, C, H, W)`` what broke the query, or the last that it survived.
    """

    eps: float
    by_attack: Mapping[str, float]
    worst_case: float
    wrong: Tensor
    broken: Tensor
    attacked: Tensor


def robust_recall(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Iterable[float],
    steps: int = 40,
    restarts: int = 3,
    seed: int = 0,
    chunk: int = 512,
    progress: Callable[[], object] | None = None,
) -> list[RobustRecall]:
    """Attacks every image as a query against all others (leave one out), each attack from several random starts.

    Each run is a `momentum_pgd`. Only queries that still stand are attacked again; what broke a query at one eps is
    within every larger one, so it stays broken there.

    Args:
        model: images -> embeddings; it is attacked in eval mode and comes back as it was.
        images: ``(Q, C, H, W)`` in [0, 1], at once the queries and the clean gallery.
        labels: ``(Q,)``; every label needs at least two images.
        eps: l-inf radii.
        steps: gradient steps of one run.
        restarts: runs from different random starts.
        seed: of the random starts.
        chunk: queries that are attacked together.
        progress: called after every run, `num_runs` times.

    Returns:
        One result per eps, in ascending order.
    """
    results = []
    with isolated(model):
        clean = embed_all(model, images, chunk)
        gallery = Gallery(clean, labels)
        everyone = torch.arange(len(images), device=images.device)
        right = _stands(gallery, clean, everyone)
        standing = dict.fromkeys(QUERY_ATTACKS, right)
        broken, attacked = ~right, images.clone()
        for radius in sorted(eps):
            for name, restart, rows in _runs(len(images), restarts, chunk):
                own = everyone[rows][standing[name][rows]]
                if len(own):
                    with random_stream(seed, restart * len(images) + rows.start):
                        score = QUERY_ATTACKS[name](gallery, clean[own], own)
                        objective = Objective(model, score, clean[own], [model])
                        attack = momentum_pgd(objective, radius, steps)
                        found = attacks.run(attack, images[own], objective.labels)
                    fell = ~_stands(gallery, embed_all(model, found, chunk), own)
                    standing[name] = standing[name].index_fill(0, own[fell], False)
                    attacked[own] = torch.where(_like(~broken[own], found), found, attacked[own])
                    broken[own[fell]] = True
                if progress is not None:
                    progress()
            by_attack = {name: stands.float().mean().item() for name, stands in standing.items()}
            worst_case = (~broken).float().mean().item()
            results.append(RobustRecall(radius, by_attack, worst_case, ~right, broken.clone(), attacked.clone()))
    return results


def num_runs(num_images: int, num_eps: int, restarts: int = 3, chunk: int = 512) -> int:
    """How often `robust_recall` reports progress."""
    return num_eps * len(_runs(num_images, restarts, chunk))


def _runs(num_images: int, restarts: int, chunk: int) -> list[tuple[str, int, slice]]:
    return list(product(QUERY_ATTACKS, range(restarts), chunks(num_images, chunk)))


def _like(per_row: Tensor, images: Tensor) -> Tensor:
    return per_row.reshape(-1, *[1] * (images.ndim - 1))


def _stands(gallery: Gallery, queries: Tensor, own: Tensor) -> Tensor:
    with torch.no_grad():
        return gallery.margin(queries, own) < 0
