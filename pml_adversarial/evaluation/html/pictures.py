"""Images as data URIs that every browser shows."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

_FACTORS = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]


def visible(image: Tensor) -> Tensor:
    """``(C, H, W)`` as grey or RGB: of other numbers of channels the mean."""
    image = torch.nan_to_num(image.detach().float().cpu())
    return image if len(image) in (1, 3) else image.mean(0, keepdim=True)


def magnified(clean: Tensor, perturbed: Tensor) -> tuple[Tensor, int]:
    """The difference of two images about grey, and by which round factor it fills the range without leaving it."""
    difference = visible(perturbed.detach().float() - clean.detach().float())
    room = 0.5 / max(difference.abs().max().item(), 1e-12) * (1 + 1e-4)  # pixels are rounded, so may the room be
    factor = max((factor for factor in _FACTORS if factor <= room), default=1) if difference.any() else 1
    return 0.5 + factor * difference, factor


def small(image: Tensor, side: int) -> Tensor:
    """An image of at most twice ``side`` pixels each way, by means of squares; small ones stay as they are."""
    window = -(-max(image.shape[-2:]) // (2 * side))
    return avg_pool2d(image, window, ceil_mode=True) if window > 1 else image


def data_uri(image: Tensor) -> str:
    """A PNG in a data URI.

    Args:
        image: ``(1, H, W)`` or ``(3, H, W)``, held to [0, 1].
    """
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    height, width, channels = pixels.shape
    header = struct.pack(">2I5B", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines, 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
