"""Results as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from .results import Measures, Results, heading

_CHECK = {True: "ok", False: "FLAG", None: "skipped"}


def table(results: Results) -> str:
    """A table of all attacks in percent, then a line on the setting, one on the embedding and one per check."""
    rows = list(_rows(results))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    setting = (
        f"{results.suite}, {results.settings.get('norm', '')}, {results.settings.get('distance', '')}, "
        f"{results.protocol}: {results.num_queries} queries, {results.num_gallery} items of {results.num_classes} "
        f"classes; percent; chance {100 * results.chance:.1f}; {results.settings.get('precision', '')}"
    )
    signs = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in results.collapse.items())
    embedding = f"embedding: {signs}" + ("" if results.nmi is None else f"; NMI {100 * results.nmi:.1f}")
    checks = [f"[{_CHECK[check.passed]}] {check.name}: {check.message}" for check in results.checks]
    notes = [f"note: {note}" for note in results.notes]
    return "\n".join([*lines, "", setting, *notes, embedding, *checks])


def _rows(results: Results) -> Iterator[list[str]]:
    names = list(results.clean)
    yield ["attack", "eps", *map(heading, names), "passes", "s"]
    yield ["none", "", *_percent(results.clean, names), "", ""]
    for eps in sorted({result.eps for result in results.attacks}):
        for result in (result for result in results.attacks if result.eps == eps):
            passes = result.forward_passes + result.backward_passes
            cost = [f"{passes:,}", f"{result.seconds:.0f}"]
            yield [result.attack, f"{eps:.4g}", *_percent(result.measures, names), *cost]
        for worst in (worst for worst in results.worst if worst.eps == eps):
            yield [f"worst ({worst.target})", f"{eps:.4g}", *_percent(worst.measures, names), "", ""]


def _percent(measures: Measures, names: list[str]) -> list[str]:
    return [f"{100 * measures[name]:.1f}" for name in names]


def _line(row: list[str], widths: list[int]) -> str:
    first = row[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
