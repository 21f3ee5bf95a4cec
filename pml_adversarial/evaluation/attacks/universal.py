"""Universal perturbations: one change of the pixels that is added to every query, learned on other images.

After Moosavi-Dezfooli et al., "Universal adversarial perturbations" (arXiv 1610.08401); for retrieval, Li et al.,
"Universal Perturbation Attack Against Image Retrieval" (arXiv 1812.00552). The attacker needs the model while learning,
and nothing but the perturbation when a query is made.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...attacks.ball import per_image, radius_text
from ...attacks.checks import check_choice, check_whole
from ...attacks.objective import Score
from ...attacks.pgd import row_length, uniform_noise
from ...errors import InputError
from ...training.isolation import random_stream
from ...training.pixels import Bounds, Normalization
from ..retrieval.batch import QueryBatch
from ..retrieval.embedder import Embedder, plain_surroundings
from ..retrieval.forms import Images
from ..retrieval.options import digest_of, to_radii, to_seed
from ..retrieval.task import RetrievalTask, Search
from .gradients import margin_score
from .kinds import Perturb, QueryAttack

NORMS = ("Linf", "L2")  #: In which universal perturbations are learned.

_MOMENTUM = 0.75
_TOGETHER = 128  # images that are read at once


@dataclass(frozen=True, eq=False)
class UniversalPerturbation:
    """One perturbation for all images.

    Attributes:
        delta: ``(C, H, W)``, in pixels of [0, 1].
        eps: its radius.
        norm: "Linf" or "L2".
        learned_on: hashes of the images on which it was learned, in 8 bits.
        broken: share of these images whose nearest item is wrong with it.
    """

    delta: Tensor = field(repr=False)
    eps: float
    norm: str
    learned_on: frozenset[str] = field(repr=False)
    broken: float


def universal_perturbation(
    model: Any,
    images: Images,
    gallery: Images | None = None,
    *,
    eps: float,
    norm: str = "Linf",
    distance: Any = "cosine",
    score: Callable[[QueryBatch, int], Score] = margin_score,
    epochs: int = 10,
    restarts: int = 3,
    normalization: Normalization | None = None,
    bounds: Bounds | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> UniversalPerturbation:
    """Learns one perturbation that makes as many images as possible find a wrong item first.

    In each step the mean score of a batch is raised: along the sign of its gradient in l-inf, along the gradient in l2,
    with momentum, and with steps that fall from eps to 0 along a cosine. Of all restarts the perturbation is kept that
    breaks most of the images.

    Args:
        model: as in `evaluate_robustness`.
        images: labelled images to learn on, in the forms of queries. They must not be the queries that are attacked.
        gallery: what they search; None: each other.
        eps: radius of the perturbation.
        norm: "Linf" or "L2".
        distance: as in `evaluate_robustness`.
        score: what is raised, such as `gradients.margin_score` or `gradients.shift_score`.
        epochs: how often all images are gone through.
        restarts: how often it is learned, from different random starts.
        normalization: as in `evaluate_robustness`.
        bounds: as in `evaluate_robustness`.
        seed: of all random choices.
        batch_size: images of a step.

    Raises:
        InputError: the images cannot be used, the model has no gradient, or an option is out of range.
    """
    check_choice("norm", norm, NORMS)
    epochs, restarts = check_whole("epochs", epochs), check_whole("restarts", restarts)
    batch_size, seed = check_whole("batch_size", batch_size), to_seed(seed)
    (radius,) = _one(to_radii(eps, norm))
    embed = Embedder(model, normalization, bounds)
    with plain_surroundings(), random_stream(seed, -1):
        task = RetrievalTask(embed, images, gallery, norm, Search(distance))
        task.probe((radius,))
        embed.check_gradient(task.queries[:1])
        with embed.isolated():
            everything = task.rows(None)
            task.embed_and_set(everything, batch_size)
            rows, _ = task.with_right_item(everything)
            found = [_learned(task, rows, radius, score, epochs, batch_size) for _ in range(restarts)]
            broken = [_broken(task, rows, delta, batch_size) for delta in found]
        best = max(range(restarts), key=broken.__getitem__)
        seen = (digest for part in rows.cpu().split(_TOGETHER) for digest in _digests(task.queries[part]))
        return UniversalPerturbation(found[best][0], radius, norm, frozenset(seen), broken[best])


def universal_attack(perturbation: UniversalPerturbation | Tensor, name: str = "universal") -> QueryAttack:
    """An attack that adds one perturbation to all queries.

    At an eps below its own, the perturbation is cut to the budget of each query, and the report says so.

    Args:
        perturbation: what `universal_perturbation` returned, or ``(C, H, W)`` in pixels of [0, 1].
        name: of the attack in reports.

    Raises:
        InputError: it is something else. In the evaluation: it does not fit the images, or was learned on some of the
            queries.
    """
    if isinstance(perturbation, UniversalPerturbation):
        delta, seen = perturbation.delta, perturbation.learned_on
    elif isinstance(perturbation, Tensor) and perturbation.is_floating_point() and perturbation.isfinite().all():
        delta, seen = perturbation.detach(), None
    else:
        raise InputError(
            f"perturbation is {type(perturbation).__name__}; expected what universal_perturbation returned, or a "
            "tensor (C, H, W) of finite changes in pixels of [0, 1]."
        )
    return QueryAttack(name, _Added(delta, seen, digest_of([delta])), passes=1)


@dataclass(frozen=True, eq=False)
class _Added:
    """Adds a perturbation; ``seen`` are the hashes of the images on which it was learned, None: not known."""

    delta: Tensor
    seen: frozenset[str] | None
    digest: str  # tells evaluations apart

    def __call__(self, batch: QueryBatch, eps: float, restart: int) -> Tensor:
        return batch.images + self.delta.to(batch.images)

    def prepared(self, task: RetrievalTask, rows: Tensor, radii: Sequence[float]) -> tuple[Perturb, list[str]]:
        """See `Prepares`. Queries on which it was learned are refused."""
        shape = task.queries[rows[:1]].shape[1:]
        if self.delta.shape != shape:
            raise InputError(
                f"The universal perturbation is {tuple(self.delta.shape)}, the queries are {tuple(shape)}; expected "
                "one of their shape."
            )
        if self.seen is None:
            return self, ["it is not known on which images it was learned; expected others than the queries"]
        parts = rows.cpu().split(_TOGETHER)
        known = sum(digest in self.seen for part in parts for digest in _digests(task.queries[part]))
        if known:
            raise InputError(
                f"{known} of {len(rows)} queries are images on which the universal perturbation was learned. Expected "
                "other queries; learn it on other images, or choose the queries with subset=...."
            )
        return self, list(self._cut(radii, task.norm))

    def _cut(self, radii: Sequence[float], norm: str) -> Iterator[str]:
        size = float(self.delta.abs().max() if norm == "Linf" else self.delta.norm())
        smaller = [radius_text(eps, norm) for eps in radii if size > eps * (1 + 1e-4)]
        if norm in NORMS and smaller:
            yield f"of size {size:.4g}, it is cut to the budget at eps {', '.join(smaller)}"
        larger = [radius_text(eps, norm) for eps in radii if size < eps * (1 - 1e-2)]
        if norm in NORMS and larger:
            yield f"of size {size:.4g}, it leaves some of the budget unused at eps {', '.join(larger)}"


def _learned(
    task: RetrievalTask,
    rows: Tensor,
    eps: float,
    score: Callable[[QueryBatch, int], Score],
    epochs: int,
    batch_size: int,
) -> Tensor:
    """A perturbation ``(1, C, H, W)`` that was learned on the queries ``rows``."""
    delta = uniform_noise(task.queries[rows[:1]], eps, task.norm)
    velocity, step = torch.zeros_like(delta), 0
    total = epochs * math.ceil(len(rows) / batch_size)
    for _ in range(epochs):
        for part in rows[torch.randperm(len(rows)).to(rows.device)].split(batch_size):
            gradient = _gradient(task.batch(part), delta, score)
            velocity = _MOMENTUM * velocity + gradient / row_length(gradient, mean_absolute=task.norm == "Linf")
            size = eps * (1 + math.cos(math.pi * step / total)) / 2
            delta = _held(delta + size * _directed(velocity, task.norm), eps, task.norm)
            step += 1
    return delta


def _gradient(batch: QueryBatch, delta: Tensor, score: Callable[[QueryBatch, int], Score]) -> Tensor:
    """The gradient of the mean score; a mean over draws, if the model answers at random."""
    samples, value = batch.num_samples(None), score(batch, 0)
    total = torch.zeros_like(delta)
    for _ in range(samples):
        moved = delta.clone().requires_grad_()
        mean = value(batch.embed((batch.images + moved).clamp(0, 1))).mean()
        total += torch.autograd.grad(mean, moved)[0].nan_to_num(0.0, 0.0, 0.0)
    return total / samples


def _directed(velocity: Tensor, norm: str) -> Tensor:
    return velocity.sign() if norm == "Linf" else velocity / row_length(velocity)


def _held(delta: Tensor, eps: float, norm: str) -> Tensor:
    """A perturbation ``(1, C, H, W)`` within the radius."""
    if norm == "Linf":
        return delta.clamp(-eps, eps)
    return delta * per_image(eps / delta.flatten(1).norm(dim=1).clamp(min=eps), delta)


@torch.no_grad()
def _broken(task: RetrievalTask, rows: Tensor, delta: Tensor, batch_size: int) -> float:
    """Share of the queries whose nearest item is wrong with a perturbation."""
    failed = []
    for batch in map(task.batch, rows.split(batch_size)):
        embeddings = batch.embed((batch.images + delta).clamp(0, 1))
        failed.append(batch.gallery.ranking(embeddings, batch.targets, 1).margin >= 0)
    return torch.cat(failed).double().mean().item()


def _digests(images: Tensor) -> Iterator[str]:
    """The hash of each image in 8 bits, which rounding does not change."""
    for image in (255 * images).round().to(torch.uint8).cpu():
        yield hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()


def _one(radii: tuple[float, ...]) -> tuple[float]:
    if len(radii) != 1:
        raise InputError(f"eps holds {len(radii)} radii; expected one. Learn a perturbation for each.")
    return (radii[0],)
