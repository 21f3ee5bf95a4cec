"""One CPU thread, and what machine it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.measure import DEVICE, machine


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that other processes on the machine disturb what is compared as little as possible."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["pml_adversarial"] = machine(DEVICE)
