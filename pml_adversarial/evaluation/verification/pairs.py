"""Pairs of images for verification: given, listed by their indices, or drawn from labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ...attacks.checks import check_whole
from ...errors import InputError
from ...training.isolation import random_stream
from ..retrieval.images import ImageSet
from ..retrieval.options import JUNK

Pairs = Any
"""Pairs of images with pixels in [0, 1]:

- ``(first images, second images, same (P,))``, as tensors or arrays; ``same`` is True for genuine pairs;
- a data set of items ``(first image, second image, same)``, such as torchvision's ``LFWPairs``;
- labelled images, see `forms.Images`, together with ``indices``, or to draw pairs from. Images of one label make a
  genuine pair.
"""


@dataclass(frozen=True)
class PairChoice:
    """Which pairs of labelled images are taken: options of `evaluate_verification`, see there."""

    indices: Sequence[Sequence[int]] | Tensor | None = None
    genuine: int | None = None
    impostors: int | None = None
    junk_label: int | None = JUNK


class PairSet:
    """Genuine and impostor pairs of images, one of each at least.

    Attributes:
        first: the set of the first images.
        second: the set of the second images, which may be the same set.
        indices: ``(P, 2)`` of each pair, its index in ``first`` and in ``second``.
        same: ``(P,)`` bool, whether a pair is genuine.
        protocol: where the pairs come from, in words.
        is_given: whether ``same`` was given, and does not come from labels of images.
        notes: what a reader of the report has to know.
    """

    def __init__(
        self,
        pairs: Pairs,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        choice: PairChoice | None = None,
        seed: int = 0,
    ) -> None:
        choice = PairChoice() if choice is None else choice
        self.notes: list[str] = []
        sides = _sides(pairs)
        self.is_given = sides is not None
        if sides is None:
            self.first = self.second = ImageSet(pairs, device, "pairs", dtype)
            self._choose(choice, seed)
        else:
            _check_unchosen(choice)
            self.first, self.second = (
                ImageSet(side, device, name, dtype)
                for side, name in zip(sides, ("first images", "second images"), strict=True)
            )
            self._take_all()
        if not (self.first.has_images and self.second.has_images):
            raise InputError("pairs holds labels only; expected images, as they are what is compared and attacked.")
        self._check_kinds()

    def __len__(self) -> int:
        return len(self.same)

    @property
    def sets(self) -> tuple[ImageSet, ...]:
        """The different sets."""
        return (self.first,) if self.first is self.second else (self.first, self.second)

    def most_uses(self) -> int:
        """In how many pairs the image is that is in most of them; 1 where it is not known which images are equal."""
        if self.first is not self.second:
            return 1
        return int(self.indices.flatten().bincount().amax())

    def _take_all(self) -> None:
        self.protocol = "given pairs"
        self.same = _as_flags(self.first)
        rows = torch.arange(len(self.same))
        self.indices = torch.stack([rows, rows], 1)

    def _choose(self, choice: PairChoice, seed: int) -> None:
        labels = self.first.labels.cpu()
        if self.first.label_sets is not None:
            raise InputError("pairs has several labels per image; expected one, so that a pair is genuine or is not.")
        if choice.indices is None:
            self.protocol = "drawn pairs"
            junk = choice.junk_label
            is_junk = torch.zeros_like(labels, dtype=torch.bool) if junk is None else labels == junk
            named = (~is_junk).nonzero().squeeze(1)
            if is_junk.any():
                self.notes.append(f"{int(is_junk.sum())} images of the label {junk} are junk and in no pair")
            self.indices = named[draw_pairs(labels[named], choice.genuine, choice.impostors, seed)]
        else:
            _check_unchosen(PairChoice(None, choice.genuine, choice.impostors))
            self.protocol = "listed pairs"
            self.indices = _as_indices(choice.indices, len(labels))
        one, other = labels[self.indices].T
        self.same = (one == other).to(self.first.labels.device)
        for name, asked, kind in (("genuine", choice.genuine, True), ("impostor", choice.impostors, False)):
            found = int((self.same == kind).sum())
            if asked is not None and found < asked:
                self.notes.append(f"{asked} {name} pairs were asked for, the images give {found}")

    def _check_kinds(self) -> None:
        genuine = int(self.same.sum())
        if not 0 < genuine < len(self.same):
            raise InputError(
                f"There are {genuine} genuine and {len(self.same) - genuine} impostor pairs; expected one of each at "
                f"least.{''.join(f' Note: {note}.' for note in self.notes)}"
            )


def draw_pairs(labels: Tensor, genuine: int | None = None, impostors: int | None = None, seed: int = 0) -> Tensor:
    """Indices ``(P, 2)`` of different pairs of labelled images, genuine ones first, without an image beside itself.

    Which image of a pair is the first is drawn too.

    Args:
        labels: ``(N,)``.
        genuine: how many pairs of one label; None: all.
        impostors: how many pairs of two labels; None: as many as there are genuine ones.
        seed: of the draw.

    Raises:
        InputError: a number is not positive.

    >>> draw_pairs(torch.tensor([3, 3, 5]), impostors=2).sort(1).values.tolist()
    [[0, 1], [0, 2], [1, 2]]
    """
    for name, count in (("genuine", genuine), ("impostors", impostors)):
        if count is not None:
            check_whole(name, count, hint=", or None")
    with random_stream(seed, -2):
        same = _Numbered(labels.cpu(), True).drawn(genuine)
        other = _Numbered(labels.cpu(), False).drawn(len(same) if impostors is None else impostors)
        found = torch.cat([same, other])
        swapped = torch.rand(len(found)) < 0.5
    return torch.where(swapped.unsqueeze(1), found.flip(1), found)


class _Numbered:
    """All pairs of images of one label, or of two labels, each in both orders, by number; none of them is stored."""

    def __init__(self, labels: Tensor, same: bool) -> None:
        self.order, self.same = labels.argsort(stable=True), same  # images of one label stand beside each other
        column, sizes = labels[self.order].unique_consecutive(return_inverse=True, return_counts=True)[1:]
        self.size, self.begin = sizes[column], (sizes.cumsum(0) - sizes)[column]  # of the images with its label
        partners = self.size - 1 if same else len(labels) - self.size
        self.ends = partners.cumsum(0)
        self.starts = self.ends - partners

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """``(n, 2)`` indices of the images, of each pair the smaller one first."""
        one = torch.searchsorted(self.ends, numbers, right=True)
        other = numbers - self.starts[one]
        if self.same:
            other = other + self.begin[one]
            other = other + (other >= one)
        else:
            other = other + (other >= self.begin[one]) * self.size[one]
        return self.order[torch.stack([one, other], 1)].sort(1).values

    def drawn(self, count: int | None) -> Tensor:
        """``(n, 2)`` different pairs, at random; all, if there are not more than ``count``, or if it is None."""
        if count is None or count >= len(self) // 2:
            return self[torch.arange(len(self))].unique(dim=0)
        found = self.order.new_zeros(0, 2)
        while len(found) < count:
            found = torch.cat([found, self[torch.randint(len(self), (count,))]]).unique(dim=0)
        return found[torch.randperm(len(found))[:count].sort().values]


# What users pass.


def _sides(pairs: Pairs) -> tuple[Any, Any] | None:
    """First and second images, both with ``same`` as labels; None: these are labelled images."""
    if type(pairs) is TensorDataset and len(pairs.tensors) == 3 and pairs.tensors[1].ndim > 1:
        pairs = pairs.tensors
    if isinstance(pairs, tuple | list) and len(pairs) == 3 and not _holds_pairs(pairs):
        first, second, same = pairs
        if isinstance(same, Tensor) and same.is_floating_point() and bool(((same == 0) | (same == 1)).all()):
            same = same != 0  # as a loss of binary labels takes them
        return (first, same), (second, same)
    if isinstance(pairs, DataLoader) and not isinstance(pairs.dataset, tuple | list) and _holds_pairs(pairs.dataset):
        raise InputError("pairs is a data loader of pairs; expected their data set. Pass loader.dataset.")
    if _holds_pairs(pairs):
        return _Side(pairs, 0), _Side(pairs, 1)
    return None


def _holds_pairs(pairs: Any) -> bool:
    """Whether this is a data set of items ``(first image, second image, same)``."""
    is_list = isinstance(pairs, list) and all(isinstance(item, tuple) for item in pairs)
    if not is_list and (isinstance(pairs, tuple | list | Tensor | DataLoader) or not hasattr(pairs, "__getitem__")):
        return False
    if not hasattr(pairs, "__len__") or not len(pairs):
        return False
    try:
        item = pairs[0]
    except Exception:  # such as KeyError, of a dict
        return False
    return isinstance(item, tuple | list) and len(item) == 3 and getattr(item[1], "ndim", 0) > 1


class _Side:
    """One of both images of each item of a data set of pairs, with ``same`` as its label."""

    def __init__(self, pairs: Any, place: int) -> None:
        self._pairs, self._place = pairs, place
        self.targets = getattr(pairs, "targets", None)
        self.target_transform = getattr(pairs, "target_transform", None)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        item = self._pairs[row]
        return item[self._place], int(item[2])


def _as_flags(images: ImageSet) -> Tensor:
    labels = images.labels
    if images.label_sets is not None or not bool(((labels == 0) | (labels == 1)).all()):
        raise InputError(
            f"same holds {labels.unique().tolist()[:8]}; expected for each pair True (or 1) if it is genuine, False "
            "(or 0) if not. Labelled images are (images, labels), with indices=(P, 2)."
        )
    return labels.bool()


def _as_indices(indices: Any, total: int) -> Tensor:
    try:
        found = torch.as_tensor(indices if hasattr(indices, "dtype") else [list(pair) for pair in indices])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"indices={indices!r}; expected pairs of whole numbers, in a list or a tensor.") from error
    whole = not (found.dtype == torch.bool or found.is_floating_point() or found.is_complex())
    if found.ndim != 2 or found.shape[1] != 2 or not whole or not bool(((found >= 0) & (found < total)).all()):
        shown = f"values from {found.min()} to {found.max()}" if found.numel() else "no values"
        raise InputError(
            f"indices is {found.dtype} of shape {tuple(found.shape)} with {shown}; expected (P, 2) whole numbers from "
            f"0 to {total - 1}, the indices of the first and of the second image of each pair."
        )
    return found.detach().cpu().long()


def _check_unchosen(choice: PairChoice) -> None:
    nothing = PairChoice()
    given = [name for name, value in vars(choice).items() if value is not getattr(nothing, name)]
    if given:
        raise InputError(
            f"{' and '.join(given)} would change nothing, as the pairs are given; expected labelled images, from which "
            "pairs are drawn. Leave it out."
        )
