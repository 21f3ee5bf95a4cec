"""Labelled images: handwritten digits, or the images of a folder or an npz file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from unicodedata import normalize
from zipfile import is_zipfile

import numpy
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from ..errors import InputError
from ..evaluation.retrieval.options import JUNK

_NEED_MORE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # which Pillow names, but does not decode by itself
_JUNK = str(JUNK)  # the name of a folder, or a label of an npz
_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "query", "queries", "gallery"}
_ROUNDING = 1e-4  # by which floating-point images may leave [0, 1]


@dataclass(frozen=True, eq=False)
class OpenSetSplit:
    """Images of some classes for training, and of other classes for testing, in [0, 1]."""

    train_images: Tensor  # (N, C, H, W)
    train_labels: Tensor  # (N,)
    test_images: Tensor  # (T, C, H, W)
    test_labels: Tensor  # (T,)


def digits(train_classes: Iterable[int] = range(5)) -> OpenSetSplit:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels: some classes for training, the others for testing.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
    """
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    return split_by_class(pixels, torch.from_numpy(labels).long(), train_classes)


def split_by_class(images: Tensor, labels: Tensor, train_classes: Iterable[int]) -> OpenSetSplit:
    """Images of ``train_classes`` for training, all others for testing.

    Raises:
        InputError: a class has no images, or one of the two parts has fewer than two classes.
    """
    wanted, present = set(train_classes), set(labels.tolist())
    if wanted - present:
        raise InputError(f"There are no images of the classes {sorted(wanted - present)}; found {sorted(present)}.")
    known = torch.isin(labels, torch.tensor(sorted(wanted)))
    for part, rows in (("train", known), ("test", ~known)):
        classes = labels[rows].unique().tolist()
        if len(classes) < 2:
            raise InputError(
                f"The {part} part holds the classes {classes}; expected at least two, since retrieval needs right and "
                "wrong items. Choose other train_classes."
            )
    return OpenSetSplit(images[known], labels[known], images[~known], labels[~known])


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images of named classes, read one at a time: ``dataset[i]`` is pixels ``(C, H, W)`` in [0, 1] and a label.

    The name "-1" is no class: its images are junk, with the label -1, which no query finds.

    Args:
        read: row -> image.
        names: the class of each row.
        classes: names of all classes, in the order of their labels; None: those of the rows, sorted.
        note: what was left out, in words; empty: nothing was.
    """

    def __init__(
        self, read: Callable[[int], Tensor], names: Sequence[str], classes: Sequence[str] | None = None, note: str = ""
    ) -> None:
        self.read, self.names, self.note = read, [normalize("NFC", name) for name in names], note
        self.classes = tuple(sorted({*self.names} - {_JUNK}) if classes is None else classes)
        number = {_JUNK: JUNK, **{name: label for label, name in enumerate(self.classes)}}
        self.labels = torch.tensor([number[name] for name in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index), int(self.labels[index])

    def with_classes(self, classes: Sequence[str]) -> LabelledImages:
        """The same images, with labels that are indices into ``classes``."""
        return LabelledImages(self.read, self.names, classes, self.note)


def images_from(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    shape: tuple[int, int] | None = None,
    grayscale: bool = False,
) -> LabelledImages:
    """The images of a folder with one subfolder per class, or of an npz with ``images`` and ``labels``.

    Images of a folder are read when they are needed, in the same way as by torchvision's ``ImageFolder``: transparency
    is dropped, and the EXIF orientation is ignored. Hidden files are skipped, and so are files that are no images;
    ``note`` says how many. An npz file holds ``images`` of uint8 (0 to 255) or floating point in [0, 1], of shape
    ``(N, H, W)``, ``(N, C, H, W)`` or ``(N, H, W, C)`` (of the two possible axes, the shorter one is taken for the
    channels), and ``labels`` ``(N,)``, integers or words. It must not hold pickled objects. One name of a class in two
    forms of Unicode is one class.

    Args:
        path: the folder or the npz.
        size: side of a square. The shorter side of each image of a folder is resized to it, and the square in the
            middle is cut out. Two numbers: the shorter side, and the side of the square. None: all images have one
            size already, or ``shape`` says it.
        shape: height and width that each image of a folder is resized to, its proportions aside, as is usual in person
            re-identification.
        grayscale: whether images of a folder have one channel instead of three.

    Raises:
        InputError: the path does not exist or holds something else. If a single image cannot be read, this is raised
            when the image is needed.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path, _resizing(size, shape), grayscale)
    if not path.is_file():
        raise InputError(f"There is no {path}; expected a folder with one subfolder per class, or an npz.")
    if path.suffix.lower() in _suffixes():
        raise InputError(
            f"{path} is a single image; expected a folder with one subfolder per class, or an npz of images and labels."
        )
    if size is not None or shape is not None or grayscale:
        raise InputError(f"{path} is an npz file; sizes and grayscale are for folders only. Change its arrays instead.")
    return _from_npz(path)


