"""The command ``evaluate``: how robust a saved model is on images of a folder or an npz file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from ..evaluation import RetrievalAttack, evaluate_robustness
from ..evaluation.retrieval.distance import DISTANCES
from ..evaluation.retrieval.options import NORMS
from ..evaluation.suites import SUITES, attacks_by_name
from .inputs import WRITTEN, drawn, errors_shown, input_options, load, write
from .options import (
    CONTEXT,
    FOLDER,
    FORCE,
    LIMIT,
    NORMALIZATION,
    OWN,
    check_device,
    did_you_mean,
    make_output,
    parse_normalization,
    parse_numbers,
    parse_radii,
    refused,
)

_EXAMPLES = """\b
Examples:
  pml-adversarial evaluate --model model.pt2 --queries test.npz --eps 0.05,0.1
  pml-adversarial evaluate --model weights.pt --network torchvision.models:resnet18:num_classes=64 \\
    --queries test/ --size 256,224 --normalization imagenet --eps 2/255,8/255
"""


@click.command(context_settings=CONTEXT, epilog=_EXAMPLES)
@input_options
@click.option(
    "--eps",
    required=True,
    help="Radii in pixels of [0, 1], with commas: 8/255 or 0.05,0.1. L0: pixels; patch: side.",
)
@click.option("--norm", default="Linf", type=click.Choice(NORMS, case_sensitive=False), help="Of the radii.")
@click.option("--distance", default="cosine", type=click.Choice(DISTANCES), help="How the deployed search compares.")
@OWN
@click.option("--attacks", default="standard", help=f"{' or '.join(SUITES)}, or names of attacks with commas.")
@NORMALIZATION
@LIMIT
@click.option("--recall-at", default="1,2,4,8", help="The k of R@k, with commas.")
@click.option("--nmi", is_flag=True, help="Also measure how well clusters of the embeddings agree with the classes.")
@click.option("--no-checks", is_flag=True, help="Do not look for signs that the numbers are too high.")
@click.option("--seed", default=0, type=int, help="Of all that is random.")
@click.option("--batch-size", default=128, type=click.IntRange(1), help="Queries that are attacked together.")
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1, mps.")
@click.option("--output", default="pml_adversarial_evaluation", type=FOLDER, help="Folder for the reports.")
@FORCE
@click.option("--resume", type=FOLDER, help="Keep finished batches in this folder, and go on from those in it.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch decides]")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def evaluate(
    inputs: Mapping[str, Any],
    limit: int | None,
    no_checks: bool,
    device: str,
    output: Path,
    force: bool,
    threads: int | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Measures how robust a saved model is.

    The images are your own. Attacks queries, and items of the gallery, within each radius, and measures what the
    queries still find. Prints a table, and writes report.json and report.html.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    settings["eps"] = parse_radii(settings["eps"], settings["norm"])
    settings["attacks"] = _attacks(settings["attacks"])
    settings["recall_at"] = parse_numbers(settings["recall_at"], "--recall-at")
    settings["normalization"] = parse_normalization(settings["normalization"])
    check_device(device)
    make_output(output, WRITTEN, force)
    too_much = f"{device} has not enough memory for --batch-size {settings['batch_size']}; try half of it."
    with errors_shown(too_much):
        model, queries, gallery = load(inputs, device, settings["normalization"], settings["batch_size"])
        subset = drawn(len(queries), limit, settings["seed"])
        report = evaluate_robustness(
            model, queries, gallery, subset=subset, checks=not no_checks, progress=not quiet, **settings
        )
    write(report, inputs, output)


def _attacks(text: str) -> str | list[RetrievalAttack]:
    """The name of a suite, or attacks of the suites by their names."""
    if text in {*SUITES, *(version for version, _ in SUITES.values())}:
        return text
    known = attacks_by_name()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, {*SUITES, *known})
            raise refused("--attacks", f"no attack named {name!r}.{hint} There are: {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names)]
