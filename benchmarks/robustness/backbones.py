"""Networks that turn pixels in [0, 1] into embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.omniglot import network
from pml_adversarial.demo import small_network
from pml_adversarial.errors import InputError

Shape = tuple[int, ...]
"""Of one image: channels, height, width."""


class Standardized(nn.Module):
    """Pixels in [0, 1], with the mean and deviation that ImageNet's weights expect."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """``(N, 3, H, W)`` each."""
        return (pixels - self.mean) / self.deviation


def mlp(shape: Shape) -> nn.Module:
    """One hidden layer, 64-dimensional."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 256), nn.ReLU(), nn.Linear(256, 64))


def resnet(make: Callable[..., nn.Module], shape: Shape, pretrained: bool) -> nn.Module:
    """A ResNet of torchvision with a linear layer to 512 dimensions, and with as many input channels as images have."""
    found: Any = make(weights="IMAGENET1K_V1" if pretrained else None)
    if shape[0] != 3:
        if pretrained:
            raise InputError(f"ImageNet's weights are for 3 channels; images have {shape[0]}. Leave out --pretrained.")
        found.conv1 = nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)
    found.fc = nn.Linear(found.fc.in_features, 512)
    return nn.Sequential(Standardized(), found) if pretrained else found


SMALL: dict[str, tuple[Shape | None, Callable[[Shape], nn.Module]]] = {
    "mlp": (None, mlp),
    "cnn": ((1, 8, 8), lambda shape: small_network()),
    "c2f2": ((1, 28, 28), lambda shape: network()),
    "c2f2-batchnorm": ((1, 28, 28), lambda shape: network(batchnorm=True)),
}
"""Name -> the only images that it is for, None for any, and how it is made."""

RESNETS = {"resnet18": torchvision.models.resnet18, "resnet50": torchvision.models.resnet50}
BACKBONES = (*SMALL, *RESNETS)


def build(name: str, shape: Shape, pretrained: bool = False) -> nn.Module:
    """A network for images of one shape.

    Raises:
        InputError: there is no such network, or it is for other images, or has no weights.
    """
    if name in RESNETS:
        return resnet(RESNETS[name], shape, pretrained)
    if name not in SMALL:
        raise InputError(f"backbone={name!r}; expected one of {', '.join(BACKBONES)}.")
    expected, make = SMALL[name]
    if expected not in (None, shape):
        raise InputError(f"{name} is for images {expected}; found {shape}. Choose another of {', '.join(BACKBONES)}.")
    if pretrained:
        raise InputError(f"There are no ImageNet weights of {name}; expected one of {', '.join(RESNETS)}.")
    return make(shape)