def same_classes(
    queries: LabelledImages, gallery: LabelledImages | None = None
) -> tuple[LabelledImages, LabelledImages | None]:
    """Queries and gallery, with labels that stand for the same classes in both. No gallery: the queries are one.

    Raises:
        InputError: no query has both a right and a wrong item to find.
    """
    searched = queries if gallery is None else gallery
    if len(searched.classes) < 2:
        raise InputError(
            f"All {len(searched)} images that are searched are of one class, {searched.names[0]!r}; expected two or "
            "more, since retrieval needs right and wrong items."
        )
    if gallery is None:
        if int(queries.labels[queries.labels != JUNK].bincount().max()) < 2:
            raise InputError(
                f"There is one image of each of the {len(queries)} classes, so a query has nothing right to find. "
                "Add more images of each class, or a gallery of its own."
            )
        return queries, None
    if not set(queries.classes) & set(gallery.classes):
        raise InputError(
            f"No class of the queries ({_some(queries.classes)}) is in the gallery ({_some(gallery.classes)}). Classes "
            "are compared by the names of their folders, or by the labels of the npz."
        )
    classes = sorted({*queries.classes, *gallery.classes})
    return queries.with_classes(classes), gallery.with_classes(classes)


@dataclass(frozen=True, eq=False)
class _Files:
    """Images of files, decoded when they are needed."""

    paths: Sequence[Path]
    resized: Callable[[Image.Image], Image.Image] | None
    grayscale: bool

    def __call__(self, index: int) -> Tensor:
        image = self._decode(self.paths[index])
        if image.shape != self._expected:
            raise InputError(
                f"{self.paths[index]} is {_by(image.shape[1:])} pixels, {self.paths[0]} {_by(self._expected[1:])}; "
                "expected images of one size. Choose a size to which all images are resized, such as --size 224."
            )
        return image

    @cached_property
    def _expected(self) -> torch.Size:
        return self._decode(self.paths[0]).shape

    def _decode(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                mode, image = file.mode, file.convert("L" if self.grayscale else "RGB")
        except Exception as error:  # of many kinds, from Pillow and its decoders
            raise InputError(f"{path} cannot be read as an image: {error}") from error
        if mode[0] in "IF":  # Pillow would clip them at 255
            raise InputError(f"{path} has more than 8 bits per channel (Pillow's mode {mode}); convert it to 8 bits.")
        if self.resized is not None:
            image = self.resized(image)
        pixels: Tensor = transforms.pil_to_tensor(image)
        return pixels.float() / 255


def _row(images: Tensor, index: int) -> Tensor:
    """An image of an array, whose uint8 need less memory than the pixels that are made of them here."""
    image = images[index]
    return image if image.is_floating_point() else image.float() / 255


def _from_folder(path: Path, resized: Callable[[Image.Image], Image.Image] | None, grayscale: bool) -> LabelledImages:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    suffixes = _suffixes()
    if not folders:
        direct = sum(entry.suffix.lower() in suffixes for entry in path.iterdir())
        raise InputError(
            f"{path} has no subfolders ({direct} images lie in it directly); expected one subfolder per class, with "
            "the images of the class in it: move them so, or save images and labels as an npz. Without classes "
            "there is nothing right or wrong to find."
        )
    found = {folder.name: sorted(_files(folder)) for folder in folders}
    images = {name: [file for file in files if file.suffix.lower() in suffixes] for name, files in found.items()}
    empty = [name for name, files in images.items() if not files]
    if empty:
        raise InputError(
            f"{path} has class folders without an image: {_some(empty)}. Expected files of images, such as .jpeg or "
            ".png; remove folders that are no classes."
        )
    is_deep = all(file.parent.parent != path for files in images.values() for file in files)
    if is_deep and {name.lower() for name in images} <= _PARTS:
        raise InputError(
            f"{path} holds {_some([*images])}, which seem to be parts of a data set and no classes; expected one "
            f"subfolder per class. Pass one of them, such as {path / next(iter(images))}."
        )
    others = Counter(file.suffix.lower() for files in found.values() for file in files) - Counter(
        file.suffix.lower() for files in images.values() for file in files
    )
    kinds = _some([f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(others.items())])
    note = f"{path}: {others.total()} files are no images that can be read, and are left out: {kinds}" if others else ""
    names = [name for name, files in images.items() for _ in files]
    files = [file for files in images.values() for file in files]
    return LabelledImages(_Files(files, resized, grayscale), names, note=note)


def _suffixes() -> set[str]:
    """The endings of the files that Pillow can read, with its plugins."""
    known = Image.registered_extensions()
    return {suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in _NEED_MORE}


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder that are not hidden."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _from_npz(path: Path) -> LabelledImages:
    expected = "expected one that numpy.savez(path, images=..., labels=...) wrote"
    if not is_zipfile(path):
        raise InputError(f"{path} is no npz, which is a zip file; {expected}.")
    try:
        with path.open("rb") as opened, numpy.load(opened, allow_pickle=False) as file:
            names = file.files
            found = {name: file[name] for name in ("images", "labels") if name in names}
    except Exception as error:  # of many kinds, from numpy and zipfile
        raise InputError(f"{path} cannot be read as an npz: {error}; {expected}.") from error
    missing = sorted({"images", "labels"} - set(found))
    if missing:
        raise InputError(f"{path} has no {' and no '.join(missing)}, only {_some(names)}; {expected}.")
    images, labels = found["images"], found["labels"]
    if images.ndim not in (3, 4) or not images.size:
        raise InputError(
            f"The images of {path} have shape {images.shape}; expected (N, H, W), (N, C, H, W) or (N, H, W, C)."
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iuUS":
        raise InputError(
            f"The labels of {path} are {labels.dtype} of shape {labels.shape}, for {len(images)} images; expected one "
            "integer or word per image."
        )
    return LabelledImages(partial(_row, _channels_first(_pixels(images, path), path)), [str(name) for name in labels])


def _pixels(images: numpy.ndarray, path: Path) -> Tensor:
    if images.dtype == numpy.uint8:
        return torch.from_numpy(images)
    if images.dtype.kind != "f":
        raise InputError(f"The images of {path} are {images.dtype}; expected uint8, or floating point in [0, 1].")
    pixels = torch.from_numpy(images.astype(numpy.float32))
    low, high = float(pixels.min()), float(pixels.max())
    if not -_ROUNDING <= low <= high <= 1 + _ROUNDING:
        bad = int((~pixels.isfinite()).flatten(1).any(1).sum())
        found = f"{bad} of {len(pixels)} hold NaN or infinite values" if bad else f"from {low:.3g} to {high:.3g}"
        raise InputError(
            f"The images of {path} are not pixels: {found}; expected finite values in [0, 1]. Save images before they "
            "are normalised; if they are 0 to 255, divide them by 255 or save them as uint8."
        )
    return pixels.clamp_(0, 1)


def _channels_first(images: Tensor, path: Path) -> Tensor:
    if images.ndim == 3:
        return images.unsqueeze(1)
    second, last = images.shape[1], images.shape[3]
    if second == last:
        raise InputError(
            f"The images of {path} have shape {tuple(images.shape)}, where the channels may be the second axis or the "
            "last; expected one of them to be shorter. Save them as (N, H, W) or in another size."
        )
    return images if second < last else images.permute(0, 3, 1, 2)


def _resizing(
    size: int | tuple[int, int] | None, shape: tuple[int, int] | None
) -> Callable[[Image.Image], Image.Image] | None:
    """What resizes an image; None: nothing does."""
    if size is not None and shape is not None:
        raise InputError(f"size={size} and shape={shape}; expected one of them.")
    if shape is not None:
        if min(shape) < 1:
            raise InputError(f"shape={shape}; expected a height and a width above 0.")
        return partial(transforms.resize, size=list(shape))
    if size is None:
        return None
    shorter, square = (size, size) if isinstance(size, int) else size
    if not 0 < square <= shorter:
        raise InputError(
            f"size={size}; expected a side above 0, or two: the shorter side, and a square that fits in it."
        )
    return partial(_resized_and_cropped, shorter=shorter, square=square)


def _resized_and_cropped(image: Image.Image, shorter: int, square: int) -> Image.Image:
    return transforms.center_crop(transforms.resize(image, [shorter]), [square])


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
