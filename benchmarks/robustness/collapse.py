"""Does training with the preset collapse? All losses of PML that take labels, several seeds, eps out of reach as well.

    python -m benchmarks.robustness.collapse --data digits

Each loss trains on the same batches as ``AdversarialLoss(loss, model, attack=attacks.preset(eps))``, at each eps, and
without an attack. A model has collapsed where it finds less than half of what plain training finds among unseen
classes. Runs are kept one a line in ``collapse.jsonl``; what is there is not made again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning import losses as pml_losses
from torch import nn
from tqdm import tqdm

from pml_adversarial import AdversarialLoss
from pml_adversarial.collapse import BEARABLE

from .backbones import build
from .batches import Batches
from .data import Part, load
from .methods import METHODS, Method
from .protocol import Protocol, named
from .run import Evaluation
from .table import markdown
from .train import Training

COLLAPSED = 0.5  # of the R@1 of plain training
_NOT_OF_LABELLED_ROWS = {"GenericPairLoss", "ManifoldLoss", "SelfSupervisedLoss", "VICRegLoss"}


def all_losses(classes: int, dimensions: int) -> dict[str, Callable[[], nn.Module]]:
    """Every loss of PML that takes labels, with its own defaults; what has none is filled in."""
    known = {
        "num_classes": classes,
        "embedding_size": dimensions,
        "descriptors_dim": dimensions,
        "margin": 0.4,
        "Tn": 10,
    }
    found = {}
    for name, kind in sorted(vars(pml_losses).items()):
        if not name.endswith("Loss") or name in _NOT_OF_LABELLED_ROWS or not issubclass(kind, nn.Module):
            continue
        of_all = [part for base in kind.__mro__ for part in inspect.signature(base.__init__).parameters.values()]
        needed = {part.name for part in of_all if part.default is part.empty}
        found[name] = partial(kind, **{key: value for key, value in known.items() if key in needed})
    return found


def measure(
    method: Method, protocol: Protocol, train: Part, searched: Part, seed: int, radius: float
) -> dict[str, Any]:
    """What is left of the retrieval of unseen classes, and under an attack in 255ths; what training recorded.

    Raises:
        Exception: whatever the loss raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        training = Training(method, protocol, train, seed, torch.device("cpu"))
        model = training.run(Path(folder) / "checkpoint.pt")
        evaluation = Evaluation((radius,), ("margin",), queries=200)
        report = evaluation.measure(model, searched, Path(folder) / "evaluation", progress=False)
    found = {"recall_at_1": report.clean["recall_at_1"], "attacked": report.worst_case(radius / 255)}
    if isinstance(training.loss, AdversarialLoss):
        strength = training.loss.adversary.strength
        found |= {**strength.records(), "share": strength.share}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are not there yet, and prints the table."""
    parser = argparse.ArgumentParser("benchmarks.robustness.collapse", description=__doc__)
    add = parser.add_argument
    add("--data", choices=["digits", "omniglot"], default="digits")
    add("--file", type=Path, help="omniglot from an npz, see benchmarks/omniglot.py")
    add("--losses", nargs="+", default=None, help="names in PML; all by default")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--eps", type=float, nargs="+", default=[26, 51, 77], help="of the training attack, in 255ths")
    add("--steps", type=int, default=300, help="of the optimiser")
    add("--out", type=Path, default=Path("collapse.jsonl"))
    add("--threads", type=int)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    train, searched = load(options.data, Path("data"), options.file)
    protocol = named("helped", options.data, {"steps": options.steps, "classes": 10, "per_class": 4})
    batches = Batches(train, protocol, 0)
    images, _ = batches[0]
    dimensions = build(protocol.backbone, tuple(images.shape[1:]))(images).shape[1]
    made = all_losses(int(batches.labels.max()) + 1, dimensions)
    runs = _read(options.out)
    known = {_key(run) for run in runs}
    asked = [
        {"data": options.data, "steps": options.steps, "loss": name, "eps": eps, "seed": seed}
        for seed in options.seeds
        for name in options.losses or made
        for eps in (0.0, *options.eps)  # 0: plain training
    ]
    with _quiet():
        for run in tqdm([run for run in asked if _key(run) not in known], ncols=100):
            which = "plain-ms" if run["eps"] == 0 else "preset-ms"
            method = replace(METHODS[which], loss=made[run["loss"]], warmup=None, twice=False)
            radius = run["eps"] or max(options.eps)
            same_eps = replace(protocol, preset_eps=radius / 255)
            try:
                found = measure(method, same_eps, train, searched, run["seed"], radius)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            runs.append(run | found)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    same = [run for run in runs if run["data"] == options.data and run["steps"] == options.steps]
    logging.getLogger("robustness").info("\n%s", table(same))
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """What losses and training have to say is in the records."""
    logger = logging.getLogger("pml_adversarial")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """One line per loss, in percent, each the mean of all seeds.

    R@1 of unseen classes, with the least of all seeds in brackets, without an attack in training and with one at each
    eps; after the slash, what an attack at that eps leaves of it. How many runs collapsed, how many said that their eps
    is out of reach, and how many failed.
    """
    radii = sorted({run["eps"] for run in runs})
    counted = ("collapsed", "out of reach, and said so", "failed", "runs")
    lines = [["loss", *("plain" if eps == 0 else f"{eps:g}/255" for eps in radii), *counted]]
    for name in sorted({run["loss"] for run in runs}):
        of_loss = [run for run in runs if run["loss"] == name]
        cells = [_cell([run for run in of_loss if run["eps"] == eps]) for eps in radii]
        failed = [run for run in of_loss if "error" in run]
        counts = (len(found) for found in (collapsed(of_loss), out_of_reach(of_loss), failed, of_loss))
        lines.append([name, *cells, *map(str, counts)])
    return markdown(lines)


def out_of_reach(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that ended with a warning that their eps is out of reach: it goes by R@1 within the batch."""
    return [run for run in runs if run.get("batch_recall_attacked", 1.0) < BEARABLE * run.get("batch_recall", 0.0)]


def collapsed(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs with an attack that find less than half of what plain training with the same loss and seed finds."""
    good = [run for run in runs if "error" not in run]
    plain = {(run["loss"], run["seed"]): run["recall_at_1"] for run in good if run["eps"] == 0}
    return [
        run
        for run in good
        if run["eps"] and run["recall_at_1"] < COLLAPSED * plain.get((run["loss"], run["seed"]), 0.0)
    ]


def _cell(runs: Sequence[dict[str, Any]]) -> str:
    good = [run for run in runs if "error" not in run]
    if not good:
        return "-"
    found, left = ([100 * run[name] for run in good] for name in ("recall_at_1", "attacked"))
    mean = f"{statistics.fmean(found):.1f} ({min(found):.1f})"
    return f"{mean} / {statistics.fmean(left):.1f}" if good[0]["eps"] else mean


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("data", "steps", "loss", "eps", "seed"))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
