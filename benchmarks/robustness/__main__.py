"""The command line."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from pml_adversarial import InputError
from pml_adversarial.evaluation.suites import find_suite

from . import __doc__ as about
from .backbones import BACKBONES, IMAGENET_WEIGHTS, check
from .batches import Batches
from .data import Part, hold_out, load, side
from .methods import METHODS
from .protocol import AVERAGES, DATA, PRECISIONS, PROTOCOLS, SCHEDULES, TUNED, Protocol, named
from .run import Bench, Evaluation, finished
from .table import table
from .train import start_for

logger = logging.getLogger("robustness")

RADII = {
    "digits": (13.0, 26.0),
    "omniglot": (13.0, 26.0, 77.0),
    "cub": (2.0, 8.0),
    "cars": (2.0, 2.55, 4.0, 8.0),
    "sop": (2.0, 8.0),
    "tiny-imagenet": (2.0, 4.0, 8.0),
}
"""At which models are attacked unless asked otherwise, in 255ths."""


RESULTS, TABLE = "results.json", "table.md"


def parser() -> argparse.ArgumentParser:
    """All options; those of the protocol without a default, since that is the protocol's."""
    made = argparse.ArgumentParser(
        "benchmarks.robustness", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, either = made.add_argument, argparse.BooleanOptionalAction
    add("--data", required=True, choices=list(DATA))
    add("--root", type=Path, default=Path("data"), help="folder of downloads; photographs in root/cub, cars, sop")
    add("--file", type=Path, help="omniglot: an npz, see benchmarks/omniglot.py; cars, tiny-imagenet: a zip")
    add("--download", action="store_true", help="fetch what is not there")
    add("--out", type=Path, default=Path("robustness_run"), help="folder of all results")
    add("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=f"all by default: {', '.join(METHODS)}")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--protocol", choices=list(PROTOCOLS), default="peers")
    add("--backbone", choices=BACKBONES)
    add("--steps", type=int, help="of the optimiser; twice as many for plain training")
    add("--budget", type=int, help="image passes of training, in place of steps")
    add("--batch", type=int, nargs=2, metavar=("CLASSES", "IMAGES"), help="classes, and images of each")
    add("--learning-rate", type=float)
    add("--head-rate", type=float, help="times the learning rate, of the head and the loss's own weights")
    add("--weight-decay", type=float)
    add("--schedule", choices=SCHEDULES)
    add("--augment", type=float, help="how much to change training images at random: 0, or 1 for Omniglot's")
    add("--mixed", action=either, help="blend each training image with another one; for FARE")
    add("--rotations", action=either, help="quarter turns of a class are further classes")
    add("--thresholds", action=either, help="the first convolution starts as thresholds of pixels")
    add("--train-eps", type=float, help="radius of training attacks, in 255ths")
    add("--train-alpha", type=float, help="their step, in 255ths")
    add("--attack-steps", type=int, help="how many")
    add("--preset-eps", type=float, help="radius of the preset's training attack, in 255ths")
    add("--precision", choices=PRECISIONS, help="bfloat16: autocast")
    add("--size", type=int, help="side of photographs (224; from --file 64 or 32)")
    add("--pretrained", nargs="?", const=IMAGENET_WEIGHTS, help="start from a file of weights; alone: ImageNet's")
    add("--head", type=int, help="dimensions of a linear layer on top of the network")
    add("--frozen-batchnorm", action=either, help="BatchNorm stays in eval mode")
    add("--tuned", choices=TUNED, help="which weights are trained; lora: low-rank changes")
    add("--average", choices=AVERAGES, help="average the weights of training steps")
    add("--compiled", action=either, help="compile networks")
    add("--smooth", action=either, help="train with SiLU in place of ReLU")
    add("--validation-classes", type=int, help="search so many held-out training classes in place of the test classes")
    add("--eps", type=float, nargs="+", help="radii of the evaluation, in 255ths")
    add("--suite", nargs="+", default=["standard"], help="standard, quick, or names of attacks")
    add("--queries", type=int, default=500, help="images that are attacked; 0: all")
    add("--new-gallery", action="store_true", help="each model embeds the gallery, also after FARE")
    add("--threads", type=int, help="of torch")
    add("--workers", type=int, default=0, help="processes that read images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quiet", action="store_true", help="no progress bars")
    return made


def protocol_of(options: argparse.Namespace) -> Protocol:
    """The named protocol, with what was asked otherwise."""
    asked = {part.name: getattr(options, part.name, None) for part in fields(Protocol)}
    in_255ths = {"eps": options.train_eps, "alpha": options.train_alpha, "preset_eps": options.preset_eps}
    asked.update({name: None if value is None else value / 255 for name, value in in_255ths.items()})
    asked["classes"], asked["per_class"] = options.batch or (None, None)
    if options.size is None:
        asked["size"] = side(options.data, options.file)
    return named(options.protocol, options.data, asked)


def bench_of(options: argparse.Namespace) -> Bench:
    """Everything that can be refused is refused here, before anything is trained.

    Raises:
        InputError: options that cannot be used.
    """
    protocol = protocol_of(options)
    radii = tuple(sorted(set(options.eps or RADII[options.data])))
    evaluation = Evaluation(radii, tuple(options.suite), options.queries, options.new_gallery)
    if not all(0 < radius <= 255 for radius in radii):
        raise InputError(f"--eps {' '.join(f'{radius:g}' for radius in radii)}; expected radii above 0 up to 255.")
    find_suite(evaluation.named())
    if options.queries < 0 or options.workers < 0 or (options.threads is not None and options.threads < 1):
        raise InputError("Expected --queries and --workers from 0 on, and --threads from 1 on.")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise InputError(f"--seeds {' '.join(map(str, options.seeds))}; expected different whole numbers from 0 on.")
    train, searched = _parts(options, protocol)
    bench = Bench(protocol, evaluation, train, searched, _device(options.device), options.workers, not options.quiet)
    check(protocol.backbone, bench.shape(), protocol.pretrained, protocol.thresholds)
    if protocol.pretrained not in ("", IMAGENET_WEIGHTS):
        start_for(protocol, bench.shape())
    Batches(train, protocol, 0)
    return bench


def methods_of(names: Sequence[str] | None, protocol: Protocol) -> list[str]:
    """The methods that are asked for; None: all that the protocol can train.

    Raises:
        InputError: one that is asked for cannot be trained.
    """
    if names is None:
        return [name for name, method in METHODS.items() if protocol.pretrained or not method.needs_start]
    for name in names:
        METHODS[name].check(protocol)
    return list(names)


def _parts(options: argparse.Namespace, protocol: Protocol) -> tuple[Part, Part]:
    train, test = load(options.data, options.root, options.file, options.download, options.size)
    return hold_out(train, protocol.validation_classes) if protocol.validation_classes else (train, test)


def _device(name: str) -> torch.device:
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and attacks what is asked for and not there yet; 1 where something failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        bench = bench_of(options)
        methods = methods_of(options.methods, bench.protocol)
    except InputError as error:
        parser().error(str(error))
    failed: dict[str, Exception] = {}
    for seed in options.seeds:
        for name in methods:
            try:
                bench.run(name, METHODS[name], seed, options.out / name / f"seed_{seed}")
            except Exception as error:
                logger.exception("%s, seed %d, failed", name, seed)
                failed[f"{name}, seed {seed}"] = error
            summarise(options.out, bench.settings())
    if (options.out / TABLE).exists():
        logger.info("\n%s", (options.out / TABLE).read_text(encoding="utf-8"))
    for run, reason in failed.items():
        logger.error("failed: %s: %s: %s", run, type(reason).__name__, reason)
    return 1 if failed else 0


def summarise(out: Path, settings: dict[str, Any]) -> None:
    """Writes all runs with these settings, and their table."""
    runs = finished(out, settings)
    if runs:
        (out / RESULTS).write_text(json.dumps({**settings, "runs": runs}, indent=1) + "\n", encoding="utf-8")
        (out / TABLE).write_text(table(runs, METHODS) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
