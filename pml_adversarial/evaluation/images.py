"""Labelled images, from tensors or from a data set, as pixels on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..errors import InputError
from ..training.pixels import PixelSpace

Images = tuple[Tensor, Tensor] | Dataset[Any]
"""``(images (N, C, H, W), labels (N,))``, or a data set of pairs ``(image (C, H, W), label)``; pixels in [0, 1]."""


class ImageSet:
    """Labelled images on a device, one or more. ``images[rows]`` reads some of them as pixels ``(n, C, H, W)``.

    ``labels`` are ``(N,)`` whole numbers. Messages name the images by their ``role``.
    """

    def __init__(self, images: Images, device: torch.device, role: str) -> None:
        self.device, self.role = device, role
        if isinstance(images, tuple | list):
            self._get, labels, count = self._from_tensors(images)
        elif hasattr(images, "__getitem__") and hasattr(images, "__len__") and not isinstance(images, Tensor):
            self._get, labels, count = self._from_dataset(images)
        else:
            raise InputError(
                f"{role} is {type(images).__name__}; expected (images, labels) or a data set of (image, label) pairs."
            )
        if not count:
            raise InputError(f"{role} holds no images.")
        if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
            raise InputError(
                f"{role} has labels {labels.dtype} of shape {tuple(labels.shape)} for {count} images; expected one "
                "whole number per image."
            )
        self.labels = labels.to(device).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Tensor:
        """Pixels ``(n, C, H, W)`` of some images; refuses what is not in [0, 1]."""
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows, device="cpu")
        try:
            return PixelSpace().to_pixels(self._get(index).detach().to(self.device))
        except InputError as error:
            shown = f"{index[0]} to {index[-1]}" if len(index) else "none"
            raise InputError(f"{self.role}, images {shown}: {error}") from error

    def _from_tensors(self, images: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, int]:
        if len(images) != 2 or not all(isinstance(part, Tensor) for part in images):
            found = ", ".join(type(part).__name__ for part in images)
            raise InputError(f"{self.role} is ({found}); expected two tensors, (images, labels).")
        pixels, labels = images
        return lambda rows: pixels[rows.to(pixels.device)], labels, len(pixels)

    def _from_dataset(self, dataset: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, int]:
        if isinstance(dataset, TensorDataset):
            return self._from_tensors(dataset.tensors)

        def get(rows: Tensor) -> Tensor:
            images = [dataset[row][0] for row in rows.tolist()]
            if not all(isinstance(image, Tensor) and image.shape == images[0].shape for image in images):
                kinds = {f"a tensor {tuple(i.shape)}" if isinstance(i, Tensor) else type(i).__name__ for i in images}
                found = ", ".join(sorted(kinds))
                raise InputError(f"found {found}; expected tensors (C, H, W) of one size. Add ToTensor and a resize.")
            return torch.stack(images)

        known = getattr(dataset, "targets", None)
        known = getattr(dataset, "labels", None) if known is None else known
        if known is None or len(known) != len(dataset) or getattr(dataset, "target_transform", None) is not None:
            known = self._labels_of(dataset)
        try:
            labels = torch.as_tensor(known)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.role} has labels such as {known[0]!r}; expected whole numbers.") from error
        return get, labels, len(dataset)

    def _labels_of(self, dataset: Any) -> list[Any]:
        """The labels of a data set that has no list of them: every image is read once."""
        try:
            return [dataset[row][1] for row in range(len(dataset))]
        except (IndexError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.role} is {type(dataset).__name__}, and reading (image, label) pairs from it failed with "
                f"{error!r}; expected (images, labels) or a data set of such pairs."
            ) from error
