"""What `EST`, `SES` and `TRADES` share: every row is perturbed, and its copy is compared with the row itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..training.batch import Batch
from ..training.numeric import unit_length
from ..training.plan import Plan, replace_rows

_DISPLACEMENT = 1e-4


def perturb_all_rows(batch: Batch) -> Plan:
    """A plan in which each row with known inputs is replaced by its copy, in all tuples; the tuples stay as given."""
    rows = torch.arange(batch.num_attackable, device=batch.embeddings.device)
    return replace_rows(rows, len(batch), batch.indices_tuple).split(batch.num_queries)


def embedding_shift(left: Tensor, right: Tensor) -> Tensor:
    """``(M,)`` Euclidean distances in [0, 2] of embeddings ``(M, D)`` at unit length; where 0, so is the gradient."""
    return torch.linalg.vector_norm(unit_length(left) - unit_length(right), dim=1)


def displaced(embeddings: Tensor) -> Tensor:
    """``(M, D)`` embeddings at unit length, each moved by 0.0001 in a random direction of torch's global generator.

    The distance of a copy from its row has no gradient at the row itself. Measured from a point close to the row it has
    one, so an attack needs no random start.
    """
    return unit_length(embeddings) + _DISPLACEMENT * unit_length(torch.randn_like(embeddings))
