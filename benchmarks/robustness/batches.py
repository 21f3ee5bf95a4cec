"""What each step trains on: a function of seed and step alone, so that a resumed run sees what an unbroken one does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pml_adversarial.errors import InputError
from pml_adversarial.training.isolation import random_stream

from .data import Part, Rotated, mixed
from .protocol import Protocol

_OWN = 1 << 40  # a stream of random numbers that neither the attack nor the loop draws from


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """P classes with K different images each; images of a class stand side by side.

    Args:
        part: images of the training classes.
        protocol: says P, K, how much images are augmented, and whether classes are turned.
        seed: of the choice.

    Raises:
        InputError: there are too few classes with enough images.
    """

    def __init__(self, part: Part, protocol: Protocol, seed: int) -> None:
        self.images = Rotated(part) if protocol.rotations else part
        self.protocol, self.seed = protocol, seed
        _, self.labels = self.images.labels.unique(return_inverse=True)
        counts = torch.bincount(self.labels)
        rows = self.labels.argsort(stable=True).split(counts.tolist())
        self.members = [of_class for of_class in rows if len(of_class) >= protocol.per_class]
        if len(self.members) < protocol.classes:
            raise InputError(
                f"A batch of {protocol.classes} classes with {protocol.per_class} images each; found "
                f"{len(self.members)} training classes with so many. Use a smaller --batch."
            )

    @property
    def num_classes(self) -> int:
        """Those of all labels."""
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return 1 << 31  # there is no last one

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images ``(P K, C, H, W)`` and labels ``(P K,)`` from 0 on."""
        with random_stream(self.seed + _OWN, step):
            rows = self._drawn()
            pixels = self.images.pixels(rows, self.protocol.augment)
            return mixed(pixels) if self.protocol.mixed else pixels, self.labels[rows]

    def rows(self, step: int) -> Tensor:
        """``(P K,)`` which images, turned ones counted as further ones, are those of a step."""
        with random_stream(self.seed + _OWN, step):
            return self._drawn()

    def after(self, step: int, workers: int = 0, replays: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from a step on, each for so many steps, read by other processes if there are workers."""
        sampler = (number // replays for number in range(step, len(self)))
        return iter(DataLoader(self, batch_size=None, sampler=sampler, num_workers=workers))

    def _drawn(self) -> Tensor:
        chosen = torch.randperm(len(self.members))[: self.protocol.classes].tolist()
        return torch.cat([self._some_of(self.members[label]) for label in chosen])

    def _some_of(self, rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows))[: self.protocol.per_class]]
