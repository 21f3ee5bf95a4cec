"""The command ``repeat``: an evaluation made again from its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from .. import evaluation
from ..evaluation import Report
from .inputs import WRITTEN, errors_shown, input_options, load, write
from .options import CONTEXT, FOLDER, FORCE, REPORT, check_device, make_output


@click.command(context_settings=CONTEXT)
@click.argument("report", type=REPORT)
@input_options
@click.option("--device", help="cpu, cuda, cuda:1, mps.  [default: that of the report]")
@click.option("--output", default="pml_adversarial_repetition", type=FOLDER, help="Folder for the new reports.")
@FORCE
@click.option("--resume", type=FOLDER, help="Keep finished batches in this folder, and go on from those in it.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: those of the report]")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def repeat(
    report: Path,
    inputs: Mapping[str, Any],
    device: str | None,
    output: Path,
    force: bool,
    resume: Path | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Measures a report again.

    REPORT is a report.json. All settings are those of the report. The model and the images are checked against its
    hashes. Prints a table and whether the numbers are the same, and writes report.json and report.html.
    """
    with errors_shown():
        before = Report.load_json(report)
    device, batch_size = check_device(device or before.settings["device"]), before.settings["batch_size"]
    torch.set_num_threads(threads or before.provenance["threads"])
    make_output(output, WRITTEN, force)
    too_much = f"{device} has not enough memory for the report's batches of {batch_size}; use another --device."
    with errors_shown(too_much):
        model, queries, gallery = load(inputs, device, before.settings["normalization"], batch_size)
        after = evaluation.repeat(before, model, queries, gallery, resume=resume, progress=not quiet)
    write(after, inputs, output)
    click.echo(_verdict(before, after, report))


def _verdict(before: Report, after: Report, path: Path) -> str:
    """Whether two reports have the same numbers; if not, which of them differ."""
    differ = [part for part in ("clean", "clean_flags", "worst") if getattr(before, part) != getattr(after, part)]
    return f"The numbers are those of {path}." if not differ else f"{', '.join(differ)} differ from {path}."
