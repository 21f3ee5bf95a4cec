"""How do time and memory of a step grow with the batch, its tuples, the attack's steps and the roles?

The network is a linear layer, so that what is seen is the loss and the library. Each case runs in a process of its own,
with the bare loss on the same rows in another: memory is what the whole process holds at most, beyond what it held
before its first step.

    python -m pytest benchmarks/test_growth.py --no-cov -p no:cacheprovider
    python -m benchmarks.test_growth '{"rows": 512, "loss": "triplets"}'        # one case, as JSON

Nothing here asserts a time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss, TripletMarginLoss
from torch import nn

from benchmarks.measure import DEVICE, peak, seconds
from pml_adversarial import AdversarialLoss, attacks

DEFAULT: dict[str, Any] = {
    "rows": 256,
    "per_class": 4,
    "loss": "pairs",
    "library": True,
    "steps": 5,
    "perturb": "all",
    "keep_clean": False,
}
GROWING: dict[str, list[dict[str, Any]]] = {
    "embeddings in a batch": [{"rows": rows} for rows in (16, 64, 256, 1024, 4096)],
    "all triplets": [{"loss": "triplets", "rows": rows} for rows in (64, 128, 256, 512)],
    "all triplets, clean rows kept": [
        {"loss": "triplets", "rows": rows, "keep_clean": True} for rows in (64, 128, 256, 512)
    ],
    "attack steps": [{"steps": steps} for steps in (1, 2, 5, 10, 20)],
    "roles": [{"perturb": role, "loss": "triplets"} for role in ("anchor", "positive", "negative", "all")],
}
CASES = [(group, case) for group, cases in GROWING.items() for case in cases]


def measure(asked: dict[str, Any], repeats: int = 5) -> dict[str, float]:
    """Bytes beyond what was held before, and median seconds, of a forward and backward pass."""
    case = {**DEFAULT, **asked}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64)).to(DEVICE)
    loss: nn.Module = TripletMarginLoss() if case["loss"] == "triplets" else MultiSimilarityLoss(2, 40, 0.5)
    if case["library"]:
        attack = attacks.preset(8 / 255, case["steps"])
        options = {"perturb": case["perturb"], "keep_clean": case["keep_clean"], "warmup": 0, "guard": False}
        loss = AdversarialLoss(loss, model, attack=attack, **options)
    images = torch.rand(case["rows"], 1, 8, 8, device=DEVICE)
    labels = torch.arange(case["rows"], device=DEVICE) // case["per_class"]

    def step(rows: int) -> None:
        loss(model(images[:rows]), labels[:rows]).backward()

    step(2 * case["per_class"])  # whatever is loaded on the way is not the step's
    before = peak()
    step(case["rows"])
    held = peak() - before
    times = [seconds(lambda: step(case["rows"])) for _ in range(repeats)]
    return {"extra_bytes": held, "seconds": statistics.median(times)}


def in_its_own_process(case: dict[str, Any]) -> dict[str, float]:
    """As `measure`."""
    command = [sys.executable, "-m", "benchmarks.test_growth", json.dumps(case)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.mark.parametrize(("group", "case"), CASES, ids=[f"{group} {case}" for group, case in CASES])
def test_growth(benchmark, group: str, case: dict[str, Any]) -> None:
    benchmark.group = group
    ours = benchmark.pedantic(in_its_own_process, args=(case,), rounds=1)
    bare = in_its_own_process({**case, "library": False})
    benchmark.extra_info.update(
        case=", ".join(f"{name} {value}" for name, value in case.items() if name not in ("loss", "keep_clean")),
        ms=[1e3 * ours["seconds"], 1e3 * bare["seconds"]],
        mebibytes=[ours["extra_bytes"] / 2**20, bare["extra_bytes"] / 2**20],
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
