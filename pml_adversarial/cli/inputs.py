"""The model and the images of the commands that evaluate: their options, loading, errors, and the files written."""

from __future__ import annotations

import importlib
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import nn

from ..errors import AdversarialError
from ..evaluation import Report
from ..evaluation.reports.fingerprints import of_file
from ..training.pixels import Normalization
from .images import LabelledImages, images_from, same_classes
from .models import check_model, load_model
from .options import did_you_mean, parse_call, refused

WRITTEN = ("report.json", "report.html")  #: What `write` writes.
_PATH = click.Path(path_type=Path)
_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"required": True, "type": _PATH, "help": "An exported program (.pt2), or weights (.pt, .safetensors)."},
    "network": {
        "help": "For weights: what builds the network, module:callable or module:callable:key=value,key=value."
    },
    "queries": {"required": True, "type": _PATH, "help": "Folder with a subfolder per class, or npz: images, labels."},
    "gallery": {"type": _PATH, "help": "What is searched, in that form.  [default: the queries, leave one out]"},
    "size": {
        "help": "224, or 256,224: resize the shorter side, cut out the middle square. 256x128: resize to that height "
        "and width."
    },
    "grayscale": {"is_flag": True, "help": "One channel in place of three."},
}


class Inputs(NamedTuple):
    """A saved model, and the images that it is evaluated on."""

    model: nn.Module
    queries: LabelledImages
    gallery: LabelledImages | None


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say which model and which images; the command takes their values as ``inputs``."""

    @wraps(command)
    def taking_inputs(**values: Any) -> Any:
        return command(inputs={name: values.pop(name) for name in _OPTIONS}, **values)

    for name, settings in reversed(_OPTIONS.items()):
        click.option(f"--{name}", **settings)(taking_inputs)
    return taking_inputs


def load(
    inputs: Mapping[str, Any], device: str, normalization: Normalization | None = None, batch_size: int = 1
) -> Inputs:
    """Loads what the options say, and tries the model on as many images as a batch has.

    Raises:
        AdversarialError: something cannot be loaded, or does not fit.
        click.BadParameter: an option cannot be read.
    """
    build = _network(inputs["network"]) if inputs["network"] else None
    sides = _size(inputs["size"]) if inputs["size"] else {}

    def read(path: Path) -> LabelledImages:
        return images_from(path, grayscale=inputs["grayscale"], **sides)

    gallery = inputs["gallery"]
    queries, items = same_classes(read(inputs["queries"]), None if gallery is None else read(gallery))
    for images in filter(None, (queries, items)):
        if images.note:
            click.echo(f"note: {images.note}", err=True)
    model = load_model(inputs["model"], build, device)
    for images, count in ((queries, batch_size), (items or queries, 1)):
        some = torch.stack([images[row][0] for row in range(min(count, len(images)))])
        check_model(model, some.to(device), normalization)
    return Inputs(model, queries, items)


def drawn(total: int, limit: int | None, seed: int) -> list[int] | None:
    """Indices of ``limit`` queries, ascending; None: all queries."""
    if limit is None or limit >= total:
        return None
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


@contextmanager
def errors_shown(out_of_memory: str = "") -> Iterator[None]:
    """Errors of the package, and memory that does not suffice, end the command with one line."""
    try:
        yield
    except AdversarialError as error:
        raise click.ClickException(str(error)) from error
    except torch.cuda.OutOfMemoryError as error:
        raise click.ClickException(out_of_memory) from error


def write(report: Report, inputs: Mapping[str, Any], output: Path) -> None:
    """Prints a report, and writes it with the files that it is about."""
    said = {name: _file(value) if isinstance(value, Path) else value for name, value in inputs.items()}
    report = replace(report, provenance={**report.provenance, "inputs": said})
    as_json, page = WRITTEN
    report.save_json(output / as_json)
    report.save_html(output / page)
    click.echo(str(report))
    click.echo(f"\nWritten to {output}/: {', '.join(WRITTEN)}")


def _file(path: Path) -> dict[str, str]:
    return of_file(path) if path.is_file() else {"path": str(path)}


def _network(text: str) -> Callable[[], nn.Module]:
    """The callable that ``text`` names, with its options. The current folder is searched for modules too."""
    module, _, call = text.partition(":")
    name, options = parse_call(call)
    if not module or not name:
        raise refused("--network", f"{text!r}; expected module:callable, such as torchvision.models:resnet18.")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except Exception as error:  # of any kind, from the module's own code
        raise refused("--network", f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        make = operator.attrgetter(name)(found)
    except AttributeError as error:
        raise refused("--network", f"{module} has no {name}.{did_you_mean(name, vars(found))}") from error
    if not callable(make):
        raise refused("--network", f"{name} of {module} is {type(make).__name__}; expected a callable.")

    def build() -> nn.Module:
        try:
            return make(**options)
        except Exception as error:  # of any kind, from the network's own code
            raise refused("--network", f"{text} fails: {type(error).__name__}: {error}") from error

    return build


def _size(text: str) -> dict[str, tuple[int, int]]:
    """What `images_from` takes."""
    found = re.fullmatch(r"([1-9]\d*)(?:([x,])([1-9]\d*))?", text)
    if found is None:
        raise refused(
            "--size", f"{text!r}; expected 224, or 256,224 (shorter side, square within), or 256x128 (height, width)."
        )
    first, sign, second = found.groups()
    return {"shape" if sign == "x" else "size": (int(first), int(second or first))}
