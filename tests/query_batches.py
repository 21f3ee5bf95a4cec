"""A small retrieval problem that attacks break in part: images around patterns and a random network."""

import pytest
import torch
from torch import nn

from pml_adversarial.evaluation.retrieval.embedder import Embedder
from pml_adversarial.evaluation.retrieval.task import RetrievalTask

RADIUS = {"Linf": 0.05, "L2": 0.3, "L1": 1.2, "L0": 3, "patch": 2}
both_norms = pytest.mark.parametrize("norm", ["Linf", "L2"])
all_norms = pytest.mark.parametrize("norm", RADIUS)


def length(change, norm):
    """Of each row's change ``(M, C, H, W)``: in "L0" and "patch" by loops over positions."""
    flat = change.flatten(1)
    if norm in ("L0", "patch"):
        return torch.tensor([float(count_of(row, norm)) for row in change])
    return {"Linf": flat.abs().amax(1), "L2": flat.norm(dim=1), "L1": flat.abs().sum(1)}[norm]


def count_of(change, norm):
    """How many positions of ``(C, H, W)`` change, or the side of the smallest square that holds them."""
    _, height, width = change.shape
    changed = [(y, x) for y in range(height) for x in range(width) if (change[:, y, x] != 0).any()]
    if norm == "L0" or not changed:
        return len(changed)
    return max(max(at) - min(at) + 1 for at in zip(*changed, strict=True))


def images_of(count=24, classes=4, size=6, spread=0.15, seed=0):
    """Images around one pattern per class, so that most queries are right, by different margins."""
    labels = torch.arange(count) % classes
    patterns = torch.rand(classes, 1, size, size, generator=torch.Generator().manual_seed(4)) * 0.6 + 0.2
    noise = spread * torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return (patterns[labels] + noise).clamp(0, 1), labels


def network(seed=5, size=6, dimension=6):
    """In train mode, with what differs between modes."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(3 * size * size, dimension),
        )


class Made(nn.Module):
    """A model of one function."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, images):
        return self.made(images)


def embedded(model, images):
    """In eval mode, without gradient; the model comes back in train mode."""
    model.eval()
    with torch.no_grad():
        embeddings = model(images)
    model.train()
    return embeddings


def bench_of(model, queries, gallery=None, norm="Linf", search=None):
    """A task that is ready to make scenes; the model is left in eval mode."""
    model.eval().requires_grad_(False)
    task = RetrievalTask(Embedder(model), queries, gallery, norm, search)
    task.set_gallery(embedded(model, task.items[:]))
    task.set_queries(task.rows(None), embedded(model, task.queries[:]))
    model.eval()
    return task
