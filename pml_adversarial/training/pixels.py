"""Converts the model's inputs to the pixels in [0, 1] that an attack changes, checks them, and converts them back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

Normalization = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel, as in ``torchvision.transforms.Normalize``."""

_TOLERANCE = 1e-4  # beyond [0, 1]: a fortieth of an 8-bit level. Coarse types may exceed it by a few rounding errors


class PixelSpace:
    """Converts the model's inputs to pixels in [0, 1], and pixels to the model's inputs.

    Args:
        normalization: ``(mean, std)`` if the model takes normalised inputs; None if it takes pixels.

    Raises:
        InputError: ``normalization`` is not a pair of mean and standard deviation with one number per channel.
    """

    def __init__(self, normalization: Normalization | None = None) -> None:
        self.normalization = normalization
        if normalization is not None and not _is_usable(normalization):
            raise InputError(
                f"normalization={normalization!r}; expected (mean, std), each with one number per channel, std above "
                "0. Pass the two values that you gave to torchvision.transforms.Normalize."
            )

    def to_pixels(self, inputs: Tensor) -> Tensor:
        """Converts inputs ``(N, C, ...)`` as the model took them to pixels of the same shape, and checks them.

        Raises:
            InputError: the inputs are integers, sparse, empty or not finite, or their pixels lie outside [0, 1].
        """
        if not inputs.is_floating_point():
            raise InputError(
                f"The model's inputs are {inputs.dtype}; expected floating point in [0, 1]. Convert the images with "
                "`images.float() / 255` before they enter the model."
            )
        if inputs.layout != torch.strided or (len(inputs) and not inputs.numel()):
            raise InputError(
                f"The model's inputs are {inputs.layout} of shape {tuple(inputs.shape)}; expected dense pixels, one or "
                "more per row. Pass images as a dense tensor (N, C, ...)."
            )
        pixels = inputs
        if self.normalization is not None:
            pixels = inputs * self._channels(inputs, 1) + self._channels(inputs, 0)
        low, high = torch.stack(torch.aminmax(pixels)).tolist() if pixels.numel() else (0.0, 0.0)
        tolerance = max(_TOLERANCE, 4 * torch.finfo(pixels.dtype).eps)
        if not -tolerance <= low <= high <= 1 + tolerance:
            raise InputError(self._explain(pixels, low, high))
        return pixels.clamp(0, 1)

    def to_inputs(self, pixels: Tensor) -> Tensor:
        """Converts pixels ``(N, C, ...)`` to inputs of the model, of the same shape."""
        if self.normalization is None:
            return pixels
        return (pixels - self._channels(pixels, 0)) / self._channels(pixels, 1)

    def _channels(self, like: Tensor, which: int) -> Tensor:
        values = torch.as_tensor(self.normalization[which], dtype=like.dtype, device=like.device)  # type: ignore[index]
        channels = like.shape[1] if like.ndim > 1 else 1
        if len(values) not in (1, channels):
            raise InputError(
                f"normalization has {len(values)} channels, the inputs {tuple(like.shape)} have {channels}; expected "
                "as many. Pass one mean and one std per channel."
            )
        return values.reshape(-1, *[1] * (like.ndim - 2))

    def _explain(self, pixels: Tensor, low: float, high: float) -> str:
        if bad := int((~pixels.isfinite()).reshape(len(pixels), -1).any(1).sum()):
            return (
                f"{bad} of {len(pixels)} inputs hold NaN or infinite values; expected finite pixels in [0, 1]. Look "
                "for the step that made them, in the data set or in the augmentation."
            )
        if self.normalization is None:
            return (
                f"The model's inputs range from {low:.3g} to {high:.3g}; expected pixels in [0, 1]. If they are "
                "normalised, pass normalization=(mean, std); if they are 0 to 255, divide them by 255."
            )
        return (
            f"With normalization={self.normalization} undone, the inputs range from {low:.3g} to {high:.3g}; expected "
            "pixels in [0, 1]. Pass the mean and std with which the inputs were normalised."
        )


def _is_usable(normalization: Normalization) -> bool:
    try:
        mean, std = normalization
        return len(mean) == len(std) > 0 and all(map(math.isfinite, mean)) and all(s > 0 for s in std)
    except (TypeError, ValueError):
        return False
