"""Data to start with: handwritten digits that come with scikit-learn, split by class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True, eq=False)
class OpenSetSplit:
    """Images of classes to train on and of classes that are never seen in training.

    Attributes:
        train_images: ``(N, C, H, W)`` in [0, 1].
        train_labels: ``(N,)``.
        test_images: ``(T, C, H, W)`` in [0, 1].
        test_labels: ``(T,)``, no label in common with ``train_labels``.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(train_classes: Iterable[int] = range(5)) -> OpenSetSplit:
    """scikit-learn's 1797 handwritten digits, 8x8: some classes to train on, the others to test.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
    """
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    return split_by_class(pixels, torch.from_numpy(labels).long(), train_classes)


def split_by_class(images: Tensor, labels: Tensor, train_classes: Iterable[int]) -> OpenSetSplit:
    """Rows of ``train_classes`` to train on, all others to test.

    Raises:
        InputError: a class has no images, or one of the two parts has fewer than two classes.
    """
    wanted, present = set(train_classes), set(labels.tolist())
    if wanted - present:
        raise InputError(f"There are no images of the classes {sorted(wanted - present)}; found {sorted(present)}.")
    known = torch.isin(labels, torch.tensor(sorted(wanted)))
    for part, rows in (("train", known), ("test", ~known)):
        if len(labels[rows].unique()) < 2:
            raise InputError(
                f"The {part} part holds the classes {labels[rows].unique().tolist()}; expected at least two, since "
                "retrieval needs right and wrong items. Choose other train_classes."
            )
    return OpenSetSplit(images[known], labels[known], images[~known], labels[~known])
