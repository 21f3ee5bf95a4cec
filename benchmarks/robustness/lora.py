"""Which weights of a trained network are trained further: all, those of its head, or low-rank changes of the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

RANK = 8


class LowRank(nn.Module):
    """A weight plus the product of two thin matrices, which is 0 at first (Hu et al., arXiv 2106.09685).

    Args:
        weight: ``(out, in, ...)``.
        rank: of the product.
    """

    def __init__(self, weight: Tensor, rank: int = RANK) -> None:
        super().__init__()
        inside = weight[0].numel()
        rank = min(rank, inside, len(weight))
        self.down = nn.Parameter(torch.randn(rank, inside) / inside**0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + (self.up @ self.down).reshape(weight.shape)


def tune(model: nn.Module, tuned: str) -> None:
    """Freezes the weights that are not trained.

    Args:
        model: with modules ``trunk`` and ``head``, or without a head.
        tuned: "all", "head" or "lora", see `protocol.Protocol`.
    """
    if tuned == "all":
        return
    trunk = model.get_submodule("trunk") if hasattr(model, "trunk") else model
    trunk.requires_grad_(False)
    if tuned == "lora":
        for module in list(trunk.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                parametrize.register_parametrization(module, "weight", LowRank(module.weight))


def merged(model: nn.Module) -> nn.Module:
    """The same network with the changes added to its weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model
