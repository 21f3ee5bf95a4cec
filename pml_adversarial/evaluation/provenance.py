"""What an evaluation was made of and where it ran: model, data, attacks' options, command, machine and versions."""

from __future__ import annotations

import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

_PACKAGES = ("pml-adversarial", "pytorch-metric-learning", "torchattacks")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries."""
    packages = {package: _version(package) for package in _PACKAGES}
    return {**packages, "torch": str(torch.__version__), "python": platform.python_version()}


def surroundings(device: torch.device, embeddings: Tensor) -> dict[str, Any]:
    """What may change numbers although model, data and settings are the same, in types that JSON knows.

    Args:
        device: of the model.
        embeddings: of the gallery, as the model gives them.
    """
    return {
        "embeddings": {"shape": list(embeddings.shape), "dtype": str(embeddings.dtype)},
        "autocast": _autocast(device.type),
        "device": str(device),
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


def _autocast(device: str) -> str | None:
    """The type that autocast computes in; None: it is off."""
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return str(torch.get_autocast_dtype(device)) if is_on else None


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from a folder
        return "not installed"
