"""Small operations on embeddings that several folders share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def at_least_float(values: Tensor) -> Tensor:
    """The values in single precision, or in their own if that is higher."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit_length(embeddings: Tensor) -> Tensor:
    """Embeddings ``(..., D)`` divided by their Euclidean length, in single precision at least; zeros stay zeros."""
    return normalize(at_least_float(embeddings), dim=-1)
