"""Results as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from ...attacks.ball import radius_text
from .binomial import CONFIDENCE, Interval
from .results import INTERVAL, Measures, Results, heading, is_rate

_WIDTH = 120  # columns, at which a terminal still shows a line
_MANY = 1000  # queries; then intervals are narrow enough for tenths of a percent
MARKS = {True: "ok", False: "FLAG", None: "no evidence"}  #: How a check ended.


def table(results: Results) -> str:
    """A table of all attacks in percent, then a line on the setting, one on the embedding and one per check.

    Rates have confidence intervals: all rates if the table fits into 120 columns then, else R@1 alone.
    """
    lines = _table(results, list(filter(is_rate, results.clean)))
    if len(lines[0]) > _WIDTH:
        lines = _table(results, ["recall_at_1"])
    queries = f"{results.num_queries} queries" + f" ({results.left_out} left out)" * (results.left_out > 0)
    setting = (
        f"{results.suite}, {results.settings.get('norm', '')}, {results.settings.get('distance', '')}, "
        f"{results.protocol}: {queries}, {results.num_gallery} items of {results.num_classes} "
        f"classes; chance {100 * results.chance:.1f}; {results.settings.get('precision', '')}"
    )
    units = (
        f"percent; in brackets: {100 * CONFIDENCE:.0f} % confidence interval of a rate over the queries ({INTERVAL})"
    )
    signs = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in results.collapse.items())
    embedding = f"embedding: {signs}" + ("" if results.nmi is None else f"; NMI {100 * results.nmi:.1f}")
    checks = [f"[{MARKS[check.passed]}] {check.name}: {check.message}" for check in results.checks]
    notes = [f"note: {note}" for note in results.notes]
    return "\n".join([*lines, "", setting, units, *notes, embedding, *checks])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of one width, the first one underlined: its first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def with_interval(rate: float, interval: Interval, total: int) -> str:
    """A rate over ``total`` queries and its interval, in percent.

    >>> with_interval(0.44, Interval(0.3408, 0.5428), 100), with_interval(0.44, Interval(0.4340, 0.4466), 24000)
    ('44.0 [34, 54]', '44.0 [43.4, 44.7]')
    """
    digits = 0 if total < _MANY else 1
    return f"{100 * rate:.1f} [{100 * interval.low:.{digits}f}, {100 * interval.high:.{digits}f}]"


def _table(results: Results, rates: Sequence[str]) -> list[str]:
    """All attacks as lines; ``rates`` are shown with their intervals."""
    names, norm = list(results.clean), str(results.settings.get("norm", ""))

    def percent(measures: Measures) -> list[str]:
        shown = {name: f"{100 * measures[name]:.1f}" for name in names}
        for name, interval in results.intervals({name: measures[name] for name in rates}).items():
            shown[name] = with_interval(measures[name], interval, results.num_queries)
        return list(shown.values())

    rows = [["attack", "eps", *map(heading, names), "passes", "s"], ["none", "", *percent(results.clean), "", ""]]
    for eps in sorted({result.eps for result in results.attacks}):
        for result in (result for result in results.attacks if result.eps == eps):
            cost = [f"{result.forward_passes + result.backward_passes:,}", f"{result.seconds:.0f}"]
            rows.append([result.attack, radius_text(eps, norm), *percent(result.measures), *cost])
        worst_cases = [worst for worst in results.worst if worst.eps == eps]
        rows += [
            [f"worst ({worst.target})", radius_text(eps, norm), *percent(worst.measures), "", ""]
            for worst in worst_cases
        ]
    return aligned(rows)
