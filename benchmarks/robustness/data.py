"""Images of training classes, and of classes that are searched: in memory, or read from files."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from torchvision.transforms import v2 as transforms

from benchmarks import omniglot
from pml_adversarial.cli.images import digits
from pml_adversarial.errors import InputError

PHOTOS = {
    "cub": "CUB",
    "cars": "Cars196",
    "sop": "StanfordOnlineProducts",
}
"""PML's own data set classes: where they look for files, they say; training and test classes are disjoint."""

ZIPPED = ("cars", "tiny-imagenet")
"""Data that is read from a .zip file, or a folder, with a folder of photographs for each class."""

PHOTOGRAPHS = tuple(dict.fromkeys([*PHOTOS, *ZIPPED]))
"""All data of photographs; each has the size that is asked for."""

SIDE = 224  # of photographs
_SMALL = {"cars": 64, "tiny-imagenet": 32}
_SUFFIXES = (".jpg", ".jpeg", ".png")
COLOUR = 0.2  # by how much augmented photographs change in brightness, contrast and saturation


class Part(Protocol):
    """Labelled images, of which some can be read and some can be kept."""

    @property
    def labels(self) -> Tensor:
        """``(N,)``."""

    def pixels(self, rows: Tensor, augment: float = 0.0) -> Tensor:
        """``(n, C, H, W)`` in [0, 1]."""

    def keep(self, rows: Tensor) -> Part:
        """These rows alone."""

    def to_evaluate(self) -> Any:
        """As `evaluate_robustness` takes them."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """Small images, all of them in one tensor.

    Attributes:
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)``.
    """

    images: Tensor
    labels: Tensor

    def pixels(self, rows: Tensor, augment: float = 0.0) -> Tensor:
        """Augmented as Omniglot's: turned, scaled, sheared and moved a little, on a background of 0."""
        images = self.images[rows]
        return omniglot.augment(images, augment) if augment else images

    def keep(self, rows: Tensor) -> InMemory:
        """These rows alone."""
        return InMemory(self.images[rows], self.labels[rows])

    def to_evaluate(self) -> tuple[Tensor, Tensor]:
        """Both tensors."""
        return self.images, self.labels


