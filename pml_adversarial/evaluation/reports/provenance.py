"""What an evaluation was made of and where it ran: model, data, attacks' options, command, machine and versions."""

from __future__ import annotations

import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("pml-adversarial", "pytorch-metric-learning", "torchattacks")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries."""
    packages = {package: _version(package) for package in _PACKAGES}
    return {**packages, "torch": str(torch.__version__), "python": platform.python_version()}


def surroundings(device: torch.device) -> dict[str, Any]:
    """What may change numbers although model, data and settings are the same, in types that JSON knows.

    Args:
        device: of the model.
    """
    return {
        "hardware": _hardware(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(sys.orig_argv),
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from a folder
        return "not installed"
