"""Everything that defines a training run, and the two protocols that have names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torchattacks

from pml_adversarial.errors import InputError

from .backbones import IMAGENET_WEIGHTS
from .data import PHOTOGRAPHS

PRECISIONS, SCHEDULES, AVERAGES = ("float32", "bfloat16"), ("constant", "cosine"), ("", "ema", "swa")
TUNED = ("all", "head", "lora")

PROTOCOLS: dict[str, dict[str, Any]] = {
    "peers": {"steps": 300, "schedule": "constant", "augment": 0.0, "rotations": False},
    "helped": {"budget": 500_000, "schedule": "cosine", "augment": 1.0, "rotations": True},
}
"""``peers``: short, as other papers' code trains at 28x28. ``helped``: with what plain training profits from too."""

HELPED: dict[str, dict[str, Any]] = {
    "omniglot": {
        "augment": 0.5,
        "learning_rate": 5e-4,
        "thresholds": True,
        "preset_eps": 77 / 255,
    },
    **{name: {"rotations": False} for name in PHOTOGRAPHS},
}
"""What ``helped`` means for some data instead, chosen by training alphabets that were held out."""

_SMALL = {"eps": 77 / 255, "alpha": 3 / 255, "preset_eps": 40 / 255, "learning_rate": 1e-3}
_PHOTOS = {
    "eps": 8 / 255,
    "alpha": 1 / 255,
    "preset_eps": 8 / 255,
    "learning_rate": 1e-5,
    "weight_decay": 4e-4,
    "backbone": "resnet18",
}
DATA: dict[str, dict[str, Any]] = {
    "digits": {**_SMALL, "backbone": "cnn", "classes": 5, "per_class": 22},
    "omniglot": {**_SMALL, "backbone": "c2f2"},
    "cub": _PHOTOS,
    "cars": _PHOTOS,
    "sop": _PHOTOS,
    "tiny-imagenet": {
        **_PHOTOS,
        "preset_eps": 4 / 255,
        "learning_rate": 2e-3,
        "weight_decay": 0.0,
        "backbone": "slim-resnet",
        "classes": 32,
        "per_class": 4,
    },
}
"""What differs by data: that of RobRank's code at 28x28 and at 224x224 (arXiv 2106.03614)."""


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Attributes:
        data: name of the data.
        backbone: name of the network.
        steps: optimiser steps; plain training takes twice as many. 0 where there is a budget.
        budget: image passes after which training ends, in place of steps; 0 for none.
        classes: classes of a batch.
        per_class: images of each of them.
        learning_rate: of Adam.
        head_rate: how many times the learning rate the head and the loss's own weights have.
        weight_decay: of Adam.
        schedule: of the learning rate, "constant" or "cosine" (down to 0).
        augment: how much training images are changed at random; 0: not at all, 1: as `benchmarks.omniglot` does.
            Photographs know only whether.
        mixed: whether each training image is blended with another one, for methods that use no labels.
        rotations: whether quarter turns of a class are further classes.
        thresholds: whether the first convolution starts as thresholds of pixels, see `backbones.start_as_thresholds`.
        eps: l-inf radius of training attacks, in pixels of [0, 1].
        alpha: their step.
        attack_steps: how many.
        preset_eps: the radius that the package's own preset trains with.
        precision: "float32", or "bfloat16" for autocast around model and loss.
        size: side of photographs; 0 where data has its own.
        pretrained: "imagenet" for torchvision's weights, or the name of a file of weights; "": random weights.
        head: dimensions of a linear layer on top of the network; 0: none.
        frozen_batchnorm: whether BatchNorm stays in eval mode.
        validation_classes: training classes, the last by label, that are held out and searched in place of the test
            classes; 0: none.
        tuned: which weights are trained: "all", those of the "head", or with it a low-rank change of each convolution
            and linear layer below ("lora", arXiv 2106.09685). In both, BatchNorm stays in eval mode.
        average: whether the weights of training steps are averaged: "ema" (exponentially), "swa" (those of the last
            quarter, equally), "" (not).
        compiled: whether networks are compiled by torch.compile.
        smooth: whether the network that is trained has SiLU in place of ReLU, see `backbones.smooth`.
    """

    data: str
    backbone: str
    steps: int = 0
    budget: int = 0
    classes: int = 56
    per_class: int = 2
    learning_rate: float = 1e-3
    head_rate: float = 1.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    augment: float = 0.0
    mixed: bool = False
    rotations: bool = False
    thresholds: bool = False
    eps: float = 77 / 255
    alpha: float = 3 / 255
    attack_steps: int = 32
    preset_eps: float = 40 / 255
    precision: str = "float32"
    size: int = 0
    pretrained: str = ""
    head: int = 0
    frozen_batchnorm: bool = False
    validation_classes: int = 0
    tuned: str = "all"
    average: str = ""
    compiled: bool = False
    smooth: bool = False

    def __post_init__(self) -> None:
        positive = ("classes", "per_class", "attack_steps", "learning_rate", "eps", "alpha", "preset_eps", "head_rate")
        wrong = [f"{name}={getattr(self, name)}" for name in positive if getattr(self, name) <= 0]
        if wrong:
            raise InputError(f"{', '.join(wrong)}; expected numbers above 0.")
        if self.classes < 2 or self.per_class < 2:
            raise InputError(
                f"A batch of {self.classes} classes with {self.per_class} images each holds no triplets; expected two "
                "of each at least."
            )
        if (self.steps > 0) == (self.budget > 0) or min(self.steps, self.budget) < 0:
            raise InputError(f"steps={self.steps}, budget={self.budget}; expected one of them, above 0.")
        if self.augment < 0:
            raise InputError(f"augment={self.augment}; expected a strength from 0 on.")
        for name, known in (
            ("precision", PRECISIONS),
            ("schedule", SCHEDULES),
            ("average", AVERAGES),
            ("tuned", TUNED),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}; expected one of {known}.")

        if self.tuned == "head" and not self.head:
            raise InputError("tuned='head' trains the head alone, and there is none. Give its dimensions, --head 128.")

    @property
    def batch(self) -> int:
        """Images of a batch."""
        return self.classes * self.per_class

    def pgd(self, **changed: Any) -> partial[Any]:
        """The attack that methods train with: sign steps from the image itself, projected to the l-inf ball."""
        budget = {"eps": self.eps, "alpha": self.alpha, "steps": self.attack_steps, "random_start": False}
        return partial(torchattacks.PGD, **{**budget, **changed})

    def described(self) -> dict[str, Any]:
        """In JSON's types; a file of weights by its name and the start of its SHA-256, wherever it lies."""
        found = asdict(self)
        if self.pretrained not in ("", IMAGENET_WEIGHTS):
            path = Path(self.pretrained)
            found["pretrained"] = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        return found


def named(name: str, data: str, changed: Mapping[str, Any]) -> Protocol:
    """A protocol by name, for some data, with what was asked otherwise; None is no wish.

    Raises:
        InputError: there is no such protocol or data, or options contradict one another.
    """
    for value, known in ((name, PROTOCOLS), (data, DATA)):
        if value not in known:
            raise InputError(f"Found {value!r}; expected one of {', '.join(known)}.")
    wishes = {key: value for key, value in changed.items() if value is not None}
    by_data = HELPED.get(data, {}) if name == "helped" else {}
    chosen = {**DATA[data], **PROTOCOLS[name], **by_data, "data": data}
    if "steps" in wishes or "budget" in wishes:
        chosen.pop("steps", None), chosen.pop("budget", None)
    return Protocol(**{**chosen, **wishes})
