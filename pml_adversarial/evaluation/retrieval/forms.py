"""Labelled images in the forms in which users have them: tensors, arrays, dicts, data sets, data loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from numpy import unique
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from ...errors import InputError
from .options import to_tensor

Images = Any
"""Labelled images with pixels in [0, 1]:

- ``(images (N, C, H, W), labels (N,))``, as tensors or arrays. Labels ``(N, L)`` of 0 and 1 say which of L labels each
  image has; then images that share a label are right for each other.
- a data set or a list of items ``(image (C, H, W), label)``, or of dicts that have an image and a label. Of longer
  items the first two entries are taken;
- a data loader of such a data set, which is read in the order of the data set. Its ``collate_fn`` is given one item at
  a time, so that an image does not depend on its batch;
- as a gallery, ``(None, labels)``: items that are known by their embeddings alone.
"""

_IMAGE_KEYS = ("image", "images", "img", "pixel_values", "pixels", "input", "inputs", "x", "data")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class", "class_id")
_EXPECTED = "expected (images, labels) or a data set of such pairs, also in a data loader"


@dataclass(frozen=True)
class LabelledImages:
    """Images of any form.

    Attributes:
        read: indices ``(n,)`` -> images ``(n, C, H, W)``.
        labels: of all images, as they are given.
        has_images: False: only labels are known.
        is_read_anew: whether ``read`` may give another image the second time.
        carried: index -> the label that an item carries; None: ``labels`` were read off the items themselves.
        classes: the name of each label from 0 on; empty: labels have no names.
    """

    read: Callable[[Tensor], Any]
    labels: Tensor
    count: int
    has_images: bool = True
    is_read_anew: bool = False
    carried: Callable[[int], Any] | None = None
    classes: Sequence[str] = ()


def labelled_images(images: Images, role: str) -> LabelledImages:
    """What the user passes as ``role``, such as "queries".

    Raises:
        InputError: it has none of the forms of `Images`.
    """
    if isinstance(images, Mapping):
        images = _pair_of(images, role)
    if isinstance(images, tuple | list) and not _holds_items(images):
        return _from_pair(images, role)
    if isinstance(images, DataLoader):
        return _from_loader(images, role)
    if hasattr(images, "__getitem__") and hasattr(images, "__len__") and not isinstance(images, Tensor):
        return _from_dataset(images, role)
    raise InputError(f"{role} is {type(images).__name__}; {_EXPECTED}.")


def _holds_items(images: Sequence[Any]) -> bool:
    """Whether this is a list of items ``(image, label)``, and not ``(images, labels)``."""
    if len(images) == 2:  # images of a batch have labels beside them, one of an item has one number
        return isinstance(images, list) and all(map(_is_item, images))
    return len(images) > 0 and all(
        (isinstance(item, tuple | Mapping) and len(item) >= 2) or _is_item(item) for item in images
    )


def _is_item(item: Any) -> bool:
    """Whether this is a picture with one number."""
    if isinstance(item, Mapping):
        return len(item) >= 2
    is_long = isinstance(item, tuple | list) and len(item) >= 2
    return (
        is_long
        and len(getattr(item[0], "shape", ())) > 1
        and (isinstance(item[1], int) or (hasattr(item[1], "shape") and not item[1].shape))
    )


def _from_pair(images: Any, role: str) -> LabelledImages:
    if len(images) != 2:
        found = ", ".join(type(part).__name__ for part in images)
        raise InputError(f"{role} is ({found}); expected two tensors or arrays, (images, labels).")
    pixels: Any = images[0]
    labels = _as_labels(images[1], role)
    if pixels is None or 0 in getattr(pixels, "shape", ())[1:]:  # no images, or images without pixels
        return LabelledImages(_no_images, labels, len(labels), has_images=False)
    if isinstance(pixels, list | tuple) and pixels and all(isinstance(image, Tensor) for image in pixels):
        pixels = _stacked(pixels)
    if not hasattr(pixels, "shape") or not hasattr(pixels, "__len__"):
        raise InputError(f"{role} has images as {type(pixels).__name__}; expected a tensor or an array.")
    count: int = pixels.shape[0] if len(pixels.shape) else 1
    if count and len(pixels.shape) < 2:
        raise InputError(f"{role} has images of shape {tuple(pixels.shape)}; expected (N, C, H, W).")
    if isinstance(pixels, Tensor):
        return LabelledImages(lambda rows: pixels[rows.to(pixels.device)], labels, count)
    return LabelledImages(lambda rows: _as_tensor(_rows_of(pixels, rows.numpy()), role), labels, count)


def _from_loader(loader: Any, role: str) -> LabelledImages:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or type(loader).__iter__ is not DataLoader.__iter__:  # is read once
        parts = [_split(batch, role) for batch in loader]
        if not parts:
            return _from_pair((torch.zeros(0, 1), torch.zeros(0, dtype=torch.long)), role)
        images, labels = [_batch_of(part[0], role) for part in parts], [_as_labels(part[1], role) for part in parts]
        return _from_pair((torch.cat(images), torch.cat(labels)), role)
    if loader.batch_sampler is None:
        return _from_dataset(dataset, role)
    chosen = None
    if _may_leave_out(loader):
        sampler = deepcopy(loader.batch_sampler, {id(dataset): dataset})  # the user's own is not advanced
        chosen = sorted({row for batch in sampler for row in batch})
    return _from_dataset(dataset, role, chosen, None if loader.collate_fn is default_collate else loader.collate_fn)


def _from_dataset(
    dataset: Any, role: str, chosen: list[int] | None = None, collate: Callable[[list[Any]], Any] | None = None
) -> LabelledImages:
    if type(dataset) is TensorDataset and chosen is None and collate is None and len(dataset.tensors) >= 2:
        return _from_pair(dataset.tensors[:2], role)
    index = list(range(len(dataset))) if chosen is None else chosen

    def item(row: int) -> tuple[Any, Any]:
        found = dataset[index[row]]
        return _split(found, role) if collate is None else _collated(found, collate, f"{role}, item {index[row]}")

    def read(rows: Tensor) -> Any:
        return _stacked([item(row)[0] for row in rows.tolist()])

    def carried(row: int) -> Any:
        return item(row)[1]

    known = _listed_labels(dataset)
    try:
        labels = None if known is None else _as_labels(known, role)
    except InputError:  # names, where the items carry numbers
        labels = None
    if labels is None:
        labels = _as_labels([carried(row) for row in range(len(index))], role)
        return LabelledImages(read, labels, len(index), is_read_anew=True, classes=_names(dataset, role))
    labels = labels[torch.tensor(index, dtype=torch.long)]
    return LabelledImages(read, labels, len(index), is_read_anew=True, carried=carried, classes=_names(dataset, role))


def _collated(item: Any, collate: Callable[[list[Any]], Any], role: str) -> tuple[Any, Any]:
    """Image and label of an item as a batch of it alone has them, so that they do not depend on other items."""
    try:
        batch = collate([item])
    except Exception as error:  # a function of the user may raise anything
        raise InputError(
            f"{role}: collate_fn fails on this item alone, with {type(error).__name__}: {error}. Expected items that "
            "it takes one by one, or (images, labels)."
        ) from error
    images, labels = _split(batch, role)
    images = _batch_of(images, role)
    if not len(images) == len(labels) == 1:
        raise InputError(
            f"{role}: collate_fn gives {len(images)} images and {len(labels)} labels for this item alone; expected one "
            "of each. Pass (images, labels), or a function of one image that embeds all that is made of it."
        )
    return images[0], labels[0]


def _names(dataset: Any, role: str) -> Sequence[str]:
    """The names of the classes, as torchvision's data sets list them; empty: there are none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset):
        lists = {tuple(_names(part, role)) for part in dataset.datasets}
        if () not in lists and len(lists) > 1:
            raise InputError(
                f"{role} joins data sets whose lists of classes differ, so one label stands for several classes. "
                "Expected one list; pass data sets with the same folders of classes, or (images, labels)."
            )
        return min(lists)
    if getattr(dataset, "target_transform", None) is not None:
        return ()
    found = getattr(dataset, "classes", ())
    is_list = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return found if is_list else ()


