"""Versions of the libraries that a report names."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Of Python, this package, and what computes its numbers."""
    packages = ("pml-adversarial", "torch", "pytorch-metric-learning", "torchattacks")
    return {**{package: _version(package) for package in packages}, "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from a folder
        return "not installed"
