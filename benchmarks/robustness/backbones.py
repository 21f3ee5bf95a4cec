"""Networks that turn pixels in [0, 1] into embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.omniglot import network
from pml_adversarial.cli.experiment import small_network
from pml_adversarial.errors import InputError

Shape = tuple[int, ...]
"""Of one image: channels, height, width."""

WIDTH = 0.3  # of the range of brightness over which a threshold rises


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
        found.conv1 = nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)
    found.fc = nn.Linear(found.fc.in_features, 512)
    return nn.Sequential(Standardized(), found) if pretrained else found


@torch.no_grad()
def start_as_thresholds(network: nn.Module, images: Tensor) -> None:
    """Gives a network first weights with which it sees which pixels are bright, and not how bright they are.

    Where strokes are nearly white on nearly black, what moves a pixel by less than its distance to the middle then
    changes nothing. Networks that are trained adversarially on MNIST come to such filters by themselves (Madry et al.,
    arXiv 1706.06083, appendix C); this spares the training that it takes. All weights are trained as ever.

    Each of the first convolution's filters looks at one pixel, of four neighbours. Filters come in pairs: the
    difference of their outputs rises from 0 to 1 over a range of `WIDTH` of the pixel's brightness, or falls; the
    second convolution starts with opposite weights for the two. Ranges lie around different middles.

    Args:
        network: whose modules start with a convolution over one channel, with 16 filters or more, perhaps a BatchNorm,
            a ReLU and another convolution.
        images: ``(N, 1, H, W)``, for the statistics that BatchNorm will find.
    """
    modules = list(network.modules())
    first, second = [module for module in modules if isinstance(module, nn.Conv2d)][:2]
    after, centre = modules[modules.index(first) + 1], first.kernel_size[0] // 2
    middles = 0.3 + 0.4 * (torch.arange(count := first.out_channels // 16) + 0.5) / count
    offsets = []
    for pair, (middle, down, right, sign) in enumerate(product(middles.tolist(), (0, 1), (0, 1), (1, -1))):
        first.weight[2 * pair : 2 * pair + 2] = 0
        first.weight[2 * pair : 2 * pair + 2, 0, centre + down, centre + right] = sign / WIDTH
        second.weight[:, 2 * pair + 1] = -second.weight[:, 2 * pair]
        offsets += [0.5 - sign * middle / WIDTH, -0.5 - sign * middle / WIDTH]
    filters, offset = slice(len(offsets)), torch.tensor(offsets)
    if first.bias is not None:
        first.bias[filters] = offset
    if isinstance(after, nn.BatchNorm2d):
        deviation, mean = torch.std_mean(first(images), (0, 2, 3))
        after.weight[filters] = deviation[filters]
        after.bias[filters] = mean[filters] + (0 if first.bias is not None else offset)


SMALL: dict[str, tuple[Shape | None, Callable[[Shape], nn.Module]]] = {
    "mlp": (None, mlp),
    "cnn": ((1, 8, 8), lambda shape: small_network()),
    "c2f2": ((1, 28, 28), lambda shape: network()),
    "c2f2-batchnorm": ((1, 28, 28), lambda shape: network(batchnorm=True)),
}
"""Name -> the only images that it is for, None for any, and how it is made."""

RESNETS = {"resnet18": torchvision.models.resnet18, "resnet50": torchvision.models.resnet50}
BACKBONES = (*SMALL, *RESNETS)


def check(name: str, shape: Shape, pretrained: bool = False, thresholds: bool = False) -> None:
    """Refuses what `build` and `start_as_thresholds` cannot make.

    Raises:
        InputError: there is no such network, or it is for other images, or has no weights, or no place for thresholds.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone={name!r}; expected one of {', '.join(BACKBONES)}.")
    expected = SMALL[name][0] if name in SMALL else None
    if expected not in (None, shape):
        raise InputError(f"{name} is for images {expected}; found {shape}. Choose another of {', '.join(BACKBONES)}.")
    if pretrained and name not in RESNETS:
        raise InputError(f"There are no ImageNet weights of {name}; expected one of {', '.join(RESNETS)}.")
    if pretrained and shape[0] != 3:
        raise InputError(f"ImageNet's weights are for 3 channels; images have {shape[0]}. Leave out --pretrained.")
    if thresholds and (shape[0] != 1 or name == "mlp"):
        raise InputError(
            f"Thresholds are the first weights of a convolution over one channel; found {name}, {shape[0]} channels. "
            "Say --no-thresholds."
        )


def build(name: str, shape: Shape, pretrained: bool = False) -> nn.Module:
    """A network for images of one shape; ImageNet's weights are fetched where they are not there.

    Raises:
        InputError: see `check`.
    """
    check(name, shape, pretrained)
    return resnet(RESNETS[name], shape, pretrained) if name in RESNETS else SMALL[name][1](shape)
