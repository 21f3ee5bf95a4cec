"""What memory does a step with a large batch need, in chunks and in one?

4,096 images in chunks of 256, in a GradCache loop with `AdversarialLoss(..., chunk=256)`; beside them 256 images, and
4,096, in a plain loop without chunks. With ArcFaceLoss nothing compares all rows with one another; with
ProxyAnchorLoss the attack's score does, in matrices of 4,096 x 4,096. Each case runs in a process of its own. Memory
is what the process holds at most, beyond what it held after its imports and a step of a few rows. It is that of the
second step: R@1 within the batch, which the first one measures, and then one of five, compares all rows too.

    python -m pytest benchmarks/test_chunks.py --no-cov -p no:cacheprovider
    python -m benchmarks.test_chunks '{"loss": "ArcFaceLoss", "rows": 4096, "chunk": 256}'    # as JSON

Nothing here asserts a time, or a memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from pytorch_metric_learning.losses import ArcFaceLoss, ProxyAnchorLoss
from torch import Tensor, nn

from benchmarks.measure import DEVICE, peak, seconds
from pml_adversarial import AdversarialLoss

CASES: list[dict[str, Any]] = [
    {"loss": "ArcFaceLoss", "rows": 256, "chunk": None},
    {"loss": "ArcFaceLoss", "rows": 4096, "chunk": 256},
    {"loss": "ArcFaceLoss", "rows": 4096, "chunk": None},
    {"loss": "ProxyAnchorLoss", "rows": 4096, "chunk": 256},
]
LOSSES = {"ArcFaceLoss": ArcFaceLoss, "ProxyAnchorLoss": ProxyAnchorLoss}
CLASSES, FEW = 16, 32


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Bytes beyond what was held before, and seconds, of one step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 64),
    ).to(DEVICE)
    images = torch.rand(case["rows"], 1, 16, 16, device=DEVICE)
    labels = torch.arange(case["rows"], device=DEVICE) % CLASSES

    loss = LOSSES[case["loss"]](CLASSES, 64).to(DEVICE)
    loss_func = AdversarialLoss(loss, model, steps=1, warmup=0, chunk=case["chunk"])

    def step(rows: int) -> None:
        if case["chunk"] is None:
            loss_func(model(images[:rows]), labels[:rows]).backward()
        else:
            grad_cache(loss_func, model, images[:rows], labels[:rows], case["chunk"])

    step(FEW)  # whatever is loaded on the way is not the step's
    before = peak()
    time = seconds(lambda: step(case["rows"]))
    assert loss_func.num_perturbed == case["rows"]
    return {"extra_bytes": peak() - before, "seconds": time}


def grad_cache(loss_func: AdversarialLoss, model: nn.Module, images: Tensor, labels: Tensor, chunk: int) -> None:
    """A step in which the loop's own forward pass keeps the graph of one chunk at most."""
    with torch.no_grad():
        embeddings = torch.cat([model(part) for part in images.split(chunk)])
    embeddings.requires_grad_()
    loss_func(embeddings, labels, inputs=images).backward()
    assert embeddings.grad is not None
    for part, gradient in zip(images.split(chunk), embeddings.grad.split(chunk), strict=True):
        (model(part) * gradient).sum().backward()


def in_its_own_process(case: dict[str, Any]) -> dict[str, float]:
    """As `measure`."""
    command = [sys.executable, "-m", "benchmarks.test_chunks", json.dumps(case)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_memory(benchmark, case: dict[str, Any]) -> None:
    benchmark.group = "a large batch in chunks"
    found = benchmark.pedantic(in_its_own_process, args=(case,), rounds=1)
    benchmark.extra_info.update(
        case=f"{case['loss']}, {case['rows']:,} rows, chunk {case['chunk']}",
        ms=1e3 * found["seconds"],
        mebibytes=found["extra_bytes"] / 2**20,
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
