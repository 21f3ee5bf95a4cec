"""Networks that turn pixels in [0, 1] into embeddings."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.omniglot import network
from pml_adversarial.cli.experiment import small_network
from pml_adversarial.errors import InputError
from pml_adversarial.training.isolation import preserved

Shape = tuple[int, ...]
"""Of one image: channels, height, width."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of torchvision's weights
_OF_PIXELS = ("0.mean", "0.deviation")  # buffers of `Standardized`
WIDTH = 0.3  # of the range of brightness over which a threshold rises


class Standardized(nn.Module):
    """Pixels in [0, 1], with the mean and deviation that pretrained weights expect; by default torchvision's."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET[0], deviation: Sequence[float] = IMAGENET[1]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).reshape(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """``(N, 3, H, W)`` each."""
        return (pixels - self.mean) / self.deviation


def mlp(shape: Shape) -> nn.Module:
    """One hidden layer, 64-dimensional."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 256), nn.ReLU(), nn.Linear(256, 64))


def resnet(make: Callable[..., nn.Module], shape: Shape, pretrained: str) -> nn.Module:
    """A ResNet of torchvision with a linear layer to 512 dimensions, and with as many input channels as images have."""
    found: Any = make(weights="IMAGENET1K_V1" if pretrained else None)
    if shape[0] != 3:
        found.conv1 = nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)
    found.fc = nn.Linear(found.fc.in_features, 512)
    return nn.Sequential(Standardized(), found) if pretrained else found


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut; the first has the stride."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.activation = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """``(N, before, H, W)`` -> ``(N, after, H / stride, W / stride)``."""
        found: Tensor = self.activation(self.convolutions(images) + self.shortcut(images))
        return found


def slim_resnet(shape: Shape = (3, 32, 32)) -> nn.Sequential:
    """Three residual blocks of 24, 48 and 96 channels, 96-dimensional: 170 thousand parameters."""
    return nn.Sequential(Block(shape[0], 24, 1), Block(24, 48, 2), Block(48, 96, 2), *_POOLED())


def lite0(shape: Shape) -> nn.Module:
    """EfficientNet-Lite0 of timm, 1280-dimensional, for pixels of mean and deviation 0.5."""
    try:
        import timm
    except ImportError as error:
        raise InputError("--backbone lite0 is made by timm; install it: pip install timm.") from error
    return nn.Sequential(Standardized([0.5] * 3, [0.5] * 3), timm.create_model("tf_efficientnet_lite0", num_classes=0))


def mobilenet(shape: Shape) -> nn.Module:
    """MobileNetV2 of torchvision without its classifier, 1280-dimensional."""
    return nn.Sequential(Standardized(), nn.Sequential(torchvision.models.mobilenet_v2().features, *_POOLED()))


def _POOLED() -> tuple[nn.Module, nn.Module]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


def load_weights(model: nn.Module, path: Path) -> None:
    """Gives a network the weights of a file: a state dict with its own names, or with other names in the same order.

    Tensors that follow in the file, such as a classifier's, are left out.

    Raises:
        InputError: the file cannot be read, or holds the weights of another network.
    """
    try:
        found: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no state dict makes of it
        raise InputError(f"--pretrained {path} cannot be read: {str(error).splitlines()[0]}") from error
    target = model.state_dict()
    if set(target) <= set(found):
        model.load_state_dict({name: found[name] for name in target})
        return
    own = {name: value for name, value in target.items() if not name.startswith(_OF_PIXELS)}
    others = dict(zip(own, found.values(), strict=False))
    wrong = [name for name, value in own.items() if name not in others or others[name].shape != value.shape]
    if wrong:
        raise InputError(
            f"--pretrained {path} holds the weights of another network: {len(wrong)} of {len(own)} tensors are missing "
            f"or have another shape, first {wrong[0]}. Choose the --backbone that they are of."
        )
    model.load_state_dict({**target, **others})


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
    "slim-resnet": (None, slim_resnet),
    "lite0": (None, lite0),
    "mobilenetv2": (None, mobilenet),
}
"""Name -> the only images that it is for, None for any, and how it is made."""

RESNETS = {"resnet18": torchvision.models.resnet18, "resnet50": torchvision.models.resnet50}
BACKBONES = (*SMALL, *RESNETS)
PRETRAINED_BY_FILE = ("slim-resnet", "lite0", "mobilenetv2")
IMAGENET_WEIGHTS = "imagenet"  # torchvision's, which it fetches where they are not there


def check(name: str, shape: Shape, pretrained: str = "", thresholds: bool = False) -> None:
    """Refuses what `build`, `load_weights` and `start_as_thresholds` cannot make.

    Raises:
        InputError: there is no such network, or it is for other images, or has no weights, or no place for thresholds.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone={name!r}; expected one of {', '.join(BACKBONES)}.")
    expected = SMALL[name][0] if name in SMALL else None
    if expected not in (None, shape):
        raise InputError(f"{name} is for images {expected}; found {shape}. Choose another of {', '.join(BACKBONES)}.")
    if pretrained == IMAGENET_WEIGHTS and name not in RESNETS:
        raise InputError(
            f"There are no ImageNet weights of {name}; expected one of {', '.join(RESNETS)}, or the file of weights: "
            "--pretrained FILE."
        )
    if pretrained not in ("", IMAGENET_WEIGHTS) and name not in PRETRAINED_BY_FILE:
        raise InputError(f"--pretrained {pretrained} is for {', '.join(PRETRAINED_BY_FILE)}; found {name}.")
    if (pretrained or name in ("lite0", "mobilenetv2")) and shape[0] != 3:
        raise InputError(
            f"{name}{' and pretrained weights' if pretrained else ''} expect 3 channels; images have {shape[0]}."
        )
    if thresholds and (shape[0] != 1 or name in ("mlp", "slim-resnet")):
        raise InputError(
            f"Thresholds are the first weights of a convolution over one channel; found {name}, {shape[0]} channels. "
            "Say --no-thresholds."
        )


def build(name: str, shape: Shape, pretrained: str = "", head: int = 0) -> nn.Module:
    """A network for images of one shape.

    Args:
        name: one of `BACKBONES`.
        shape: of an image.
        pretrained: "imagenet" for torchvision's weights. Those of a file are given by `load_weights` afterwards.
        head: dimensions of a linear layer on top of the network; 0: none.

    Returns:
        The network, or with a head both as ``trunk`` and ``head``.

    Raises:
        InputError: see `check`.
    """
    check(name, shape, pretrained)
    trunk = resnet(RESNETS[name], shape, pretrained) if name in RESNETS else SMALL[name][1](shape)
    if not head:
        return trunk
    features = num_dimensions(trunk, torch.zeros(1, *shape))
    return nn.Sequential(OrderedDict(trunk=trunk, head=nn.Linear(features, head)))


def smooth(network: nn.Module) -> nn.Module:
    """The same network with SiLU in place of ReLU (Xie et al., "Smooth Adversarial Training", arXiv 2006.14536)."""
    for module in network.modules():
        for name, part in module.named_children():
            if isinstance(part, nn.ReLU | nn.ReLU6):
                setattr(module, name, nn.SiLU())
    return network


def num_dimensions(network: nn.Module, images: Tensor) -> int:
    """Of an embedding; the network stays as it is."""
    with torch.no_grad(), preserved(network):
        found: int = network.eval()(images[:1]).shape[1]
    return found
