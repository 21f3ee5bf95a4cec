"""Converts a model's inputs to values in [0, 1], which an attack changes, checks them, and converts them back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

Normalization = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel, as in ``torchvision.transforms.Normalize``."""

Bounds = tuple[float | Sequence[float], float | Sequence[float]]
"""The lowest and the highest value of an input: a number, or one for each channel."""

_OVERSHOOT = 0.25  # beyond [0, 1]: more than resizing, sharpening and usual noise add
_TOLERANCE = 1e-4  # beyond [0, 1]: a fortieth of an 8-bit level. Coarse types may exceed it by a few rounding errors


class PixelSpace:
    """Converts the model's inputs to pixels in [0, 1], and pixels to the model's inputs.

    With ``bounds``, the inputs need not be images: 0 stands for the lower bound, 1 for the upper one. So eps counts as
    a share of the range.

    Args:
        normalization: ``(mean, std)`` if the model takes normalised inputs; None if it does not.
        bounds: ``(low, high)`` of the inputs before they were normalised; None: (0, 1).
        channel_dim: the dimension of the inputs that holds the channels; None: it is found out.

    Raises:
        InputError: ``normalization`` or ``bounds`` cannot be used.
    """

    def __init__(
        self,
        normalization: Normalization | None = None,
        bounds: Bounds | None = None,
        channel_dim: int | None = None,
    ) -> None:
        self.normalization, self.bounds, self.channel_dim = normalization, bounds, channel_dim
        mean: tuple[float, ...] = (0.0,)
        std: tuple[float, ...] = (1.0,)
        if normalization is not None:
            mean, std = _numbers(normalization)
            if not mean or min(std) <= 0 or any(isinstance(part, int | float) for part in normalization):
                raise InputError(
                    f"normalization={normalization!r}; expected (mean, std), each with one number per channel, std "
                    "above 0. Pass the two values that you gave to torchvision.transforms.Normalize."
                )
        low: tuple[float, ...] = (0.0,)
        high: tuple[float, ...] = (1.0,)
        if bounds is not None:
            low, high = _numbers(bounds)
            if not low or any(least >= most for least, most in zip(low, high, strict=True)):
                raise InputError(
                    f"bounds={bounds!r}; expected (low, high), two numbers or two lists with one number per channel, "
                    "each low below its high, such as bounds=(-1, 1)."
                )
        self._is_identity = normalization is None and bounds is None
        self.channels = max(len(mean), len(low))
        if not {len(mean), len(low)} <= {1, self.channels}:
            raise InputError(
                f"normalization has {len(mean)} channels, and bounds have {len(low)}; expected as many, or one."
            )
        mean, std, low, high = (values * (self.channels // len(values)) for values in (mean, std, low, high))
        outside = [m for m, least, most in zip(mean, low, high, strict=True) if not least <= m <= most]
        if normalization is not None and outside:
            raise InputError(
                f"normalization={normalization!r} has the mean {outside[0]:g}, and inputs lie from {min(low):g} to "
                f"{max(high):g} before they are normalised; expected means within. If mean and std are in levels of "
                "0..255, divide both by 255; if the inputs are in levels too, pass bounds=(0, 255)."
            )
        ranges = [most - least for least, most in zip(low, high, strict=True)]
        self._scale = [s / r for s, r in zip(std, ranges, strict=True)]
        self._shift = [(m - least) / r for m, least, r in zip(mean, low, ranges, strict=True)]

    def to_pixels(self, inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Converts inputs ``(N, ...)`` as the model took them to pixels of the same shape, and checks them.

        Args:
            inputs: ``(N, ...)``.
            dtype: of the pixels; None: that of the inputs.

        Raises:
            InputError: the inputs are integers, sparse, empty or not finite, or their pixels lie outside [0, 1].
        """
        if not inputs.is_floating_point():
            raise InputError(
                f"The inputs are {inputs.dtype}; expected floating point in [0, 1]. Convert images with "
                "`images.float() / 255` before they enter the model; with at=..., name a module that gives floating "
                "point."
            )
        if inputs.layout != torch.strided or (len(inputs) and not inputs.numel()):
            raise InputError(
                f"The model's inputs are {inputs.layout} of shape {tuple(inputs.shape)}; expected dense pixels, one or "
                "more per row. Pass images as a dense tensor (N, C, ...)."
            )
        pixels = self.scaled(inputs if dtype in (None, inputs.dtype) else inputs.to(dtype))
        low, high = torch.stack(torch.aminmax(pixels)).tolist() if pixels.numel() else (0.0, 0.0)
        tolerance = max(_TOLERANCE, 4 * torch.finfo(inputs.dtype).eps)
        if not -tolerance <= low <= high <= 1 + tolerance:
            raise InputError(self._explain(inputs, pixels, low, high))
        return pixels.clamp(0, 1)

    def scaled(self, inputs: Tensor) -> Tensor:
        """The same without a check of what comes out."""
        if self._is_identity:
            return inputs
        return inputs * self._spread(self._scale, inputs) + self._spread(self._shift, inputs)

    def to_inputs(self, pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Converts pixels ``(N, ...)`` to inputs of the model, of the same shape.

        Args:
            pixels: in [0, 1].
            dtype: of the inputs, to which their values are rounded; None: that of the pixels.
        """
        inputs = pixels
        if not self._is_identity:
            inputs = (pixels - self._spread(self._shift, pixels)) / self._spread(self._scale, pixels)
        return inputs if dtype in (None, inputs.dtype) else inputs.to(dtype)

    def _spread(self, values: Sequence[float], like: Tensor) -> Tensor:
        """One number per channel, in a shape that goes with the inputs."""
        found = torch.tensor(values, dtype=like.dtype, device=like.device)
        if self.channels == 1:
            return found
        shape = [1] * like.ndim
        shape[self._channel_dim_of(like)] = self.channels
        return found.reshape(shape)

    def _channel_dim_of(self, like: Tensor) -> int:
        if self.channel_dim is not None:
            fitting = [self.channel_dim % like.ndim] if -like.ndim <= self.channel_dim < like.ndim else []
        else:
            fitting = list(range(1, like.ndim))
        fitting = [dim for dim in fitting if like.shape[dim] == self.channels]
        if len(fitting) > 1 and like.ndim == 4 and fitting[0] == 1:
            return 1  # images (N, C, H, W), whose height or width is the number of channels by chance
        if len(fitting) != 1:
            given = "normalization" if self.normalization is not None else "bounds"
            raise InputError(
                f"{given} has {self.channels} channels, and of the inputs {tuple(like.shape)} "
                f"{'no dimension' if not fitting else 'more than one dimension'} has as many; expected one mean and "
                "one std per channel, and channel_dim=... where it cannot be told, such as channel_dim=-3 for clips "
                "(N, T, C, H, W). To an evaluation, pass pixels in [0, 1] and a function that normalises them, such as "
                "lambda images: model((images - mean) / std)."
            )
        return fitting[0]

    def _explain(self, inputs: Tensor, pixels: Tensor, low: float, high: float) -> str:
        if bad := int((~pixels.isfinite()).reshape(len(pixels), -1).any(1).sum()):
            return (
                f"{bad} of {len(pixels)} inputs hold NaN or infinite values; expected finite pixels in [0, 1]. Look "
                "for the step that made them, in the data set or in the augmentation."
            )
        if self.bounds is not None:
            least, most = inputs.aminmax()
            return (
                f"The model's inputs range from {float(least):.3g} to {float(most):.3g}, beyond "
                f"bounds={self.bounds!r}. Give bounds that hold all inputs, or clamp the inputs to them."
            )
        if self.normalization is None and is_overshoot(low, high):
            return (
                f"The model's inputs range from {low:.3g} to {high:.3g}; expected pixels in [0, 1]. If a resize by a "
                "bicubic or Lanczos filter, sharpening or noise made them, clamp the images after it, "
                "images.clamp(0, 1); if they are normalised, pass normalization=(mean, std)."
            )
        if self.normalization is None:
            return (
                f"The model's inputs range from {low:.3g} to {high:.3g}; expected pixels in [0, 1]. If they are "
                "normalised, pass normalization=(mean, std); if they are 0 to 255, divide them by 255; if they are no "
                "images, say their range with bounds=(low, high)."
            )
        return (
            f"With normalization={self.normalization} undone, the inputs range from {low:.3g} to {high:.3g}; expected "
            "pixels in [0, 1]. Pass the mean and std with which the inputs were normalised. If they are those, a step "
            "after the normalisation makes other values, such as random erasing or noise: clamp its output, between "
            "(0 - mean) / std and (1 - mean) / std."
        )


def is_overshoot(low: float, high: float) -> bool:
    """Whether values from ``low`` to ``high`` are outside of [0, 1] by so little that a filter may have made them."""
    return -_OVERSHOOT <= low <= high <= 1 + _OVERSHOOT and (low < 0 or high > 1)


def is_number(value: Any) -> bool:
    """Whether this is one number, which may be a tensor or an array without dimensions."""
    return isinstance(value, Real) or getattr(value, "ndim", None) == 0


def _numbers(pair: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Two numbers, or two lists of as many, as tuples; empty ones where it is something else."""
    try:
        one, other = ([float(part)] if is_number(part) else [float(v) for v in part] for part in pair)
        if len(one) == len(other) and all(map(math.isfinite, (*one, *other))):
            return tuple(one), tuple(other)
    except (TypeError, ValueError):
        pass
    return (), ()
