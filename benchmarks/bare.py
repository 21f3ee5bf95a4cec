"""What a step of adversarial training cannot spare, written by hand, and the small network in which it is counted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class UnitNorm(nn.Module):
    """Embeddings on the unit sphere."""

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scales rows to length 1."""
        return normalize(embeddings)


def small_cnn() -> nn.Sequential:
    """Two convolutions for 28x28 images of one channel."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        UnitNorm(),
    )


def attack_by_hand(
    model: nn.Module, images: Tensor, labels: Tensor, context: Tensor, *, eps: float, alpha: float, steps: int
) -> Tensor:
    """PGD on the furthest positive and the nearest negative of each image among the fixed embeddings ``context``."""
    same = labels.unsqueeze(1) == labels
    wrong_or_itself = ~same | torch.eye(len(same), dtype=torch.bool, device=same.device)
    model.requires_grad_(False)
    perturbed = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        perturbed.requires_grad_(True)
        distances = torch.cdist(model(perturbed), context)
        furthest = distances.masked_fill(wrong_or_itself, -torch.inf).amax(1)
        nearest = distances.masked_fill(same, torch.inf).amin(1)
        (gradient,) = torch.autograd.grad((furthest - nearest).sum(), perturbed)
        moved = perturbed.detach() + alpha * gradient.sign()
        perturbed = (images + (moved - images).clamp(-eps, eps)).clamp(0, 1)
    model.requires_grad_(True)
    return perturbed
