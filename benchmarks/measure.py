"""How benchmarks measure: what is compared in pairs, what memory a process took, and on what machine."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

DEVICE = os.environ.get("PML_ADVERSARIAL_DEVICE", "cpu")


def seconds(step: Callable[[], Any]) -> float:
    """Wall-clock time of one call, until the device is done."""
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(one: Callable[[], Any], other: Callable[[], Any], pairs: int) -> tuple[list[float], list[float]]:
    """Times of both, run right after one another and in alternating order, after one call to warm up."""
    for warm_up in (one, other):
        seconds(warm_up)
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (1, 0) if pair % 2 else (0, 1):
            times[which].append(seconds((one, other)[which]))
    return times


def compared(times: tuple[Sequence[float], Sequence[float]]) -> dict[str, Any]:
    """Ratio of pairs with its quartiles, and both medians in milliseconds: what a table shows of them."""
    ratios = [one / other for one, other in zip(*times, strict=True)]
    spread = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    medians = [1e3 * statistics.median(of) for of in times]
    return {"ratio": spread[1], "quartiles": [spread[0], spread[2]], "ms": medians, "pairs": len(ratios)}


def peak() -> int:
    """Bytes that this process has held at most; Linux hands `getrusage` what the process that started it held."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: str) -> dict[str, Any]:
    """What a table has to say about where it was made."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line] or [platform.processor()]
    name = torch.cuda.get_device_name() if device == "cuda" else names[0]
    return {
        "device": name or platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
