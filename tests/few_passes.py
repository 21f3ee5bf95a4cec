"""A small network that counts what passes it, and one step of it by hand, for tests of cheaper attacks."""

import pytest
import torch
from notes import Notes
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn

from pml_adversarial import AdversarialLoss, hookimpl

EPS, ROWS = 0.05, 12
CHECK = [ROWS, ROWS]  # in the first step: the clean rows embedded again, and half of them, twice, among themselves


class Counted(nn.Module):
    """A small network that knows how many rows passed it, and in which types."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4))
        self.passed, self.types = Notes(), Notes()

    def forward(self, images):
        self.passed.append(len(images))
        found = self.layers(images)
        self.types.append(found.dtype)
        return found


class Watch:
    """A plugin that keeps what a step was made of."""

    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial):
        self.batch, self.plan, self.adversarial = batch, plan, adversarial
        return {}


@pytest.fixture(name="model")
def counted_model():
    torch.manual_seed(0)
    return Counted()


@pytest.fixture(name="images")
def twelve_images():
    return torch.rand(ROWS, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(name="labels")
def four_labels():
    return torch.arange(ROWS) // 3


def passed_in_two_steps(loss_func, model, images, labels):
    """The rows of each pass after the batch's own, in a first step and in a second."""
    found = []
    for _ in range(2):
        loss_func(model(images), labels).backward()
        own, *rest = model.passed.taken()
        assert own == len(images)
        found.append(rest)
    return found


def wrapped(model, *plugins, attack=None, loss=None, **options):
    watch = Watch()
    options = {"warmup": 0, "guard": False, **options}
    loss_func = AdversarialLoss(
        loss or MultiSimilarityLoss(), model, attack=attack, plugins=[*plugins, watch], **options
    )
    return loss_func, watch


def score_of(embedding, row, context, labels):
    """Similarity to the nearest row of another label, less that to the furthest of one's own, in the loss's cosine."""
    similar = [nn.functional.cosine_similarity(embedding, other, dim=0) for other in context]
    others = [other for other in range(ROWS) if other != row]
    same = [similar[other] for other in others if labels[other] == labels[row]]
    different = [similar[other] for other in others if labels[other] != labels[row]]
    return max(different) - min(same)


def signs_by_hand(model, points, context, labels):
    gradients = []
    for row in range(len(points)):
        point = points[row : row + 1].clone().requires_grad_()
        score = score_of(model.layers(point)[0], row, context, labels)
        gradients.append(torch.autograd.grad(score, point)[0])
    return torch.cat(gradients).sign()
