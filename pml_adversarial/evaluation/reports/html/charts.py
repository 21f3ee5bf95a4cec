"""Where the parts of a chart of measures over eps are drawn. The template ``chart.svg`` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ....attacks.ball import radius_text

_WIDTH, _HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 330, 12, 248
_LABEL_GAP, _TICK_GAP = 12.5, 38


class Line(NamedTuple):
    """A measure over eps, under one attack on the query or the gallery, or in the worst case."""

    name: str
    target: str
    worst: bool
    points: tuple[tuple[float, float], ...]  # eps, ascending, and values in [0, 1]
    intervals: tuple[tuple[float, float], ...] = ()  # of the value at each eps; none: no whiskers are drawn
    colour: str = ""  # a CSS class; none: that of the target

    @property
    def kind(self) -> str:
        """Its CSS classes."""
        return f"{self.colour or self.target} {'worst' if self.worst else 'one'}"


def chart(lines: Sequence[Line], norm: str, chance: float | None = None) -> dict[str, Any]:
    """A chart of curves over eps, as the template takes it: all parts with their places.

    Args:
        lines: later ones are drawn above earlier ones.
        norm: of eps.
        chance: where a dotted line is drawn; None: nowhere.
    """
    radii, values = zip(*(point for line in lines for point in line.points), strict=True)
    largest = max(radii) or 1.0
    highest = max(*values, *(high for line in lines for _, high in line.intervals), chance or 0.0)
    top = math.ceil(5 * highest) / 5 or 1.0

    def x(eps: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * eps / largest, 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / top, 1)

    def whiskers(line: Line) -> list[tuple[float, float, float]]:
        ends = zip(line.points, line.intervals, strict=False)
        return [(x(eps), y(low), y(high)) for (eps, _), (low, high) in ends]

    ticks, free = [], math.inf
    for eps in sorted(set(radii), reverse=True):  # each has a number where there is room for one
        has_room = eps == 0 or _LEFT + _TICK_GAP <= x(eps) <= free
        ticks.append((x(eps), radius_text(eps, norm) if has_room else ""))
        free = x(eps) - _TICK_GAP if has_room else free
    ends = [(line.name, line.kind, y(line.points[-1][1])) for line in lines]
    ends += [] if chance is None else [("chance", "level", y(chance))]
    percents = range(0, round(100 * top) + 1, 20 if top > 0.5 else 10)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _RIGHT,
        "bottom": _BOTTOM,
        "axis": f"eps ({norm})",
        "levels": {percent: y(percent / 100) for percent in percents},
        "ticks": ticks,
        "chance": None if chance is None else y(chance),
        "curves": [(line, [(x(eps), y(value)) for eps, value in line.points], whiskers(line)) for line in lines],
        "labels": _labels(ends),
    }


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves places apart until neighbours are ``gap`` apart, within ``low`` to ``high``; their order stays.

    >>> spread([5, 5, 40, 48], 10, 0, 50)
    [5, 15, 40, 50]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], moved[i + 1] - gap if i + 1 < len(moved) else high)
    for i in range(len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap if i else low)
    return [moved[order.index(i)] for i in range(len(places))]


def _labels(ends: list[tuple[str, str, float]]) -> list[tuple[str, str, float, float]]:
    """Where names stand beside the ends of lines. Single attacks have none, so that the worst case stands out."""
    ends = [end for end in ends if not end[1].endswith("one")]
    places = spread([y for _, _, y in ends], _LABEL_GAP, _TOP - 2, _BOTTOM + 14)
    return [(*end, round(place, 1)) for end, place in zip(ends, places, strict=True)]
