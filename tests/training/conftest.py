import pytest
import torch.distributed as dist
from torch import nn
from traces import alone

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


@pytest.fixture(autouse=True)
def _nobody_else_watches():
    with alone():
        yield
