"""Does training with the preset collapse? All losses of PML that take labels, several seeds, eps out of reach as well.

    python -m benchmarks.robustness.collapse --data digits

Each loss trains on the same batches as ``AdversarialLoss(loss, model, attack=attacks.preset(eps))``, at each eps, and
without an attack. A model has collapsed where it finds less than half of what plain training finds among unseen
classes. Whether it would without the preset's precautions says ``--bare``: from the first step perturbed rows, at full
strength, take the place of the clean ones. Runs are kept one a line in ``collapse.jsonl``; what is there is not made
again.
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

from pml_adversarial import AdversarialLoss, attacks

from .backbones import build, num_dimensions
from .batches import Batches
from .data import Part, load
from .methods import METHODS, Method
from .protocol import PROTOCOLS, Protocol, named
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
    method: Method, protocol: Protocol, train: Part, searched: Part, seed: int, evaluation: Evaluation
) -> dict[str, Any]:
    """What is left of the retrieval of unseen classes, and under an attack; what training recorded.

    Raises:
        Exception: whatever the loss raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        training = Training(method, protocol, train, seed, torch.device("cpu"))
        model = training.run(Path(folder) / "checkpoint.pt")
        report = evaluation.measure(model, searched, Path(folder) / "evaluation", progress=False)
    found = {"recall_at_1": report.clean["recall_at_1"], "attacked": report.worst_case(evaluation.eps[0] / 255)}
    if isinstance(training.loss, AdversarialLoss):
        monitor = training.loss.adversary.monitor
        found |= {"batch_recall": monitor.recall, "batch_recall_attacked": monitor.recall_attacked}
        found |= {"share": monitor.share, "out_of_reach": monitor.out_of_reach}
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
    add("--bare", type=float, nargs="+", default=[], help="the same, but without the preset's precautions")
    add("--protocol", choices=list(PROTOCOLS), default="helped")
    add("--steps", type=int, default=300, help="of the optimiser")
    add("--queries", type=int, default=200, help="images that are attacked")
    add("--out", type=Path, default=Path("collapse.jsonl"))
    add("--threads", type=int)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    train, searched = load(options.data, Path("data"), options.file)
    protocol = named(options.protocol, options.data, {"steps": options.steps, "classes": 10, "per_class": 4})
    batches = Batches(train, protocol, 0)
    images, _ = batches[0]
    network = build(protocol.backbone, tuple(images.shape[1:]))
    made = all_losses(batches.num_classes, num_dimensions(network, images))
    runs = _read(options.out)
    known = {_key(run) for run in runs}
    ways = [(0.0, False), *((eps, False) for eps in options.eps), *((eps, True) for eps in options.bare)]
    which = {"data": options.data, "protocol": options.protocol, "steps": options.steps}
    asked = [
        {**which, "loss": name, "eps": eps, "bare": bare, "seed": seed}
        for seed in options.seeds
        for name in options.losses or made
        for eps, bare in ways
    ]
    with _quiet():
        for run in tqdm([run for run in asked if _key(run) not in known], ncols=100):
            radius = run["eps"] or max(options.eps)
            same_eps = replace(protocol, preset_eps=radius / 255)
            attacked = Evaluation((radius,), ("margin",), options.queries)
            try:
                found = measure(_method(made[run["loss"]], run), same_eps, train, searched, run["seed"], attacked)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            runs.append(run | found)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    same = [run for run in runs if all(run[name] == value for name, value in which.items())]
    logging.getLogger("robustness").info("\n%s", table(same))
    return 0


def _method(loss: Callable[[], nn.Module], run: dict[str, Any]) -> Method:
    if not run["eps"]:
        return Method("plain", loss)
    if run["bare"]:
        return Method("bare", loss, options=_bare)
    return replace(METHODS["preset-ms"], loss=loss, warmup=None)


def _bare(protocol: Protocol) -> dict[str, Any]:
    return {"attack": attacks.preset(protocol.preset_eps), "keep_clean": False, "guard": False}


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
    eps; after the slash, what an attack at that eps leaves of it. Of the runs that are not bare, how many collapsed,
    how many said that their eps is out of reach, and how many failed.
    """
    ways = sorted({(run["bare"], run["eps"]) for run in runs})
    named_ways = ["plain" if not eps else f"{eps:g}/255{', bare' * bare}" for bare, eps in ways]
    lines = [["loss", *named_ways, "collapsed", "out of reach, and said so", "failed", "runs"]]
    for name in sorted({run["loss"] for run in runs}):
        of_loss = [run for run in runs if run["loss"] == name]
        cells = [_cell([run for run in of_loss if (run["bare"], run["eps"]) == way]) for way in ways]
        ours = [run for run in of_loss if not run["bare"]]
        failed = [run for run in ours if "error" in run]
        out_of_reach = [run for run in ours if run.get("out_of_reach")]
        counts = (len(found) for found in (collapsed(ours), out_of_reach, failed, ours))
        lines.append([name, *cells, *map(str, counts)])
    return markdown(lines)


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
    return tuple(run[name] for name in ("data", "protocol", "steps", "loss", "eps", "bare", "seed"))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
