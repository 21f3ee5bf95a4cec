"""The command ``compare``: two or more reports on the same queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from .. import evaluation
from ..errors import AdversarialError
from ..evaluation import Report
from .inputs import WRITTEN
from .options import CONTEXT, REPORT, parse_radii, refused


@click.command(context_settings=CONTEXT)
@click.argument("reports", type=REPORT, nargs=-1, required=True)
@click.option("--eps", help="Radii that all reports have, with commas.  [default: all]")
@click.option("--page", type=click.Path(dir_okay=False, path_type=Path), help="Also write an HTML page of all models.")
@click.option("--names", help="Of the models on the page, with commas.  [default: from the paths]")
@click.option("--force", is_flag=True, help="Replace the page.")
def compare(reports: tuple[Path, ...], eps: str | None, page: Path | None, names: str | None, force: bool) -> None:
    """Compares two or more models, query by query.

    REPORTS are the report.json of each, on the same queries. Prints how R@1 of each differs from the first, with an
    interval and an exact McNemar test, without attack and in the worst case.
    """
    if len(reports) < 2:
        raise refused("REPORTS", f"only {reports[0]}; expected the reports of two or more models.")
    if len({path.resolve() for path in reports}) < len(reports):
        raise refused("REPORTS", "one is given twice; expected the reports of different models.")
    if page is not None and page.exists() and not force:
        raise refused("--page", f"{page} is there already; choose another file, or replace it with --force.")
    called = _names(reports, names)
    try:
        first, *others = found = [Report.load_json(path) for path in reports]
        radii = parse_radii(eps, first.settings["norm"]) if eps else None
        for path, other in zip(reports[1:], others, strict=True):
            click.echo(f"a: {reports[0]}\nb: {path}\n\n{evaluation.compare(first, other, radii)}")
        if page is not None:
            evaluation.save_comparison(dict(zip(called, found, strict=True)), page)
            click.echo(f"\nWritten to {page}")
    except AdversarialError as error:
        raise click.ClickException(str(error)) from error


def _names(paths: Sequence[Path], given: str | None) -> list[str]:
    """A name for each report: the given one, or that of its file, or of its folder if ours is the name of the file."""
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(names) != len(paths) or len({*names, ""}) <= len(paths):
            raise refused("--names", f"{given!r}; expected {len(paths)} different names with commas.")
        return names
    names = [path.parent.name if path.name in WRITTEN and path.parent.name else path.stem for path in paths]
    return names if len({*names}) == len(names) else [str(path) for path in paths]
