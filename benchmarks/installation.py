"""What an installation costs: distributions, megabytes, and seconds of an import.

In an environment in which nothing else was installed:

    python -m venv fresh && fresh/bin/pip install . && fresh/bin/python benchmarks/installation.py found.json
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import Distribution, distributions
from pathlib import Path

IMPORTS = {
    "torch": "import torch",
    "torch, pytorch-metric-learning, torchattacks": "import torch, pytorch_metric_learning.losses, torchattacks",
    "pml_adversarial": "import pml_adversarial",
}
ROUNDS = 15
NOT_OURS = {"pip", "setuptools", "wheel"}  # of the environment itself


def main(path: str) -> None:
    """Measures, interleaved, and writes the result to ``path``."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for number in range(ROUNDS + 1):
        for name, code in IMPORTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            if number:  # the first reads from the disk
                seconds[name].append(time.perf_counter() - start)
    found = {
        "python": platform.python_version(),
        "distributions": {d.name: {"version": d.version, "megabytes": _megabytes(d)} for d in _installed()},
        "import_seconds": {name: round(statistics.median(times), 2) for name, times in seconds.items()},
        "rounds": ROUNDS,
    }
    Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _installed() -> list[Distribution]:
    return sorted((d for d in distributions() if d.name not in NOT_OURS), key=lambda d: d.name.lower())


def _megabytes(distribution: Distribution) -> float:
    paths = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    return round(sum(path.stat().st_size for path in paths if path.is_file()) / 1e6, 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
