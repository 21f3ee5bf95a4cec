import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pml_adversarial.training.watch import Watch


@pytest.fixture
def single():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def watch():
    return Watch()


@pytest.fixture
def linear(images):
    """A model whose output may be changed in place: its gradient does not need it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))


@pytest.fixture
def _nobody_else_watches():
    gc.collect()  # losses of other tests may wait for it
    nn.Identity()(torch.zeros(1))
