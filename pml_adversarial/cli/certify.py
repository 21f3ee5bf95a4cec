"""The command ``certify``: lower bounds of R@1 that no attack in l2 can break, for a saved model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .. import evaluation
from .inputs import drawn, errors_shown, input_options, load
from .options import (
    CONTEXT,
    FOLDER,
    FORCE,
    LIMIT,
    NORMALIZATION,
    OWN,
    check_device,
    make_output,
    parse_normalization,
    parse_radii,
)

_WRITTEN = "certificate.json"


@click.command(context_settings=CONTEXT)
@input_options
@click.option("--sigma", required=True, type=float, help="Standard deviation of the noise, in pixels of [0, 1].")
@click.option("--radii", required=True, help="l2 radii of the table, in pixels of [0, 1], with commas: 0,0.25,0.5.")
@OWN
@NORMALIZATION
@LIMIT
@click.option("--samples", default=10_000, type=click.IntRange(2), help="Noisy copies of each query.")
@click.option("--alpha", default=0.001, help="Probability that the radius of a single query is too large.")
@click.option("--seed", default=0, type=int, help="Of all that is random.")
@click.option("--batch-size", default=1024, type=click.IntRange(1), help="Noisy copies that are embedded together.")
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1, mps.")
@click.option("--output", default="pml_adversarial_certificate", type=FOLDER, help=f"Folder for {_WRITTEN}.")
@FORCE
@click.option("--quiet", is_flag=True, help="No progress bars.")
def certify(
    inputs: Mapping[str, Any],
    radii: str,
    normalization: str | None,
    limit: int | None,
    seed: int,
    device: str,
    output: Path,
    force: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Certifies a lower bound of R@1 under attack.

    No attack in l2 can break the bound. It holds for the smoothed model, which embeds the mean of many noisy copies of
    an image. Train the model with noise of about --sigma, else its smoothed version is poor. Prints a table, and writes
    certificate.json.
    """
    shown, pixels = parse_radii(radii, "L2", "--radii", zero=True), parse_normalization(normalization)
    check_device(device)
    make_output(output, (_WRITTEN,), force)
    with errors_shown(f"{device} has not enough memory for --batch-size {settings['batch_size']}; try half of it."):
        model, queries, gallery = load(inputs, device, pixels)
        subset = drawn(len(queries), limit, seed)
        found = evaluation.certify(
            model,
            queries,
            gallery,
            radii=shown,
            normalization=pixels,
            subset=subset,
            seed=seed,
            progress=not quiet,
            **settings,
        )
    (output / _WRITTEN).write_text(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    click.echo(f"{found}\n\nWritten to {output}/: {_WRITTEN}")