@dataclass(frozen=True, eq=False)
class SmallPhotographs:
    """Photographs of few pixels, all of them in one tensor.

    Attributes:
        images: ``(N, 3, S, S)`` uint8.
        labels: ``(N,)``.
    """

    images: Tensor
    labels: Tensor

    def pixels(self, rows: Tensor, augment: float = 0.0) -> Tensor:
        """As they are; augmented: moved by up to an eighth, half of them mirrored, with other colours."""
        pixels = self.images[rows].float() / 255
        return coloured(mirrored(shifted(pixels, augment)), augment) if augment else pixels

    def keep(self, rows: Tensor) -> SmallPhotographs:
        """These rows alone."""
        return SmallPhotographs(self.images[rows], self.labels[rows])

    def to_evaluate(self) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1], and labels."""
        return self.images.float() / 255, self.labels


def shifted(pixels: Tensor, strength: float) -> Tensor:
    """Each image ``(N, C, S, S)`` moved by up to an eighth each way; beyond its border it is mirrored."""
    count, _, side, _ = pixels.shape
    most = round(side / 8 * min(1.0, strength))
    padded = pad(pixels, (most, most, most, most), mode="reflect")
    down, right = (torch.randint(2 * most + 1, (2, count)).unsqueeze(-1) + torch.arange(side)).unbind()
    return padded[torch.arange(count)[:, None, None], :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def mirrored(pixels: Tensor) -> Tensor:
    """Half of the images, by chance, with left and right exchanged."""
    return torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)


def mixed(pixels: Tensor) -> Tensor:
    """Each image ``(N, C, S, S)`` blended with another of the batch, in any proportion (mixup, arXiv 1710.09412)."""
    return _blended(pixels, pixels[torch.randperm(len(pixels))], torch.rand(len(pixels), 1, 1, 1))


def coloured(pixels: Tensor, strength: float) -> Tensor:
    """Images ``(N, 3, S, S)`` with other brightness, contrast and saturation, each image in an order of its own.

    This is ColorJitter of torchvision for all images at once, which takes one image at a time.
    """
    most = min(1.0, COLOUR * strength)
    factors = (1 + most * (2 * torch.rand(3, len(pixels), 1, 1, 1) - 1)).unbind()
    order = torch.rand(len(pixels), 3).argsort(1)  # of each image: which change is its first, second and third
    for turn in order.T:
        changed = [_blended(pixels, toward(pixels), factor) for toward, factor in zip(_TOWARD, factors, strict=True)]
        pixels = torch.stack(changed)[turn, torch.arange(len(pixels))]
    return pixels


def _blended(pixels: Tensor, toward: Tensor, factor: Tensor) -> Tensor:
    return (factor * pixels + (1 - factor) * toward).clamp(0, 1)


def _grey(pixels: Tensor) -> Tensor:
    return (pixels * pixels.new_tensor([0.2989, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True)


_TOWARD: tuple[Callable[[Tensor], Tensor], ...] = (  # what less of brightness, contrast and saturation leads to
    torch.zeros_like,
    lambda pixels: _grey(pixels).mean((1, 2, 3), keepdim=True),
    _grey,
)


@dataclass(frozen=True, eq=False)
class Photographs(Dataset[tuple[Tensor, int]]):
    """Photographs that PML's classes know, read when they are asked for; a data set of (pixels, label).

    Attributes:
        source: one of PML's data sets, without a transform.
        rows: ``(N,)`` rows of the source.
        labels: ``(N,)``.
        side: pixels of a side.
    """

    source: Any
    rows: Tensor
    labels: Tensor
    side: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels(torch.tensor([index]))[0], int(self.labels[index])

    def pixels(self, rows: Tensor, augment: float = 0.0) -> Tensor:
        """Resized by 8/7 and cut to the square in the middle; augmented: a square anywhere, half of them mirrored."""
        change = self._augmented() if augment else transforms.CenterCrop(self.side)
        return torch.stack([change(self._resized(int(self.rows[row]))) for row in rows])

    def keep(self, rows: Tensor) -> Photographs:
        """These rows alone."""
        return replace(self, rows=self.rows[rows], labels=self.labels[rows])

    def to_evaluate(self) -> Photographs:
        """Itself, a data set with ``labels``."""
        return self

    def _resized(self, row: int) -> Tensor:
        image: Image.Image = self.source[row][0]
        larger = image.convert("RGB").resize([self.side * 8 // 7] * 2, Image.Resampling.BILINEAR)
        pixels: Tensor = transforms.functional.pil_to_tensor(larger)
        return pixels.float() / 255

    def _augmented(self) -> Callable[[Tensor], Tensor]:
        change: Callable[[Tensor], Tensor] = transforms.Compose(
            [transforms.RandomCrop(self.side), transforms.RandomHorizontalFlip()]
        )
        return change


@dataclass(frozen=True, eq=False)
class Rotated:
    """Further classes: those of another part, turned by one, two and three quarters.

    Attributes:
        part: what is turned; its images are squares.
    """

    part: Part

    @property
    def labels(self) -> Tensor:
        """``(4 N,)``: class ``c`` of ``C`` turned ``k`` times is class ``k C + c``."""
        _, labels = self.part.labels.unique(return_inverse=True)
        return torch.cat([labels + turn * (int(labels.max()) + 1) for turn in range(4)])

    def pixels(self, rows: Tensor, augment: float = 0.0) -> Tensor:
        """Augmented before they are turned."""
        total = len(self.part.labels)
        images = self.part.pixels(rows % total, augment)
        return torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, rows // total, strict=True)])


def side(name: str, file: Path | None) -> int:
    """Of the photographs of some data, unless asked otherwise; 0 where it has its own size."""
    if name not in PHOTOGRAPHS:
        return 0
    return SIDE if file is None else _SMALL.get(name, SIDE)


def load(
    name: str, root: Path, file: Path | None = None, download: bool = False, size: int | None = None
) -> tuple[Part, Part]:
    """Images to train on, and images of other classes.

    Args:
        name: "digits", "omniglot", "cub", "cars", "sop" or "tiny-imagenet".
        root: folder of downloads; photographs are looked for in a folder of it, named as the data.
        file: of "omniglot", an npz as `omniglot.load` reads it, in place of torchvision's data set. Of "cars" and
            "tiny-imagenet", a .zip file or a folder as `read_classes` reads it; the first half of the classes is
            trained on.
        download: whether torchvision or PML may fetch what is not there.
        size: side of photographs; None: 224, or of those in ``file`` 64 (cars) or 32 (tiny-imagenet).

    Raises:
        InputError: there is nothing there, or options are for other data.
    """
    if file is not None and name not in ("omniglot", *ZIPPED):
        raise InputError(f"--file {file} is for omniglot, {' and '.join(ZIPPED)}; {name} is not read from one file.")
    if file is None and name == "tiny-imagenet":
        raise InputError("tiny-imagenet is read from --file: a .zip file, or a folder, with a folder for each class.")
    if size and name not in PHOTOGRAPHS:
        known = ", ".join(PHOTOGRAPHS)
        raise InputError(f"--size {size} is for photographs ({known}); images of {name} stay as they are.")
    if file is not None and name in ZIPPED:
        return _halves(*read_classes(file, size or side(name, file)))
    if name in PHOTOS:
        return _photographs(name, root / name, download, size or SIDE)
    split = digits() if name == "digits" else _omniglot(root, file, download)
    train = InMemory(split.train_images, split.train_labels)
    return train, InMemory(split.test_images, split.test_labels)


def read_classes(path: Path, side: int) -> tuple[Tensor, Tensor]:
    """The photographs of a .zip file, or of a folder, that holds a folder for each class.

    A folder named "images" inside a class's folder is passed over, and so are folders named "val" and "test" above it:
    this reads Tiny ImageNet as it is distributed.

    Args:
        path: of the file or folder.
        side: to which photographs are resized, squares or not.

    Returns:
        ``(N, 3, side, side)`` uint8, and ``(N,)`` labels: classes in the order of their names.

    Raises:
        InputError: there are no such photographs.
    """
    try:
        found = {name: image for name, image in _files(path) if not {"val", "test"} & set(name.parts)}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"--file {path} cannot be read: {error}") from error
    of_class = {name: [part for part in name.parts[:-1] if part != "images"] for name in found}
    names = sorted(name for name, folders in of_class.items() if folders)
    classes = sorted({of_class[name][-1] for name in names})
    if len(classes) < 2:
        raise InputError(f"--file {path} holds {len(classes)} folders with JPEG or PNG files; expected one per class.")
    number = {folder: label for label, folder in enumerate(classes)}
    images = torch.stack([_small(found[name](), side) for name in names])
    return images, torch.tensor([number[of_class[name][-1]] for name in names])


def _files(path: Path) -> Iterator[tuple[PurePath, Callable[[], bytes]]]:
    """Name and content of each photograph."""
    if path.is_dir():
        for file in path.rglob("*"):
            if file.suffix.lower() in _SUFFIXES:
                yield file.relative_to(path), file.read_bytes
        return
    archive = zipfile.ZipFile(path)
    for name in map(PurePath, archive.namelist()):
        if name.suffix.lower() in _SUFFIXES:
            yield name, partial(archive.read, name.as_posix())


def _small(content: bytes, side: int) -> Tensor:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)  # PIL antialiases
    pixels: Tensor = transforms.functional.pil_to_tensor(image)
    return pixels


def _halves(images: Tensor, labels: Tensor) -> tuple[Part, Part]:
    """The photographs of the first half of the classes, and of the second, as papers split Cars196."""
    trained = labels < (int(labels.max()) + 1) // 2
    return SmallPhotographs(images[trained], labels[trained]), SmallPhotographs(images[~trained], labels[~trained])


def hold_out(part: Part, classes: int) -> tuple[Part, Part]:
    """Parts the last classes, by label, from the others, as the data sets themselves part training from test classes.

    Raises:
        InputError: either part would have fewer than two classes.
    """
    known = part.labels.unique()
    if not 2 <= classes <= len(known) - 2:
        raise InputError(
            f"--validation-classes {classes} of {len(known)} training classes; expected from 2 to {len(known) - 2}."
        )
    held = torch.isin(part.labels, known[-classes:])
    return part.keep((~held).nonzero().flatten()), part.keep(held.nonzero().flatten())


def _omniglot(root: Path, file: Path | None, download: bool) -> Any:
    try:
        return omniglot.fetch(root, download) if file is None else omniglot.load(file)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        hint = "add --download, or give an npz with --file" if file is None else "see benchmarks/omniglot.py, load"
        raise InputError(f"Omniglot cannot be read from {file or root}: {error}; {hint}.") from error


def _photographs(name: str, root: Path, download: bool, side: int) -> tuple[Photographs, Photographs]:
    try:
        from pytorch_metric_learning import datasets
    except ImportError as error:
        raise InputError(f"{name} is read by pytorch-metric-learning from 2.9 on; install a newer one.") from error
    kind = getattr(datasets, PHOTOS[name])
    try:
        train, test = (kind(str(root), split=split, download=download) for split in ("train", "test"))
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{name} cannot be read from {root}: {error} Add --download, or see --root.") from error
    return _all_of(train, side), _all_of(test, side)


def _all_of(source: Any, side: int) -> Photographs:
    if not len(source):
        raise InputError(f"{source.root} lists no images of the {source.split} classes.")
    return Photographs(source, torch.arange(len(source)), torch.tensor(source.labels), side)
