"""An embedding model as a classifier over the classes of its gallery, so that attacks on classifiers run on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .embedder import Embed
from .gallery import Gallery, Targets

_POWER = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}  # in the other norms, groups hold one query each
_LOGIT_SPREAD = 10.0


class RetrievalClassifier(nn.Module):
    """The logit of a class is the scaled similarity to the most similar item of the class.

    A query's own item, and what it ignores, is left out, so the classifier is right about a query exactly if its
    nearest item is right. Where labels do not say what is right, all right items of a query form one more class.
    Attacks call the classifier with rows in any number and order. The query behind a row is the one whose clean image
    is nearest; this is certain if no other query lies within twice the attack's radius, see `separable_groups`.

    Args:
        embed: images ``(n, ...)`` -> embeddings ``(n, D)``.
        gallery: what is searched.
        images: ``(Q, ...)`` the clean queries.
        targets: what the queries should find.
        norm: in which distances between images are measured. In "L0" and "patch" there is one query.
        modules: the modules that ``embed`` runs.

    Attributes:
        labels: ``(Q,)`` the right class of each query.
        num_classes: how many classes there are.
        scale: factor of the similarities. At it, a query's logits have a standard deviation of about 10.
    """

    def __init__(
        self, embed: Embed, gallery: Gallery, images: Tensor, targets: Targets, norm: str, *modules: nn.Module
    ) -> None:
        super().__init__()
        self.device_marker = nn.Parameter(gallery.embeddings.new_empty(0), requires_grad=False)  # attacks look for it
        self.watched = nn.ModuleList(modules)
        self._embed, self._gallery, self._targets, self._power = embed, gallery, targets, _POWER.get(norm, 2.0)
        self._images, self._clean = images, images.flatten(1)
        by_label, count = targets.relevant is None, len(gallery.classes)
        self.num_classes = count if by_label else count + 1
        self.labels = (
            torch.searchsorted(gallery.classes, targets.labels) if by_label else torch.full_like(targets.labels, count)
        )
        self.scale = 1.0
        with torch.no_grad():
            self.scale = _LOGIT_SPREAD / self(images).std(1).median().clamp(min=1e-6).item()
        self.training = False  # torchattacks "restores" train mode, in all submodules, where it found it

    def train(self, mode: bool = True) -> RetrievalClassifier:
        """Changes nothing: an attack must not change the mode of the model, and exported programs refuse it."""
        return self

    def wrong_classes(self, nth: int) -> Tensor:
        """Labels ``(Q,)``: each clean query's most similar wrong class (nth 0), the second most similar (nth 1), ..."""
        with torch.no_grad():
            wrong = self._logits(self._images, self._targets).scatter(1, self.labels.unsqueeze(1), -torch.inf)
        order = wrong[:, : len(self._gallery.classes)].argsort(dim=1, descending=True)
        return self._gallery.classes[order[:, min(nth, self.num_classes - 2)]]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, num_classes)``.

        Args:
            images: ``(n, ...)``, each within the attack's radius of one of the clean queries; in any shape of as many
                values.
        """
        images = images.reshape(len(images), *self._images.shape[1:])
        with torch.no_grad():
            alike = self._targets.are_alike
            nearest = None if alike else _distances(images, self._clean, self._power).argmin(1)
        return self._logits(images, self._targets if nearest is None else self._targets[nearest])

    def _logits(self, images: Tensor, targets: Targets) -> Tensor:
        """Logits of images, each of which belongs to one of the targets; targets that are alike need not correspond."""
        embeddings = self._embed(images.to(self._images.dtype))  # torchattacks gives float32 only
        similarities = self._gallery.similarities(embeddings)
        low = similarities.detach().amin(1, keepdim=True)
        columns = self._gallery.columns.expand_as(similarities)
        if not targets.are_alike:
            similarities = torch.where(targets.is_left_out(slice(0, len(self._gallery))), low, similarities)
            if targets.relevant is not None:
                columns = torch.where(targets.relevant, self.num_classes - 1, columns)
        lowest = low.expand(-1, self.num_classes)
        logits = self.scale * lowest.scatter_reduce(1, columns, similarities, "amax")
        return logits.to(torch.promote_types(images.dtype, torch.float32))


def separable_groups(images: Tensor, targets: Targets, eps: float, norm: str) -> list[Tensor]:
    """Splits queries into groups whose images stay distinguishable when they are perturbed.

    Within a group, no image ``(Q, ...)`` lies within ``2 * eps`` of another. Exact duplicates with one label may share
    a group, because both find the same. If all queries search the same items, they form one group:
    `RetrievalClassifier` need not distinguish them. In "L0" and "patch" each query is a group of its own.

    Returns:
        Indices of the queries of each group.
    """
    if targets.are_alike:
        return [torch.arange(len(images), device=images.device)]
    if norm not in _POWER:
        return list(torch.arange(len(images), device=images.device).split(1))
    distances = _distances(images, images.flatten(1), _POWER[norm])
    same = (distances == 0) & (targets.labels.unsqueeze(1) == targets.labels)
    if targets.ignored is not None or targets.relevant is not None:
        same = torch.eye(len(images), dtype=torch.bool, device=images.device)
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
    # matrix products would round away small distances; cdist does not take half precision
    exact = "donot_use_mm_for_euclid_dist"
    wide = others.dtype if others.dtype == torch.float64 else torch.float32
    return torch.cdist(images.flatten(1).to(wide), others.to(wide), power, compute_mode=exact)
