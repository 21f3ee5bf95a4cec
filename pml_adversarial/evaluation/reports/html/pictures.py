"""Images as part of an HTML page."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

_FACTORS = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
_PIXELATED_BELOW = 80  # pixels each way; of smaller images, each pixel is drawn as a square


def picture(image: Tensor, description: str, caption: str) -> dict[str, Any]:
    """An image ``(1, H, W)`` or ``(3, H, W)`` as the template takes it; the description is for who does not see it."""
    height, width = image.shape[-2:]
    size = {"width": width, "height": height, "pixelated": max(height, width) < _PIXELATED_BELOW}
    return {"uri": data_uri(image), "description": description, "caption": caption, **size}


def visible(image: Tensor) -> Tensor:
    """An image ``(C, H, W)`` in grey or RGB. Of any other number of channels, the mean is shown."""
    image = torch.nan_to_num(image.detach().float().cpu())
    return image if len(image) in (1, 3) else image.mean(0, keepdim=True)


def magnified(clean: Tensor, perturbed: Tensor) -> tuple[Tensor, int]:
    """The difference of two images around grey, and the largest round factor at which it stays within [0, 1]."""
    difference = visible(perturbed.detach().float() - clean.detach().float())
    room = 0.5 / max(difference.abs().max().item(), 1e-12) * (1 + 1e-4)  # pixels are rounded
    factor = max((factor for factor in _FACTORS if factor <= room), default=1) if difference.any() else 1
    return 0.5 + factor * difference, factor


def small(image: Tensor, side: int) -> Tensor:
    """An image of at most ``2 * side`` pixels each way; in larger ones, squares are replaced by their means."""
    window = -(-max(image.shape[-2:]) // (2 * side))
    return avg_pool2d(image, window, ceil_mode=True) if window > 1 else image


def data_uri(image: Tensor) -> str:
    """An image ``(1, H, W)`` or ``(3, H, W)``, clamped to [0, 1], as a PNG in a data URI."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    height, width, channels = pixels.shape
    header = struct.pack(">2I5B", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines, 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
