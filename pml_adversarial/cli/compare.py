"""The command ``compare``: two reports on the same queries."""

from __future__ import annotations

from pathlib import Path

import click

from .. import evaluation
from ..errors import AdversarialError
from ..evaluation import Report
from .options import CONTEXT, REPORT, parse_radii


@click.command(context_settings=CONTEXT)
@click.argument("a", type=REPORT)
@click.argument("b", type=REPORT)
@click.option("--eps", help="Radii that both reports have, with commas.  [default: all]")
def compare(a: Path, b: Path, eps: str | None) -> None:
    """Compares R@1 of two models, from the report.json of each, query by query.

    Prints the difference with its interval and an exact McNemar test, without attack and in the worst case.
    """
    try:
        first, second = map(Report.load_json, (a, b))
        radii = parse_radii(eps, first.settings["norm"]) if eps else None
        found = evaluation.compare(first, second, radii)
    except AdversarialError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"a: {a}\nb: {b}\n\n{found}")
