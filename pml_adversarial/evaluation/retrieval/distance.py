"""How embeddings are compared: by cosine, Euclidean distance, inner product, or any distance of PML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...training.numeric import at_least_float, unit_length

_SAMPLE = 64  # items from which the size of a distance of PML is estimated
_SMALLEST = 1e-30  # of squared distances: below it, the square root has no gradient


class Distance:
    """Compares embeddings. Similarities are higher for nearer ones; a distance counts with a minus sign.

    Attributes:
        name: in reports.
        has_unit_length: whether embeddings are divided by their length before they are compared.
    """

    name: str
    has_unit_length = False

    def vectors(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` as they are compared: in single precision at least, of length 1 where that is asked."""
        return unit_length(embeddings) if self.has_unit_length else at_least_float(embeddings)

    def query_vectors(self, embeddings: Tensor) -> Tensor:
        """The same for queries that are searched for. What does not change their ranking may be left out."""
        return self.vectors(embeddings)

    def to_all(self, one: Tensor, other: Tensor) -> Tensor:
        """Similarities ``(N, M)`` of each of the vectors ``(N, D)`` to each of ``(M, D)``."""
        raise NotImplementedError

    def to_each(self, one: Tensor, other: Tensor) -> Tensor:
        """Similarities ``(N,)`` of vectors ``(N, D)`` to ``(N, D)``, row by row."""
        raise NotImplementedError

    def scale(self, vectors: Tensor) -> float:
        """The size of what is rounded when vectors ``(M, D)`` are compared."""
        return float(vectors.double().square().sum(1).mean().sqrt())


class Cosine(Distance):
    """Cosine similarity."""

    name = "cosine"
    has_unit_length = True

    def to_all(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Distance.to_all`."""
        return one @ other.T

    def to_each(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Distance.to_each`."""
        return (one * other).sum(1)

    def scale(self, vectors: Tensor) -> float:
        """1, the length of the vectors."""
        return 1.0


class InnerProduct(Distance):
    """Inner product. The length of a query changes no ranking, so it is left out of a search."""

    name = "inner_product"

    def query_vectors(self, embeddings: Tensor) -> Tensor:
        """See `Distance.query_vectors`."""
        return unit_length(embeddings)

    def to_all(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Distance.to_all`."""
        return one @ other.T

    def to_each(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Distance.to_each`."""
        return (one * other).sum(1)


class Euclidean(Distance):
    """Euclidean distance, of embeddings as they are or divided by their length."""

    def __init__(self, normalized: bool = False) -> None:
        self.has_unit_length = normalized
        self.name = "normalized_euclidean" if normalized else "euclidean"

    def to_all(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Distance.to_all`. Products are in double precision, which rounds no small distance away."""
        wide, items = one.double(), other.double()
        squares = wide.square().sum(1, keepdim=True) + items.square().sum(1) - 2 * wide @ items.T
        return -squares.clamp(min=_SMALLEST).sqrt().to(one.dtype)

    def to_each(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Distance.to_each`."""
        return -(one - other).norm(dim=1)


@dataclass(frozen=True, eq=False)
class PMLDistance(Distance):
    """A distance object of PML, called as PML's losses call it: in double precision, or in that of its own weights."""

    distance: Any

    @property
    def name(self) -> str:  # type: ignore[override]
        """The class and its options."""
        options = ", ".join(f"{key}={getattr(self.distance, key)!r}" for key in ("normalize_embeddings", "p", "power"))
        return f"{type(self.distance).__name__}({options})"

    def vectors(self, embeddings: Tensor) -> Tensor:
        """See `Distance.vectors`."""
        wide = at_least_float(embeddings)
        return self.distance.maybe_normalize(wide) if self.distance.normalize_embeddings else wide

    def to_all(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Distance.to_all`."""
        wide = next((weight.dtype for weight in self.distance.parameters()), torch.double)
        found: Tensor = self.distance(one.to(wide), other.to(wide)).to(one.dtype)
        return found if self.distance.is_inverted else -found

    def to_each(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Distance.to_each`."""
        return self.to_all(one, other).diagonal()

    def scale(self, vectors: Tensor) -> float:
        """The largest similarity within a few of the vectors."""
        few = vectors[torch.linspace(0, len(vectors) - 1, min(_SAMPLE, len(vectors)), dtype=torch.float64).long()]
        return float(self.to_all(few, few).abs().amax())


_BY_NAME: dict[str, Callable[[], Distance]] = {
    "cosine": Cosine,
    "euclidean": Euclidean,
    "normalized_euclidean": lambda: Euclidean(normalized=True),
    "inner_product": InnerProduct,
}
DISTANCES = tuple(_BY_NAME)  #: Names that ``distance=`` takes.


def find_distance(distance: Any) -> Distance:
    """A distance from its name, or from a distance object of PML.

    Raises:
        InputError: it is something else.
    """
    if isinstance(distance, Distance):
        return distance
    if isinstance(distance, str) and distance in _BY_NAME:
        return _BY_NAME[distance]()
    from pytorch_metric_learning import distances

    is_plain = getattr(distance, "p", None) == 2 and getattr(distance, "power", None) == 1
    if is_plain and type(distance) in (distances.CosineSimilarity, distances.DotProductSimilarity):
        return Cosine() if distance.normalize_embeddings else InnerProduct()
    if is_plain and type(distance) is distances.LpDistance:
        return Euclidean(bool(distance.normalize_embeddings))
    if isinstance(distance, distances.BaseDistance) and not isinstance(distance, distances.BatchedDistance):
        return PMLDistance(distance)
    raise InputError(
        f"distance={distance!r}; expected {', '.join(map(repr, DISTANCES))}, or a distance object of "
        "pytorch-metric-learning that gives a matrix, such as LpDistance(normalize_embeddings=False)."
    )


def check_unit_length(distance: Any, what: str) -> None:
    """Refuses a distance by which search is not that of cosine similarity.

    Raises:
        InputError: ``what`` is defined for embeddings of length 1 alone.
    """
    found = find_distance(distance)
    if not isinstance(found, Cosine | Euclidean) or not found.has_unit_length:
        raise InputError(
            f"distance={found.name!r}; expected 'cosine' or 'normalized_euclidean', which rank alike: {what} for "
            "embeddings of length 1. For other distances there is evaluate_robustness."
        )
