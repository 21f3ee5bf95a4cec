"""Labelled images, from tensors, arrays, a data set or a data loader, as pixels on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ...errors import InputError
from ...training.pixels import PixelSpace, is_overshoot

Images = Any
"""Labelled images with pixels in [0, 1]:

- ``(images (N, C, H, W), labels (N,))``, as tensors or arrays. Labels ``(N, L)`` of 0 and 1 say which of L labels each
  image has; then images that share a label are right for each other.
- a data set of items ``(image (C, H, W), label)``, or of dicts that have an image and a label;
- a data loader of such a data set, which is read in the order of the data set;
- as a gallery, ``(None, labels)``: items that are known by their embeddings alone.
"""

_IMAGE_KEYS = ("image", "images", "img", "pixel_values", "pixels", "input", "inputs", "x", "data")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class", "class_id")
_EXPECTED = "expected (images, labels) or a data set of such pairs, also in a data loader"
_SAMPLE = 16  # images that are read twice

Read = Callable[[Tensor], Any]
"""Indices ``(n,)`` -> images ``(n, C, H, W)``."""


class ImageSet:
    """Labelled images on a device, one or more. ``images[rows]`` reads some of them as pixels ``(n, C, H, W)``.

    Attributes:
        labels: ``(N,)`` whole numbers; with several labels per image, a number for each combination.
        label_sets: ``(N, L)`` bool, which labels each image has; None: each has one.
        has_images: False: only labels are known.
        dtype: of the pixels.
        given_dtype: of the images that were read last, as they are given.
        space: undoes the normalisation of the data set; set by `check`.
    """

    def __init__(self, images: Images, device: torch.device, role: str, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.role, self.dtype = device, role, dtype
        self.given_dtype = dtype
        self.space, self.has_images, self.is_read_anew = PixelSpace(), True, False
        self._get, labels, count = self._from(images)
        if not count:
            raise InputError(f"{role} holds no images.")
        self.label_sets = self._label_sets(labels, count)
        if self.label_sets is not None:
            labels = self.label_sets.unique(dim=0, return_inverse=True)[1]
        if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
            raise InputError(
                f"{role} has labels {labels.dtype} of shape {tuple(labels.shape)} for {count} images; expected one "
                "whole number per image, or a row of 0 and 1 that says which of several labels it has."
            )
        self.labels = labels.to(device, torch.long, copy=labels.is_inference())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Tensor:
        """Pixels ``(n, C, H, W)`` of some images; refuses what is not in [0, 1]."""
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows, device="cpu")
        try:
            return self.space.to_pixels(self._read(index))
        except InputError as error:
            shown = f"{index[0]} to {index[-1]}" if len(index) else "none"
            raise InputError(f"{self.role}, images {shown}: {error}") from error

    def check(self, space: PixelSpace) -> str | None:
        """Reads a few images twice, and finds out whether they are normalised as ``space`` says.

        Returns:
            What a reader of the report has to know; None: nothing.

        Raises:
            InputError: an image is another one at the second reading, or carries another label than its list says.
        """
        if not self.has_images:
            return None
        self.space = PixelSpace(bounds=space.bounds)
        rows = torch.linspace(0, len(self) - 1, min(_SAMPLE, len(self))).long()
        some = self._read(rows)
        if self.is_read_anew and not torch.equal(some, self._read(rows)):
            raise InputError(
                f"{self.role}: the same image is another one when it is read again. Expected fixed images; take random "
                "crops, flips and other augmentation out of the data set's transform."
            )
        self._check_labels(rows)
        low, high = (float(value) for value in self._as_values(some).aminmax())
        if space.normalization is None or 0 <= low <= high <= 1 or is_overshoot(low, high):
            return None
        self.space = space
        return f"{self.role}: normalised images; the normalisation is undone before the attack and applied after it"

    def _as_values(self, images: Tensor) -> Tensor:
        """Images on the scale on which bounds are 0 and 1, whether they lie within or not."""
        return self.space.scaled(images) if images.is_floating_point() and images.numel() else torch.zeros(1)

    def _read(self, index: Tensor) -> Tensor:
        found = self._get(index)
        images = found if isinstance(found, Tensor) else torch.as_tensor(found)
        images = images.detach().to(self.device)
        self.given_dtype = images.dtype
        if images.is_floating_point():
            images = images.to(self.dtype)
        return (images.clone() if images.is_inference() else images).contiguous()

    def _check_labels(self, rows: Tensor) -> None:
        carried = self._carried
        if carried is None or self.label_sets is not None:
            return
        known = self._known[rows].tolist()
        for row, label in zip(rows.tolist(), known, strict=True):
            if int(carried(row)) != label:
                raise InputError(
                    f"{self.role}: image {row} carries the label {int(carried(row))}, but the data set's list of "
                    "labels "
                    f"says {label}. Expected the same; delete or mend the data set's attribute targets (or labels)."
                )

    _carried: Callable[[int], Any] | None = None
    _known: Tensor

    def _label_sets(self, labels: Tensor, count: int) -> Tensor | None:
        if labels.ndim != 2 or labels.shape[0] != count or labels.shape[1] < 2 or labels.is_complex():
            return None
        if not bool(((labels == 0) | (labels == 1)).all()):
            return None
        return labels.to(self.device, torch.bool)

    # What users pass.

    def _from(self, images: Images) -> tuple[Read, Tensor, int]:
        if isinstance(images, Mapping):
            images = _pair_of(images, self.role)
        if isinstance(images, tuple | list):
            return self._from_pair(images)
        if isinstance(images, DataLoader):
            return self._from_loader(images)
        if hasattr(images, "__getitem__") and hasattr(images, "__len__") and not isinstance(images, Tensor):
            return self._from_dataset(images)
        raise InputError(f"{self.role} is {type(images).__name__}; {_EXPECTED}.")

    def _from_pair(self, images: Any) -> tuple[Read, Tensor, int]:
        if len(images) != 2:
            found = ", ".join(type(part).__name__ for part in images)
            raise InputError(f"{self.role} is ({found}); expected two tensors or arrays, (images, labels).")
        pixels: Any = images[0]
        labels = _as_labels(images[1], self.role)
        if pixels is None or 0 in getattr(pixels, "shape", ())[1:]:  # no images, or images without pixels
            self.has_images = False
            return _no_images, labels, len(labels)
        if isinstance(pixels, list | tuple) and pixels and all(isinstance(image, Tensor) for image in pixels):
            pixels = _stacked(pixels)
        if not hasattr(pixels, "shape") or not hasattr(pixels, "__len__"):
            raise InputError(f"{self.role} has images as {type(pixels).__name__}; expected a tensor or an array.")
        count: int = pixels.shape[0] if len(pixels.shape) else 1
        if count and len(pixels.shape) < 2:
            raise InputError(f"{self.role} has images of shape {tuple(pixels.shape)}; expected (N, C, H, W).")
        if isinstance(pixels, Tensor):
            return lambda rows: pixels[rows.to(pixels.device)], labels, count
        return lambda rows: torch.as_tensor(pixels[rows.numpy()]), labels, count

    def _from_loader(self, loader: Any) -> tuple[Read, Tensor, int]:
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset):
            parts = [_split(batch, self.role) for batch in loader]
            if not parts:
                return self._from_pair((torch.zeros(0, 1), torch.zeros(0, dtype=torch.long)))
            images, labels = ([torch.as_tensor(part[place]) for part in parts] for place in (0, 1))
            return self._from_pair((torch.cat(images), torch.cat(labels)))
        if loader.batch_sampler is None:
            return self._from_dataset(dataset)
        chosen = sorted({row for batch in loader.batch_sampler for row in batch}) if _samples(loader) else None
        collate = loader.collate_fn
        return self._from_dataset(dataset, chosen, lambda items: _split(collate(items), self.role))

    def _from_dataset(
        self,
        dataset: Any,
        chosen: list[int] | None = None,
        collate: Callable[[list[Any]], tuple[Any, Any]] | None = None,
    ) -> tuple[Read, Tensor, int]:
        if isinstance(dataset, TensorDataset) and chosen is None and len(dataset.tensors) >= 2:
            return self._from_pair(dataset.tensors[:2])
        self.is_read_anew = True
        index = list(range(len(dataset))) if chosen is None else chosen

        def get(rows: Tensor) -> Any:
            items = [dataset[index[row]] for row in rows.tolist()]
            if collate is not None:
                return collate(items)[0]
            return _stacked([_split(item, self.role)[0] for item in items])

        def carried(row: int) -> Any:
            item = dataset[index[row]]
            return _split(item, self.role)[1] if collate is None else collate([item])[1][0]

        known = _listed_labels(dataset)
        if known is None:
            labels = _as_labels([carried(row) for row in range(len(index))], self.role)
        else:
            labels = _as_labels(known, self.role)[torch.tensor(index, dtype=torch.long)]
            self._carried, self._known = carried, labels
        return get, labels, len(index)


def _listed_labels(dataset: Any) -> Any:
    """The labels of a data set that lists them; None if it does not."""
    known: Any = getattr(dataset, "targets", None)
    known = getattr(dataset, "labels", None) if known is None else known
    if not hasattr(known, "__len__") or len(known) != len(dataset):
        return None
    return None if getattr(dataset, "target_transform", None) is not None else known


def _samples(loader: Any) -> bool:
    """Whether a data loader may leave out images of its data set."""
    from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

    plain = type(loader.batch_sampler) is BatchSampler and type(loader.sampler) in (SequentialSampler, RandomSampler)
    return not plain or len(loader.sampler) != len(loader.dataset)


def _pair_of(images: Mapping[Any, Any], role: str) -> Any:
    """Images and labels of a dict."""
    try:
        return _split(images, role)
    except InputError:
        raise InputError(
            f"{role} is a dict with the keys {sorted(map(str, images))}; {_EXPECTED}. "
            f"Pass one of its entries, such as {next(iter(map(repr, images)), 'images')}."
        ) from None


def _split(item: Any, role: str) -> tuple[Any, Any]:
    """Image and label of an item of a data set, or images and labels of a batch."""
    if isinstance(item, Mapping):
        image, label = (next((key for key in keys if key in item), None) for keys in (_IMAGE_KEYS, _LABEL_KEYS))
        if image is None or label is None:
            raise InputError(
                f"{role}: an item is a dict with the keys {sorted(map(str, item))}; expected an image under one of "
                f"{', '.join(_IMAGE_KEYS)}, and a label under one of {', '.join(_LABEL_KEYS)}. Pass a data set of "
                "(image, label) pairs, or (images, labels)."
            )
        return item[image], item[label]
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise InputError(
        f"{role}: an item is {type(item).__name__}"
        + (f" of length {len(item)}" if isinstance(item, tuple | list | str) else "")
        + f"; {_EXPECTED}."
    )


def _stacked(images: Sequence[Any]) -> Tensor:
    images = [torch.as_tensor(image) if type(image).__module__ == "numpy" else image for image in images]
    if not all(isinstance(image, Tensor) and image.shape == images[0].shape for image in images):
        kinds = {f"a tensor {tuple(i.shape)}" if isinstance(i, Tensor) else type(i).__name__ for i in images}
        found = ", ".join(sorted(kinds))
        raise InputError(f"found {found}; expected tensors (C, H, W) of one size. Add ToTensor and a resize.")
    return torch.stack(list(images))


def _as_labels(labels: Any, role: str) -> Tensor:
    try:
        if isinstance(labels, list | tuple) and labels and all(isinstance(label, Tensor) for label in labels):
            return torch.stack(list(labels))
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{role} has labels such as {labels[0]!r}; expected whole numbers.") from error


def _no_images(rows: Tensor) -> Tensor:
    raise InputError("there are no images, only labels and embeddings; expected images where they are attacked.")
