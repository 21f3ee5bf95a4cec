"""An embedding seen as a classifier over its gallery, in which attacks on classifiers run unmodified."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .gallery import Embed, Gallery, Targets, unit

_POWER = {"Linf": torch.inf, "L2": 2.0}
_LOGIT_SPREAD = 10.0


class RetrievalClassifier(nn.Module):
    """The logit of a class is the scaled similarity to the class's most similar item, the query's own left out.

    It is right about a query exactly if R@1 is. Attacks ask about rows in any number and order, so a row is told by its
    clean image: it is the nearest, which is certain if no other lies within twice the attack's radius, see `apart`.

    Args:
        embed: images ``(n, ...)`` -> embeddings ``(n, D)``.
        gallery: what is searched.
        images: ``(Q, ...)`` the clean queries.
        targets: what they are to find.
        norm: "Linf" or "L2", by which a row is told.
        modules: the modules that ``embed`` runs through.
    """

    def __init__(
        self, embed: Embed, gallery: Gallery, images: Tensor, targets: Targets, norm: str, *modules: nn.Module
    ) -> None:
        super().__init__()
        self.device_marker = nn.Parameter(gallery.embeddings.new_empty(0), requires_grad=False)  # attacks look for it
        self.watched = nn.ModuleList(modules)
        self._embed, self._gallery, self._sought, self._power = embed, gallery, targets, _POWER[norm]
        self._images, self._clean = images, images.flatten(1)
        self.labels = torch.searchsorted(gallery.classes, targets.labels)
        self.scale = 1.0
        with torch.no_grad():
            self.scale = _LOGIT_SPREAD / self(images).std(1).median().clamp(min=1e-6).item()
        self.training = False  # torchattacks "restores" train mode, in all submodules, where it found it

    def train(self, mode: bool = True) -> RetrievalClassifier:
        """Nothing: the model's mode is not an attack's to change, and exported programs refuse to be asked."""
        return self

    @property
    def num_classes(self) -> int:
        """Classes of the gallery."""
        return len(self._gallery.classes)

    def wrong_classes(self, nth: int) -> Tensor:
        """Labels ``(Q,)``: of each clean query the most similar wrong class, or the ``nth`` after it, if there are."""
        with torch.no_grad():
            wrong = self(self._images).scatter(1, self.labels.unsqueeze(1), -torch.inf)
        order = wrong.argsort(dim=1, descending=True)
        return self._gallery.classes[order[:, min(nth, self.num_classes - 2)]]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, num_classes)``.

        Args:
            images: ``(n, ...)``, each within the attack's radius of one of the clean queries.
        """
        embeddings = self._embed(images.to(self._images.dtype))  # torchattacks knows float32 alone
        similarities = unit(embeddings) @ self._gallery.embeddings.T
        own = self._own(images)
        if own is not None:
            place = torch.zeros_like(similarities, dtype=torch.bool)
            place.scatter_(1, own.clamp(min=0).unsqueeze(1), (own >= 0).unsqueeze(1))
            similarities = similarities.masked_fill(place, -1.0)  # no less than any similarity
        columns = self._gallery.columns.expand_as(similarities)
        lowest = similarities.new_full((len(images), self.num_classes), -1.0)
        logits = self.scale * lowest.scatter_reduce(1, columns, similarities, "amax")
        return logits.to(torch.promote_types(images.dtype, torch.float32))

    def _own(self, images: Tensor) -> Tensor | None:
        if bool((self._sought.own < 0).all()):
            return None
        with torch.no_grad():
            return self._sought.own[_distances(images, self._clean, self._power).argmin(1)]


def apart(images: Tensor, targets: Targets, eps: float, norm: str) -> list[Tensor]:
    """Rows in groups in which no image lies within ``2 * eps`` of another, so that perturbed ones are told apart.

    Exact duplicates of one label may share a group: which of them a row is makes no difference to what it finds. If
    no query is in the gallery, nothing need be told apart.
    """
    if bool((targets.own < 0).all()):
        return [torch.arange(len(images), device=images.device)]
    distances = _distances(images, images.flatten(1), _POWER[norm])
    same = (distances == 0) & (targets.labels.unsqueeze(1) == targets.labels)
    conflict = ((distances <= 2 * eps * (1 + 1e-4)) & ~same).cpu()
    groups: list[list[int]] = []
    for row in range(len(images)):
        free = next((group for group in groups if not conflict[row, group].any()), None)
        if free is None:
            groups.append([row])
        else:
            free.append(row)
    return [torch.tensor(group, device=images.device) for group in groups]


def _distances(images: Tensor, others: Tensor, power: float) -> Tensor:
    # not by products, which lose what lies between near images; not in half precision, which cdist does not know
    exact = "donot_use_mm_for_euclid_dist"
    wide = others.dtype if others.dtype == torch.float64 else torch.float32
    return torch.cdist(images.flatten(1).to(wide), others.to(wide), power, compute_mode=exact)
