"""Attacks with images that were made elsewhere: saved ones, or those that an attack makes on a surrogate model.

They ask the attacked model nothing, so no trick of the model can mislead them. Adversarial images of one model often
fool another one (Papernot et al., "Transferability in Machine Learning", arXiv 1605.07277). Where they break queries
that attacks with gradients do not break, the gradients are of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...attacks.ball import project, radius_text
from ...attacks.checks import check_steps, check_whole
from ...attacks.objective import Score
from ...errors import InputError
from ...training.modules import modules_reached_by
from ...training.pixels import Bounds, Normalization
from ..retrieval.batch import QueryBatch
from ..retrieval.embedder import Embedder
from ..retrieval.gallery import Gallery
from ..retrieval.images import ImageSet
from ..retrieval.options import digest_of
from ..retrieval.task import RetrievalTask
from .gradients import gradient_attack, margin_score
from .kinds import Perturb, QueryAttack

_PROBED = 16  # images by which it is found out whether the surrogate answers at random
_TOGETHER = 128  # images that are read or embedded at once
_ROUNDING = 1e-6  # of pixels; a larger change by the projection is no rounding


def transferred(images: Any, name: str = "transferred") -> QueryAttack:
    """Adversarial images that exist already, as an attack.

    Each image is moved into the budget, as far as it lies outside. The report says of how many images this is true, and
    how much it changed them, for it makes them weaker.

    Args:
        images: ``(Q, C, H, W)``, one for each of all queries, in their order, also of queries that are not in
            ``subset``; or one for each of those that are evaluated, such as ``report.attacked[eps]`` of another model.
            They are pixels in [0, 1], or normalised as the queries may be.
        name: of the attack in reports.

    Raises:
        InputError: ``images`` is no tensor or array. In the evaluation: they do not fit the queries.
    """
    if not hasattr(images, "shape") or len(images.shape) < 2:
        raise InputError(
            f"images is {type(images).__name__} {tuple(getattr(images, 'shape', ()))}; expected a tensor or an array "
            "(Q, C, H, W), one image for each query."
        )
    given = torch.as_tensor(images).detach()
    return QueryAttack(name, _Saved(given, digest_of([given])), black_box=True, passes=1)


@dataclass(frozen=True, eq=False)
class _Saved:
    """The image of each query; ``images[rows]`` reads some of them as pixels."""

    images: Tensor | ImageSet
    digest: str  # tells evaluations apart

    def __call__(self, batch: QueryBatch, eps: float, restart: int) -> Tensor:
        return self.images[batch.rows.to("cpu")].to(batch.images)

    def prepared(self, task: RetrievalTask, rows: Tensor, radii: Sequence[float]) -> tuple[Perturb, list[str]]:
        """See `Prepares`. The images are read as the queries are."""
        expected = len(task.queries), *task.queries[rows[:1]].shape[1:]
        if isinstance(self.images, Tensor) and tuple(self.images.shape) == (len(rows), *expected[1:]) != expected:
            everything = task.queries[:].to(self.images, copy=True)
            everything[rows.to(everything.device)] = self.images
            return replace(self, images=everything).prepared(task, rows, radii)
        if tuple(self.images.shape) != expected:  # type: ignore[union-attr]
            raise InputError(
                f"The transferred images are {tuple(self.images.shape)}, but the queries are {expected}. "  # type: ignore[union-attr]
                f"Expected one image for each of all queries, or for each of the {len(rows)} that are evaluated, in "
                "their order and of their size."
            )
        queries = task.queries
        images = ImageSet((self.images, queries.labels), queries.device, "transferred images", queries.dtype)
        said = images.check(task.embed.space)
        notes = [] if said is None else [said]
        return replace(self, images=images), notes + list(_outside(images, task, rows, radii))


def _outside(images: ImageSet, task: RetrievalTask, rows: Tensor, radii: Sequence[float]) -> Iterator[str]:
    """For each eps at which images lie outside of the budget: of how many this is true, and by how much."""
    for eps in radii:
        changes = torch.cat(
            [_change(images[part], task.queries[part], eps, task.norm) for part in rows.cpu().split(_TOGETHER)]
        )
        count = int((changes > _ROUNDING).sum())
        if count:
            yield (
                f"{count} of {len(rows)} images lie outside of eps {radius_text(eps, task.norm)}; moving them inside "
                f"changed pixels by up to {float(changes.max()):.2g}"
            )


def _change(images: Tensor, clean: Tensor, eps: float, norm: str) -> Tensor:
    """``(n,)`` the largest change of a pixel by the projection of images ``(n, C, H, W)``."""
    return (project(images, clean, eps, norm) - images).flatten(1).abs().amax(1)


def transfer_attack(
    surrogate: Any,
    *,
    normalization: Normalization | None = None,
    bounds: Bounds | None = None,
    score: Callable[[QueryBatch, int], Score] = margin_score,
    steps: int = 50,
    restarts: int = 1,
    name: str = "transfer",
) -> QueryAttack:
    """An attack on a surrogate model, whose images are handed to the attacked model.

    The surrogate embeds the clean queries and the images of the gallery by itself. The attacked model is asked nothing,
    and passes of the surrogate are not counted.

    Args:
        surrogate: what the attacker knows, in the forms of `evaluate_robustness`, and on the same device; it may give
            embeddings of another dimension.
        normalization: ``(mean, std)`` if the surrogate takes normalised inputs.
        bounds: ``(low, high)`` of the surrogate's inputs if they are no images.
        score: what is raised on the surrogate, such as `gradients.margin_score` or `gradients.shift_score`.
        steps: gradient steps of each run.
        restarts: runs from different random starts.
        name: of the attack in reports.

    Raises:
        InputError: an option cannot be used. In the evaluation: the surrogate cannot embed the images, has no gradient,
            or is on another device.
    """
    check_steps(steps, error=InputError)
    check_whole("restarts", restarts)
    embed = Embedder(surrogate, normalization, bounds)
    modules = embed.modules or modules_reached_by(surrogate)
    tensors = (value for module in modules for value in module.state_dict().values())
    digest = digest_of(tensor for tensor in tensors if isinstance(tensor, Tensor))
    perturb = _OnSurrogate(gradient_attack(score, steps), embed, digest)
    return QueryAttack(name, perturb, restarts, black_box=True, needs_items=True, passes=1)


@dataclass(frozen=True, eq=False)
class _OnSurrogate:
    """Makes an attack on another model in place of the attacked one."""

    attack: Perturb
    embed: Embedder
    digest: str  # tells evaluations apart
    galleries: WeakKeyDictionary[Gallery, Gallery] = field(default_factory=WeakKeyDictionary)

    def __call__(self, batch: QueryBatch, eps: float, restart: int) -> Tensor:
        if batch.gallery not in self.galleries:
            self._check(batch.images)
            self.galleries[batch.gallery] = self._embedded(batch)
        with self.embed.isolated():
            with torch.no_grad():
                clean = self.embed(batch.images)
            gallery = self.galleries[batch.gallery]
            there = replace(batch, embed=self.embed, modules=self.embed.modules, gallery=gallery, clean=clean)
            return self.attack(replace(there, is_random=self.embed.is_random), eps, restart)

    def _check(self, images: Tensor) -> None:
        self.embed.probe(images[:1], images.dtype)
        self.embed.check_gradient(images[:1])
        self.embed.probe_randomness(images[:_PROBED])
        if self.embed.device != images.device:
            raise InputError(
                f"The surrogate is on {self.embed.device}, the images are on {images.device}; expected the same "
                f"device. Move it there, surrogate.to({str(images.device)!r})."
            )

    @torch.no_grad()
    def _embedded(self, batch: QueryBatch) -> Gallery:
        """The items of the gallery as the surrogate embeds them."""
        items = torch.arange(len(batch.gallery)).split(_TOGETHER)
        with self.embed.isolated():
            embeddings = torch.cat([self.embed(batch.pixels_of(part)) for part in items])
        return Gallery(embeddings, batch.gallery.labels, distance=batch.gallery.distance)
