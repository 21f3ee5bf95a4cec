"""The command ``evaluate``: how robust a saved model is on images of a folder or an npz file."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from ..errors import AdversarialError
from ..evaluation import RetrievalAttack, evaluate_robustness
from ..evaluation.distance import DISTANCES
from ..evaluation.suites import SUITES, attacks_by_name
from ..training.pixels import Normalization, PixelSpace
from .images import images_from, same_classes
from .models import check_model, load_model
from .options import CONTEXT, FOLDER, check_device, did_you_mean, parse_call, parse_radii, try_option

IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of torchvision's models
_PATH = click.Path(path_type=Path)
_EXAMPLES = """\b
Examples:
  pml-adversarial evaluate --model model.pt2 --queries test.npz --eps 0.05,0.1
  pml-adversarial evaluate --model weights.pt --network torchvision.models:resnet18:num_classes=64 \\
    --queries test/ --size 256,224 --normalization imagenet --eps 2/255,8/255
"""


@click.command(context_settings=CONTEXT, epilog=_EXAMPLES)
@click.option("--model", required=True, type=_PATH, help="An exported program (.pt2), or weights (.pt, .safetensors).")
@click.option(
    "--network", help="For weights: what builds the network, module:callable or module:callable:key=value,key=value."
)
@click.option("--queries", required=True, type=_PATH, help="Folder with a subfolder per class, or npz: images, labels.")
@click.option("--gallery", type=_PATH, help="What is searched, in that form.  [default: the queries, leave one out]")
@click.option("--eps", required=True, help="Radii in pixels of [0, 1], with commas: 8/255 or 0.05,0.1.")
@click.option("--norm", default="Linf", type=click.Choice(["Linf", "L2"], case_sensitive=False), help="Of the radii.")
@click.option("--distance", default="cosine", type=click.Choice(DISTANCES), help="How the deployed search compares.")
@click.option(
    "--own", type=click.Choice(["same"]), help="same: no query finds the item of the gallery that is its image."
)
@click.option("--attacks", default="standard", help=f"{' or '.join(SUITES)}, or names of attacks with commas.")
@click.option(
    "--normalization", help='What the model\'s inputs are normalised with: imagenet, or "mean;std", such as "0.5;0.5".'
)
@click.option("--size", help="Resize the shorter side, cut out the middle square: 224, or 256,224 if they differ.")
@click.option("--grayscale", is_flag=True, help="One channel in place of three.")
@click.option("--limit", type=click.IntRange(1), help="How many queries are attacked, drawn by --seed.  [default: all]")
@click.option("--recall-at", default="1,2,4,8", help="The k of R@k, with commas.")
@click.option("--nmi", is_flag=True, help="Also measure how well clusters of the embeddings agree with the classes.")
@click.option("--no-checks", is_flag=True, help="Do not look for signs that the numbers are too high.")
@click.option("--seed", default=0, type=int, help="Of all that is random.")
@click.option("--batch-size", default=128, type=click.IntRange(1), help="Queries that are attacked together.")
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1, mps.")
@click.option("--output", default="pml_adversarial_evaluation", type=FOLDER, help="Folder for the reports.")
@click.option("--resume", type=FOLDER, help="Keep finished batches in this folder, and go on from those in it.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch decides]")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def evaluate(
    model: Path,
    network: str | None,
    queries: Path,
    gallery: Path | None,
    size: str | None,
    grayscale: bool,
    limit: int | None,
    no_checks: bool,
    device: str,
    output: Path,
    threads: int | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Evaluates how robust a saved embedding model is on images of your own.

    Every query is attacked within each radius and searched for in a clean gallery. Prints a table, and writes
    report.json and report.html.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    settings["eps"] = parse_radii(settings["eps"], settings["norm"])
    settings["attacks"] = _attacks(settings["attacks"])
    settings["recall_at"] = _numbers(settings["recall_at"], "--recall-at")
    settings["normalization"] = _normalization(settings["normalization"])
    check_device(device)
    build = _network(network) if network else None
    sides = _size(size) if size else None
    try_option(lambda: output.mkdir(parents=True, exist_ok=True), "--output")
    try:
        read = partial(images_from, size=sides, grayscale=grayscale)
        searched, items = same_classes(read(queries), None if gallery is None else read(gallery))
        loaded = load_model(model, build, device)
        for images, count in ((searched, settings["batch_size"]), (items or searched, 1)):
            some = torch.stack([images[row][0] for row in range(min(count, len(images)))])
            check_model(loaded, some.to(device), settings["normalization"])
        subset = _drawn(len(searched), limit, settings["seed"])
        report = evaluate_robustness(
            loaded, searched, items, subset=subset, checks=not no_checks, progress=not quiet, **settings
        )
    except AdversarialError as error:
        raise click.ClickException(str(error)) from error
    except torch.cuda.OutOfMemoryError as error:
        raise click.ClickException(
            f"{device} has not enough memory for --batch-size {settings['batch_size']}; try half of it."
        ) from error
    report.save_json(output / "report.json")
    report.save_html(output / "report.html")
    click.echo(str(report))
    click.echo(f"\nWritten to {output}/: report.json, report.html")


def _drawn(total: int, limit: int | None, seed: int) -> list[int] | None:
    """Indices of ``limit`` queries, ascending; None: all queries."""
    if limit is None or limit >= total:
        return None
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def _attacks(text: str) -> str | list[RetrievalAttack]:
    """The name of a suite, or attacks of the suites by their names."""
    if text in SUITES:
        return text
    known = attacks_by_name()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, {*SUITES, *known})
            raise _refused("--attacks", f"no attack named {name!r}.{hint} There are: {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names)]


def _network(text: str) -> Callable[[], nn.Module]:
    """The callable that ``text`` names, with its options. The current folder is searched for modules too."""
    module, _, call = text.partition(":")
    name, options = parse_call(call)
    if not module or not name:
        raise _refused("--network", f"{text!r}; expected module:callable, such as torchvision.models:resnet18.")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except Exception as error:  # of any kind, from the module's own code
        raise _refused("--network", f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        make = operator.attrgetter(name)(found)
    except AttributeError as error:
        raise _refused("--network", f"{module} has no {name}.{did_you_mean(name, vars(found))}") from error
    if not callable(make):
        raise _refused("--network", f"{name} of {module} is {type(make).__name__}; expected a callable.")

    def build() -> nn.Module:
        try:
            return make(**options)
        except Exception as error:  # of any kind, from the network's own code
            raise _refused("--network", f"{text} fails: {type(error).__name__}: {error}") from error

    return build


def _normalization(text: str | None) -> Normalization | None:
    if text is None:
        return None
    if text.lower() == "imagenet":
        return IMAGENET
    try:
        mean, std = ([float(value) for value in part.split(",")] for part in text.split(";"))
    except ValueError as error:
        raise _refused(
            "--normalization", f'{text!r}; expected imagenet or "mean;std", such as "0.5,0.5,0.5;0.25,0.25,0.25".'
        ) from error
    try_option(lambda: PixelSpace((mean, std)), "--normalization")
    return mean, std


def _size(text: str) -> tuple[int, int]:
    sides = _numbers(text, "--size")
    if len(sides) > 2:
        raise _refused("--size", f"{text!r}; expected one side, or two: the shorter side, and the square within.")
    return sides[0], sides[-1]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(value) for value in text.split(","))
    except ValueError as error:
        raise _refused(option, f"{text!r}; expected whole numbers with commas.") from error
    if min(numbers) < 1:
        raise _refused(option, f"{text!r}; expected numbers above 0.")
    return numbers


def _refused(option: str, why: str) -> click.BadParameter:
    return click.BadParameter(why, param_hint=option)
