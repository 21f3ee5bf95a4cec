"""Parses what options of the command line say: classes with options, radii, devices."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ..evaluation.retrieval.options import to_radii
from ..training.pixels import Normalization, PixelSpace

IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of torchvision's models

CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 110}
"""Click's ``context_settings`` of every command."""

REPORT = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
NORMALIZATION = click.option(
    "--normalization", help='What the model\'s inputs are normalised with: imagenet, or "mean;std", such as "0.5;0.5".'
)
OWN = click.option(
    "--own", type=click.Choice(["same"]), help="same: no query finds the item of the gallery that is its image."
)
LIMIT = click.option(
    "--limit", type=click.IntRange(1), help="How many queries are attacked, drawn by --seed.  [default: all]"
)
FORCE = click.option("--force", is_flag=True, help="Replace the files of an earlier run in the output folder.")


def make_output(folder: Path, names: Sequence[str], force: bool) -> None:
    """Makes the folder of the output, before any work is done.

    Raises:
        click.BadParameter: it cannot be made, or it holds one of the files ``names`` already, and ``force`` is false.
    """
    try_option(lambda: folder.mkdir(parents=True, exist_ok=True), "--output")
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise refused(
            "--output", f"{folder} holds {', '.join(there)} already; choose another folder, or replace with --force."
        )


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """``"Name:key=value,key=value"`` as a name and keyword arguments; values are Python literals or bare words."""
    name, _, options = text.partition(":")
    try:
        call = ast.parse(f"f({options})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("expected key=value")
        found = {keyword.arg: _value(keyword.value) for keyword in call.keywords if keyword.arg is not None}
        if len(found) < len(call.keywords):
            raise ValueError("expected each key once")
        return name, found
    except (SyntaxError, ValueError, TypeError, RecursionError) as error:
        raise click.BadParameter(
            f"{text!r} cannot be read; expected Name or Name:key=value,key=value with numbers or words, for example "
            "TripletMarginLoss:margin=0.2 or BatchEasyHardMiner:pos_strategy=easy"
        ) from error


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def parse_class(module: Any, base: type, text: str, kind: str, **filled: Any) -> partial[Any]:
    """The class that ``text`` names, with its options, ready to be called.

    Args:
        module: holds the class.
        base: the class must derive from it.
        text: see `parse_call`.
        kind: what the class is, for messages.
        filled: options that are used if the class takes them and ``text`` does not set them.
    """
    name, options = parse_call(text)
    known = inspect.getmembers(module, lambda value: isinstance(value, type) and issubclass(value, base))
    classes = {key: value for key, value in known if not key.startswith(("Base", "Generic"))}
    if name not in classes:
        hint = did_you_mean(name, classes)
        raise click.BadParameter(f"no {kind} named {name!r}.{hint} There are: {', '.join(sorted(classes))}.")
    signature = inspect.signature(classes[name])
    unknown = set(options) - set(signature.parameters)
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        raise click.BadParameter(f"{name} takes no {', '.join(sorted(unknown))}; it is {signature}.")
    taken = {key: value for key, value in filled.items() if key in signature.parameters}
    return partial(classes[name], **{**taken, **options})


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A sentence that offers the most similar known name; empty if none is similar."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f" Did you mean {close[0]}?" if close else ""


def parse_radii(text: str, norm: str = "Linf", option: str = "--eps", zero: bool = False) -> tuple[float, ...]:
    """Radii from numbers or fractions with commas, ascending; 0 is one of them only with ``zero``.

    >>> parse_radii("8/255,0.01")
    (0.01, 0.03137254901960784)
    """
    try:
        found = [float(Fraction(value.strip())) for value in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise click.BadParameter(
            f"{text!r}; expected numbers with commas, such as 0.05,0.1 or 8/255", param_hint=option
        ) from error
    return try_option(lambda: to_radii(found, norm, zero, option.lstrip("-")), option)


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers above 0 with commas."""
    try:
        numbers = tuple(int(value) for value in text.split(","))
    except ValueError as error:
        raise refused(option, f"{text!r}; expected whole numbers with commas.") from error
    if min(numbers) < 1:
        raise refused(option, f"{text!r}; expected numbers above 0.")
    return numbers


def parse_normalization(text: str | None) -> Normalization | None:
    """Means and standard deviations of channels, from ``"mean;std"`` or ``"imagenet"``."""
    if text is None:
        return None
    if text.lower() == "imagenet":
        return IMAGENET
    try:
        mean, std = ([float(value) for value in part.split(",")] for part in text.split(";"))
    except ValueError as error:
        raise refused(
            "--normalization", f'{text!r}; expected imagenet or "mean;std", such as "0.5,0.5,0.5;0.25,0.25,0.25".'
        ) from error
    try_option(lambda: PixelSpace((mean, std)), "--normalization")
    return mean, std


def refused(option: str, why: str) -> click.BadParameter:
    """An error of an option."""
    return click.BadParameter(why, param_hint=option)


def check_device(name: str) -> str:
    """The same name, if the device can be used."""
    try_option(lambda: torch.zeros(1, device=name).item(), "--device")
    return name


def try_option(make: Callable[[], Any], option: str) -> Any:
    """What ``make()`` returns; of an exception, the first line is shown as an error of the option."""
    try:
        return make()
    except Exception as error:
        raise click.BadParameter(str(error).partition("\n")[0], param_hint=option) from error
