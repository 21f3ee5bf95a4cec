"""Where the parts of a chart of measures over eps are drawn. The template ``chart.svg`` draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 330, 12, 248
_LABEL_GAP, _TICK_GAP, _LABEL_LENGTH = 12.5, 38, 15


@dataclass(frozen=True)
class Line:
    """A measure over eps.

    Attributes:
        name: of the attack, or of the worst case.
        target: "query" or "gallery".
        worst: whether it is the worst case, not one attack.
        points: ``(eps, value in [0, 1])``, ascending in eps.
    """

    name: str
    target: str
    worst: bool
    points: tuple[tuple[float, float], ...]

    @property
    def kind(self) -> str:
        """Its CSS classes."""
        return f"{self.target} {'worst' if self.worst else 'one'}"


def radius(eps: float, norm: str) -> str:
    """An eps as a reader expects it: a multiple of 1/255 as a fraction, unless it is a round number too.

    >>> [radius(eps, "Linf") for eps in (8 / 255, 0.1, 0.2, 0.12345)], radius(2.0, "L2")
    (['8/255', '0.1', '0.2', '0.1235'], '2')
    """
    levels = round(eps * 255)
    meant = norm == "Linf" and 0 < levels < 255 and abs(eps * 255 - levels) < 1e-4 and float(f"{eps:.2g}") != eps
    return f"{levels}/255" if meant else f"{eps:.4g}"


@dataclass(frozen=True)
class Curve:
    """A line as it is drawn: points ``(x, y)``, and whether they are marked."""

    line: Line
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class EndLabel:
    """A name beside the end of a line.

    Attributes:
        name: in full.
        shown: as much of it as there is room for.
        kind: CSS classes.
        y: where the line ends.
        label_y: where the name stands.
    """

    name: str
    shown: str
    kind: str
    y: float
    label_y: float


@dataclass(frozen=True)
class Chart:
    """All parts of a chart, with their places.

    Attributes:
        levels: percent -> y of a horizontal line.
        ticks: x and text at the horizontal axis; the text is empty where there is no room.
        axis: name of the horizontal axis.
        chance: y of the dotted line; None: there is no such line.
        curves: from the lowest layer to the highest.
        labels: names of the curves.
    """

    levels: Mapping[int, float]
    ticks: Sequence[tuple[float, str]]
    axis: str
    chance: float | None
    curves: Sequence[Curve]
    labels: Sequence[EndLabel]
    width, height = _WIDTH, _HEIGHT
    left, right, bottom = _LEFT, _RIGHT, _BOTTOM


def chart(lines: Sequence[Line], norm: str, chance: float | None = None) -> Chart:
    """A chart of curves over eps.

    Args:
        lines: later ones are drawn above earlier ones.
        norm: of eps.
        chance: where a dotted line is drawn; None: nowhere.
    """
    radii, values = zip(*(point for line in lines for point in line.points), strict=True)
    axes = _Axes(max(radii) or 1.0, math.ceil(5 * max(*values, chance or 0.0)) / 5 or 1.0)
    percents = range(0, round(100 * axes.top) + 1, 20 if axes.top > 0.5 else 10)
    return Chart(
        levels={percent: axes.y(percent / 100) for percent in percents},
        ticks=_ticks(sorted(set(radii)), norm, axes),
        axis=f"eps ({norm})",
        chance=None if chance is None else axes.y(chance),
        curves=[Curve(line, [(axes.x(eps), axes.y(value)) for eps, value in line.points]) for line in lines],
        labels=_labels(lines, chance, axes),
    )


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


def shortened(name: str, length: int) -> str:
    """A name, cut to a number of characters.

    >>> shortened("margin", 6), shortened("margins", 6)
    ('margin', 'margi…')
    """
    return name if len(name) <= length else name[: length - 1] + "…"


@dataclass(frozen=True)
class _Axes:
    """From 0 to the largest eps, and from 0 to the next multiple of 20 % above the highest value."""

    largest: float
    top: float

    def x(self, eps: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * eps / self.largest, 1)

    def y(self, value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / self.top, 1)


def _ticks(radii: Sequence[float], norm: str, axes: _Axes) -> list[tuple[float, str]]:
    """A tick at each eps. From the largest eps on, it has a number where there is room for one."""
    ticks, free = [], math.inf
    for eps in reversed(radii):
        x = axes.x(eps)
        has_room = eps == 0 or _LEFT + _TICK_GAP <= x <= free
        ticks.append((x, radius(eps, norm) if has_room else ""))
        free = x - _TICK_GAP if has_room else free
    return ticks


def _labels(lines: Sequence[Line], chance: float | None, axes: _Axes) -> list[EndLabel]:
    """Names beside the ends of the lines. Single attacks are named only if there is room for all of them."""
    ends = [(line.name, axes.y(line.points[-1][1]), line.kind) for line in lines]
    ends += [] if chance is None else [("chance", axes.y(chance), "level")]
    if len(ends) > (_BOTTOM - _TOP) / _LABEL_GAP + 2:
        ends = [end for end in ends if not end[2].endswith("one")]
    places = spread([y for _, y, _ in ends], _LABEL_GAP, _TOP - 2, _BOTTOM + 14)
    return [
        EndLabel(name, shortened(name, _LABEL_LENGTH), kind, y, round(place, 1))
        for (name, y, kind), place in zip(ends, places, strict=True)
    ]
