"""Labelled images as pixels on the model's device, checked and read a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import InputError
from ...training.pixels import PixelSpace, is_overshoot
from .forms import Images, labelled_images

_SAMPLE = 16  # images that are read twice
_NARROW = 0.01  # of the range of pixels; the values of most images differ by more than half of it


class ImageSet:
    """Labelled images on a device, one or more. ``images[rows]`` reads some of them as pixels ``(n, C, H, W)``.

    Attributes:
        labels: ``(N,)`` whole numbers; with several labels per image, a number for each combination.
        label_sets: ``(N, L)`` bool, which labels each image has; None: each has one.
        classes: the name of each label from 0 on, or of each of the L labels; empty: they have no names.
        has_images: False: only labels are known.
        dtype: of the pixels.
        given_dtype: of the images that were read last, as they are given.
        space: undoes the normalisation of the data set; set by `check`.
    """

    def __init__(self, images: Images, device: torch.device, role: str, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.role, self.dtype, self.given_dtype = device, role, dtype, dtype
        self.space = PixelSpace()
        self._given = labelled_images(images, role)
        self.has_images, count, labels = self._given.has_images, self._given.count, self._given.labels
        if not count:
            raise InputError(f"{role} holds no images.")
        self.label_sets = self._label_sets(labels, count)
        if self.label_sets is not None:
            labels = self.label_sets.unique(dim=0, return_inverse=True)[1]
        if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
            cure = " Pass labels[:, 0]." if labels.shape == (count, 1) else ""
            cure = " Pass labels.long(), if they are whole numbers." if labels.is_floating_point() else cure
            raise InputError(
                f"{role} has labels {labels.dtype} of shape {tuple(labels.shape)} for {count} images; expected one "
                f"whole number per image, or a row of 0 and 1 that says which of several labels it has.{cure}"
            )
        self.labels = labels.to(device, torch.long, copy=labels.is_inference())
        most = int(labels.max()) + 1 if self.label_sets is None else self.label_sets.shape[1]
        self.classes = tuple(self._given.classes) if len(self._given.classes) >= most else ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Tensor:
        """Pixels ``(n, C, H, W)`` of some images; refuses what is not in [0, 1]."""
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows, device="cpu")
        try:
            images = self._read(index)
            if not images.is_floating_point():
                cure = {torch.bool: "convert them by .float()", torch.uint8: "divide them by 255"}
                also = f": {cure[images.dtype]}" if images.dtype in cure else ""
                raise InputError(f"they are {images.dtype}; expected floating point in [0, 1]{also}.")
            return self.space.to_pixels(images)
        except InputError as error:
            shown = " to ".join(map(str, dict.fromkeys(index[[0, -1]].tolist()))) if len(index) else "none"
            raise InputError(f"{self.role}, image{'s' * (len(index) != 1)} {shown}: {error}") from error

    def name_of(self, row: int) -> str:
        """The name of an image's class, where the images came with names; else its label."""
        label = int(self.labels[row])
        return self.classes[label] if self.classes and self.label_sets is None and label >= 0 else str(label)

    def number_by(self, classes: Sequence[str]) -> None:
        """Makes labels indices into another list of classes, which holds all names of its own."""
        number = {name: label for label, name in enumerate(classes)}
        numbers = self.labels.new_tensor([number[name] for name in self.classes])
        self.labels = torch.where(self.labels < 0, self.labels, numbers[self.labels.clamp(min=0)])  # junk has no name
        self.classes = tuple(classes)

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
        rows = torch.linspace(0, len(self) - 1, min(_SAMPLE, len(self)), dtype=torch.float64).long()
        some = self._read(rows)
        if some.ndim == 4 and space.channels not in (1, *some.shape[1:]):
            raise InputError(
                f"{self.role}: images have {some.shape[1]} channels, and normalization or bounds has {space.channels}; "
                "expected one number per channel, or one for all."
            )
        if self._given.is_read_anew and not torch.equal(some, self._read(rows)):
            raise InputError(
                f"{self.role}: the same image is another one when it is read again. Expected fixed images; take random "
                "crops, flips and other augmentation out of the data set's transform."
            )
        self._check_labels(rows)
        low, high = (float(value) for value in self._as_values(some).aminmax())
        is_normalised = space.normalization is not None and not (0 <= low <= high <= 1 or is_overshoot(low, high))
        said = []
        if is_normalised:
            self.space = space
            said.append("normalised images; the normalisation is undone before the attack and applied after it")
            low, high = (float(value) for value in self._as_values(some).aminmax())
        if len(some) > 1 and high - low < _NARROW:
            said.append(
                f"values of {len(some)} images lie between {low:.3g} and {high:.3g} of a range from 0 to 1, beside "
                "which an eps is large; were they divided by 255 twice?"
            )
        return f"{self.role}: {'; '.join(said)}" if said else None

    def _as_values(self, images: Tensor) -> Tensor:
        """Images on the scale on which bounds are 0 and 1, whether they lie within or not."""
        return self.space.scaled(images) if images.is_floating_point() and images.numel() else torch.zeros(1)

    def _read(self, index: Tensor) -> Tensor:
        found = self._given.read(index)
        images = found if isinstance(found, Tensor) else torch.as_tensor(found)
        if not images.is_floating_point() and not images.is_complex() and self.space.bounds is not None:
            images = images.to(self.dtype)
        images = images.detach().to(self.device)
        self.given_dtype = images.dtype
        if images.is_floating_point():
            images = images.to(self.dtype)
        return (images.clone() if images.is_inference() else images).contiguous()

    def _check_labels(self, rows: Tensor) -> None:
        carried = self._given.carried
        if carried is None or self.label_sets is not None:
            return
        for row, label in zip(rows.tolist(), self._given.labels[rows].tolist(), strict=True):
            found = carried(row)
            if isinstance(found, str) or len(getattr(found, "shape", ())) or isinstance(found, list | tuple):
                return  # names or rows of 0 and 1, where the list has numbers
            if int(found) != label:
                raise InputError(
                    f"{self.role}: image {row} carries the label {found}, but the data set's list of labels says "
                    f"{label}. Expected the same; delete or mend the data set's attribute targets (or labels)."
                )

    def _label_sets(self, labels: Tensor, count: int) -> Tensor | None:
        if labels.ndim != 2 or labels.shape[0] != count or labels.shape[1] < 2 or labels.is_complex():
            return None
        if not bool(((labels == 0) | (labels == 1)).all()):
            return None
        return labels.to(self.device, torch.bool)
