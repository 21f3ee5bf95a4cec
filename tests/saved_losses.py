"""Losses by what a state dict holds of them, and whether two states are the same."""

import torch
from pytorch_metric_learning import losses
from torch import nn

from pml_adversarial import AdversarialLoss

KINDS = {
    "no parameters": losses.TripletMarginLoss,
    "parameters": lambda: losses.ArcFaceLoss(4, 4),
    "memory": lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 40),
    "parameters and memory": lambda: losses.CrossBatchMemory(losses.MarginLoss(learn_beta=True, num_classes=4), 4, 40),
}


class WithLoss(nn.Module):
    """A model that holds its loss, as Lightning modules do."""

    def __init__(self, wrapped, **options):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.parts = nn.ModuleDict({"loss": AdversarialLoss(wrapped, self.net, seed=3, warmup=4, **options)})

    @property
    def loss(self):
        return self.parts["loss"]

    def step(self, images, labels):
        loss = self.loss(self.net(images), labels)
        loss.backward()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0
                parameter.grad = None
        return loss.item()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)  # what has not been measured is NaN
