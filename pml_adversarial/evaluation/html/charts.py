"""Measures against eps, drawn as SVG: the worst case thick, each attack thin, named where its line ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Markup, element

_WIDTH, _HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 330, 12, 248
_LABEL_GAP, _TICK_GAP, _LABEL_LENGTH = 12.5, 38, 15


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: at its end.
        target: "query" or "gallery".
        worst: whether it is the worst case, not one attack.
        points: ``(eps, value in [0, 1])``, by eps.
    """

    name: str
    target: str
    worst: bool
    points: tuple[tuple[float, float], ...]


def radius(eps: float, norm: str) -> str:
    """How an eps is written: in 255ths where that is how it was meant.

    >>> [radius(eps, "Linf") for eps in (8 / 255, 0.1, 0.2, 0.12345)], radius(2.0, "L2")
    (['8/255', '0.1', '0.2', '0.1235'], '2')
    """
    levels = round(eps * 255)
    meant = norm == "Linf" and 0 < levels < 255 and abs(eps * 255 - levels) < 1e-4 and float(f"{eps:.2g}") != eps
    return f"{levels}/255" if meant else f"{eps:.4g}"


def chart(lines: Sequence[Line], norm: str, label: str, chance: float | None = None) -> Markup:
    """Curves over eps.

    Args:
        lines: later ones lie above earlier ones.
        norm: of eps.
        label: what it shows, for those who do not see it.
        chance: where a dotted line is drawn; None: nowhere.
    """
    radii, values = zip(*(point for line in lines for point in line.points), strict=True)
    axes = _Axes(max(radii) or 1.0, math.ceil(5 * max(*values, chance or 0.0)) / 5 or 1.0)
    level = [] if chance is None else [_level(axes.y(chance), "chance")]
    drawn = [_curve(line, axes) for line in lines]
    parts = [_grid(axes), _ticks(sorted(set(radii)), norm, axes), level, drawn, _names(lines, chance, axes)]
    return element("svg", parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved apart, as little as a sweep down and a sweep up can, in their order.

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
    """A name that fits.

    >>> shortened("margin", 6), shortened("margins", 6)
    ('margin', 'margi…')
    """
    return name if len(name) <= length else name[: length - 1] + "…"


@dataclass(frozen=True)
class _Axes:
    """From 0 to the largest eps and to the next fifth above the highest value."""

    largest: float
    top: float

    def x(self, eps: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * eps / self.largest, 1)

    def y(self, value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / self.top, 1)


def _level(y: float, class_: str) -> Markup:
    return element("line", x1=_LEFT, y1=y, x2=_RIGHT, y2=y, class_=class_)


def _text(text: str, x: float, y: float, class_: str) -> Markup:
    return element("text", text, x=x, y=y, class_=class_)


def _grid(axes: _Axes) -> Markup:
    percents = range(0, round(100 * axes.top) + 1, 20 if axes.top > 0.5 else 10)
    lines = [_level(axes.y(percent / 100), "grid") for percent in percents]
    return element(
        "g", lines, [_text(str(percent), _LEFT - 7, axes.y(percent / 100) + 4, "end") for percent in percents]
    )


def _ticks(radii: Sequence[float], norm: str, axes: _Axes) -> Markup:
    """A tick at each eps, a number where there is room, at the largest first."""
    places = {eps: axes.x(eps) for eps in radii}
    ticks = [element("line", x1=x, y1=_BOTTOM, x2=x, y2=_BOTTOM + 4, class_="tick") for x in places.values()]
    texts, free = [], math.inf
    for eps, x in reversed(places.items()):
        if eps == 0 or _LEFT + _TICK_GAP <= x <= free:
            texts.append(_text(radius(eps, norm), x, _BOTTOM + 18, "middle"))
            free = x - _TICK_GAP
    return element("g", ticks, texts, _text(f"eps ({norm})", (_LEFT + _RIGHT) / 2, _HEIGHT - 4, "middle"))


def _curve(line: Line, axes: _Axes) -> Markup:
    places = [(axes.x(eps), axes.y(value)) for eps, value in line.points]
    path = element("polyline", points=" ".join(f"{x},{y}" for x, y in places))
    dots = [_dot(x, y, line.target) for x, y in places] if line.worst else []
    return element("g", element("title", line.name), path, dots, class_=_class(line))


def _dot(x: float, y: float, target: str) -> Markup:
    if target == "query":
        return element("circle", cx=x, cy=y, r=3.4)
    return element("path", d=f"M{x} {y - 4.6}L{x + 4.6} {y}L{x} {y + 4.6}L{x - 4.6} {y}Z")


def _class(line: Line) -> str:
    return f"{line.target} {'worst' if line.worst else 'one'}"


def _names(lines: Sequence[Line], chance: float | None, axes: _Axes) -> Markup:
    """Names beside the ends of the lines; those of single attacks only if there is room for all."""
    ends = [(line.name, axes.y(line.points[-1][1]), _class(line)) for line in lines]
    ends += [] if chance is None else [("chance", axes.y(chance), "level")]
    if len(ends) > (_BOTTOM - _TOP) / _LABEL_GAP + 2:
        ends = [end for end in ends if not end[2].endswith("one")]
    places = spread([y for _, y, _ in ends], _LABEL_GAP, _TOP - 2, _BOTTOM + 14)
    return element("g", [_name(*end, place) for end, place in zip(ends, places, strict=True)])


def _name(name: str, y: float, class_: str, place: float) -> Markup:
    leader = element("polyline", points=f"{_RIGHT + 6},{y} {_RIGHT + 18},{place:.1f}", class_="leader")
    text = _text(shortened(name, _LABEL_LENGTH), _RIGHT + 22, round(place + 4, 1), "name")
    return element("g", element("title", name), leader, text, class_=class_)
