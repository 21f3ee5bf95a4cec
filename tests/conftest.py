"""Small models and one seeded batch."""

import gc

import offline  # noqa: F401  # before any test asks for a connection
import pytest
import torch
from torch import nn


def pytest_collection_finish():
    gc.freeze()  # some tests collect garbage; thousands of collected tests are none


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and wait for one another on a busy machine


@pytest.fixture
def images():
    """Eight images of 1x6x6, away from the borders of [0, 1]."""
    return torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1


@pytest.fixture
def labels():
    """Four classes, two images each."""
    return torch.arange(8) // 2


@pytest.fixture
def model():
    """A model that does the same in train and in eval mode."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.fixture
def moody_model():
    """A model with BatchNorm and Dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4)
    )
