"""An embedding seen as a classifier over its gallery, in which attacks on classifiers run unmodified."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .retrieval import Embed, Gallery, Sought, unit

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
        sought: what they are to find.
        norm: "Linf" or "L2", by which a row is told.
        modules: the modules that ``embed`` runs through.
    """

    def __init__(
        self, embed: Embed, gallery: Gallery, images: Tensor, sought: Sought, norm: str, *modules: nn.Module
    ) -> None:
        super().__init__()
        self.device_marker = nn.Parameter(gallery.embeddings.new_empty(0), requires_grad=False)  # attacks look for it
        self.watched = nn.ModuleList(modules)
        self._embed, self._gallery, self._sought, self._power = embed, gallery, sought, _POWER[norm]
        self._clean = images.flatten(1)
        self.labels = torch.searchsorted(gallery.classes, sought.labels)
        self.scale = 1.0
        with torch.no_grad():
            self.scale = _LOGIT_SPREAD / self(images).std(1).median().clamp(min=1e-6).item()
        self.training = False  # torchattacks "restores" train mode, in all submodules, where it found it

    @property
    def num_classes(self) -> int:
        """Classes of the gallery."""
        return len(self._gallery.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, num_classes)``.

        Args:
            images: ``(n, ...)``, each within the attack's radius of one of the clean queries.
        """
        similarities = unit(self._embed(images)) @ self._gallery.embeddings.T
        own = self._own(images)
        if own is not None:
            place = torch.zeros_like(similarities, dtype=torch.bool)
            place.scatter_(1, own.clamp(min=0).unsqueeze(1), (own >= 0).unsqueeze(1))
            similarities = similarities.masked_fill(place, -1.0)  # no less than any similarity
        columns = self._gallery.columns.expand_as(similarities)
        lowest = similarities.new_full((len(images), self.num_classes), -1.0)
        return self.scale * lowest.scatter_reduce(1, columns, similarities, "amax")

    def _own(self, images: Tensor) -> Tensor | None:
        if bool((self._sought.own < 0).all()):
            return None
        with torch.no_grad():
            return self._sought.own[torch.cdist(images.flatten(1), self._clean, self._power).argmin(1)]


def apart(images: Tensor, eps: float, norm: str) -> list[Tensor]:
    """Rows in groups in which no image lies within ``2 * eps`` of another, so that perturbed ones are told apart.

    Exact duplicates may share a group: which of them a row is makes no difference to what it finds.
    """
    flat = images.flatten(1)
    distances = torch.cdist(flat, flat, _POWER[norm])
    conflict = ((distances > 0) & (distances <= 2 * eps * (1 + 1e-4))).cpu()
    groups: list[list[int]] = []
    for row in range(len(images)):
        free = next((group for group in groups if not conflict[row, group].any()), None)
        if free is None:
            groups.append([row])
        else:
            free.append(row)
    return [torch.tensor(group, device=images.device) for group in groups]