def _listed_labels(dataset: Any) -> Any:
    """The labels of a data set that lists them; None if it does not."""
    known: Any = getattr(dataset, "targets", None)
    known = getattr(dataset, "labels", None) if known is None else known
    if not hasattr(known, "__len__") or len(known) != len(dataset):
        return None
    return None if getattr(dataset, "target_transform", None) is not None else known


def _may_leave_out(loader: Any) -> bool:
    """Whether a data loader may leave out images of its data set."""
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
        image, label = _key(item, _IMAGE_KEYS, _is_array), _key(item, _LABEL_KEYS, lambda it: not isinstance(it, str))
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


def _key(item: Mapping[Any, Any], keys: Sequence[str], is_usable: Callable[[Any], bool]) -> str | None:
    """The first key whose value can be used; if there is none, the first that is there."""
    there = [key for key in keys if key in item]
    return next((key for key in there if is_usable(item[key])), there[0] if there else None)


def _is_array(value: Any) -> bool:
    """Whether this is a tensor or an array, or some of them, and no picture that has to be converted."""
    return _is_array(value[0]) if isinstance(value, list | tuple) and value else hasattr(value, "shape")


def _stacked(images: Sequence[Any]) -> Tensor:
    images = [torch.as_tensor(image) if type(image).__module__ == "numpy" else image for image in images]
    if not all(isinstance(image, Tensor) and image.shape == images[0].shape for image in images):
        kinds = {f"a tensor {tuple(i.shape)}" if isinstance(i, Tensor) else type(i).__name__ for i in images}
        found = ", ".join(sorted(kinds)[:3]) + (", ..." if len(kinds) > 3 else "")
        raise InputError(f"found {found}; expected tensors (C, H, W) of one size. Add ToTensor and a resize.")
    return torch.stack(list(images))


def _batch_of(images: Any, role: str) -> Tensor:
    """Images of a batch, which may be a list of them."""
    return _stacked(images) if isinstance(images, list | tuple) else _as_tensor(images, role)


def _as_tensor(images: Any, role: str) -> Tensor:
    try:
        return to_tensor(images)
    except (TypeError, ValueError, RuntimeError) as error:
        found = getattr(images, "dtype", type(images).__name__)
        raise InputError(f"{role} has images of {found}; expected numbers, such as float32.") from error


def _rows_of(pixels: Any, rows: Any) -> Any:
    """Some rows of an array, which may be one that is read from a file in rising order alone."""
    if type(pixels).__module__ == "numpy":
        return pixels[rows]
    rising, places = unique(rows, return_inverse=True)
    return pixels[rising][places]


def _as_labels(labels: Any, role: str) -> Tensor:
    try:
        if isinstance(labels, list | tuple) and labels and all(isinstance(label, Tensor) for label in labels):
            return torch.stack(list(labels))
        return to_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        first = labels[0] if isinstance(labels, list | tuple) and labels else labels
        shown = f"such as {first!r}" if isinstance(first, str | int | float) else f"as {type(first).__name__}"
        raise InputError(f"{role} has labels {shown}; expected whole numbers, one per image.") from error


def _no_images(rows: Tensor) -> Tensor:
    raise InputError("there are no images, only labels and embeddings; expected images where they are attacked.")
