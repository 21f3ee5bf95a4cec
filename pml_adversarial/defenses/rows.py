"""What the methods on rows share: every row is copied, and its copy is compared with the row itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import InputError
from ..training.batch import Batch
from ..training.numeric import at_least_float
from ..training.plan import Plan, replace_rows

_DISPLACED = 1e-4


def perturb_all(batch: Batch) -> Plan:
    """Every row with known inputs is replaced by its copy wherever it stands; the tuples are left to the caller's."""
    rows = torch.arange(batch.num_attackable, device=batch.embeddings.device)
    return replace_rows(rows, len(batch), batch.indices_tuple).split(batch.num_queries)


def on_sphere(embeddings: Tensor) -> Tensor:
    """``(M, D)`` embeddings at unit length, in single precision at least."""
    return normalize(at_least_float(embeddings))


def beside(embeddings: Tensor) -> Tensor:
    """``(M, D)`` embeddings at unit length, each moved by 0.0001 in a random direction.

    How far a copy is from its row has no slope at the row itself, so an attack without a random start would find no
    direction there. It finds one when the distance is taken from beside the row. Draws from torch's generator.
    """
    return on_sphere(embeddings) + _DISPLACED * on_sphere(torch.randn_like(embeddings))


def shift(left: Tensor, right: Tensor) -> Tensor:
    """``(M,)`` Euclidean distances in [0, 2] at unit length; where it is 0, so is its gradient."""
    return torch.linalg.vector_norm(on_sphere(left) - on_sphere(right), dim=1)


def check_weight(weight: Any) -> None:
    """Refuses what cannot weigh a term of the loss.

    Raises:
        InputError: it is no finite number from 0 on.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise InputError(f"weight={weight!r}; expected a finite number from 0 on, such as 1.0.")
