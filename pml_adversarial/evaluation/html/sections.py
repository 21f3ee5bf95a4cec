"""What the page says, one function per section."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from torch import Tensor

from ..report import AttackResult, Check, Example, Neighbour, Report, WorstCase, heading
from .charts import Line, chart, radius
from .markup import Content, Markup, element, joined
from .pictures import data_uri, magnified, small, visible

_TARGETS = {"query": "the query perturbed", "gallery": "one gallery item per query perturbed"}
_PIXELATED_BELOW, _THUMBNAIL = 80, 64
_CHECK_MARKS = {True: ("✓ pass", "pass"), False: ("⚑ flag", "flag"), None: ("· not asked", "unasked")}
_HOW_TO_READ = {
    "mean_similarity": "Of any two items. Near 1, all lie in one place.",
    "mean_similarity_same": "Of two items of one class. To be well above that of different classes.",
    "mean_similarity_other": "Of two items of different classes. Near 1, classes are hardly apart.",
    "effective_rank": "Directions in use. Near 1, all items lie on one line.",
}


def render(report: Report) -> str:
    """A report as one HTML page, complete in itself: it loads nothing and runs nothing."""
    title = f"Robustness of an embedding: {report.suite}, {report.protocol}"
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8"))),
    )
    sections = (_opening, _checks, _curves, _attacks, _embedding, _examples, _settings)
    main = element("main", [section(report) for section in sections])
    return "<!DOCTYPE html>\n" + element("html", head, element("body", main), lang="en") + "\n"


def _opening(report: Report) -> Markup:
    title = element("h1", "Robustness of an embedding", element("small", f"{report.suite}, {report.protocol}"))
    return element("header", title, _warning(report.flagged), _headline(report), _facts(report))


def _warning(flagged: Sequence[Check]) -> Content:
    if not flagged:
        return ""
    count = f"{len(flagged)} checks raise" if len(flagged) > 1 else "A check raises"
    strong = element("strong", f"⚑ {count} a flag: the numbers below may promise more than is true.")
    lines = [element("li", element("b", check.name), ": ", check.line) for check in flagged]
    return element("section", element("p", strong), element("ul", lines), class_="warning", aria_label="Warning")


def _headline(report: Report) -> Content:
    clean = ["R@1 ", _share(report.clean["recall_at_1"]), " clean"]
    under = {target: _under_attack(report, target) for target in _TARGETS}
    if under["query"]:
        first, second = [*clean, "; ", under["query"]], under["gallery"]
    else:
        first, second = [*clean, "; ", under["gallery"] or "no attack ran"], ""
    rest = ["If instead one item of the gallery is perturbed for each query: ", second, "."] if second else ""
    return element("p", first, ".", class_="headline"), element("p", rest) if rest else ""


def _under_attack(report: Report, target: str) -> Content:
    cases = [worst for worst in report.worst if worst.target == target]
    if not cases:
        return ""
    norm = _norm(report)
    shares = joined(
        ", ", [[_share(w.measures["recall_at_1"]), " at eps\u00a0", _eps(w.eps, norm)] for w in _few(cases)]
    )
    count = len({result.attack for result in report.attacks if result.target == target})
    attacks = f"{count} attack{'s' * (count != 1)}"
    return [shares, " in the worst case per query (", joined(", ", [part for part in (norm, attacks) if part]), ")"]


def _few(cases: Sequence[WorstCase]) -> Sequence[WorstCase]:
    """Up to four; of more the smallest, the middle and the largest eps."""
    cases = sorted(cases, key=lambda worst: worst.eps)
    return cases if len(cases) <= 4 else [cases[0], cases[len(cases) // 2], cases[-1]]


def _facts(report: Report) -> Markup:
    left_out = f" ({report.left_out:,} more left out, nothing in the gallery being right for them)"
    facts = [
        f"{report.num_queries:,} queries" + left_out * (report.left_out > 0),
        f"{report.num_gallery:,} items of {report.num_classes:,} classes searched",
        ["chance ", _share(report.chance)],
    ]
    meaning = (
        "Worst case per query: each query meets whatever is worst for it, attack or none. Attacks find what they find; "
        "a stronger one can only lower these numbers."
    )
    return element("p", joined("; ", facts), ". ", meaning, class_="quiet")


def _checks(report: Report) -> Markup:
    if not report.checks:
        return _section("Checks", element("p", "No check was made: nothing here says whether to believe the numbers."))
    return _section("Checks", element("ul", map(_check, report.checks), class_="checks"))


def _check(check: Check) -> Markup:
    mark, kind = _CHECK_MARKS[check.passed]
    found = element("span", element("b", check.name), ": ", check.line)
    return element("li", element("span", mark, class_=f"mark {kind}"), found)


def _curves(report: Report) -> Markup:
    if not report.attacks:
        return _section("Curves", element("p", "No attack ran."))
    measures = [name for name in ("recall_at_1", "map_at_r") if name in report.clean]
    return _section(
        "Curves",
        _legend(report),
        element("div", [_curve(report, measure) for measure in measures], class_="charts"),
    )


def _legend(report: Report) -> Markup:
    present = [target for target in _TARGETS if any(worst.target == target for worst in report.worst)]
    keys = [element("span", _key(f"{target} worst"), f"worst case, {_TARGETS[target]}") for target in present]
    return element("p", joined(" ", [*keys, element("span", "thin: one attack each")]), class_="quiet legend")


def _key(class_: str) -> Markup:
    line = element("g", element("polyline", points="1,6 27,6"), class_=class_)
    return element("svg", line, viewBox="0 0 28 12", aria_hidden="true")


def _curve(report: Report, measure: str) -> Markup:
    lines = _lines(report, measure)
    worst = "; ".join(
        f"{line.name}: " + ", ".join(f"{100 * value:.1f} at eps {eps:.4g}" for eps, value in line.points)
        for line in lines
        if line.worst
    )
    label = f"{heading(measure)} in percent against eps. {worst}."
    chance = report.chance if measure == "recall_at_1" else None
    return element(
        "figure",
        element("figcaption", element("b", heading(measure)), ", percent"),
        chart(lines, _norm(report), label, chance),
        element("details", element("summary", "The same in numbers"), _numbers(heading(measure), lines, _norm(report))),
    )


def _lines(report: Report, measure: str) -> list[Line]:
    """Thin ones first, so that the worst cases lie above them."""
    clean = (0.0, report.clean[measure])
    by_line: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    for result in report.attacks:
        key = (result.attack, result.target, False)
        by_line.setdefault(key, []).append((result.eps, result.measures[measure]))
    for worst in sorted(report.worst, key=lambda worst: worst.target == "query"):
        key = (f"worst ({worst.target})", worst.target, True)
        by_line.setdefault(key, []).append((worst.eps, worst.measures[measure]))
    return [Line(*key, (clean, *sorted(points))) for key, points in by_line.items()]


def _numbers(measure: str, lines: Sequence[Line], norm: str) -> Markup:
    radii = sorted({eps for line in lines for eps, _ in line.points})
    rows = []
    for line in reversed(lines):
        values = dict(line.points)
        cells = [_cell(_percent(values[eps])) if eps in values else _cell("") for eps in radii]
        rows.append(element("tr", _row_head(line.name), cells, class_="worst" if line.worst else None))
    heads = [_column("eps", None), *(_column(_eps(eps, norm)) for eps in radii)]
    return _table(f"{measure}, percent, by eps", heads, [element("tbody", rows)])


def _attacks(report: Report) -> Markup:
    names = list(report.clean)
    plain = [_column(text, None) for text in ("eps", "attack", "perturbs", "access")]
    costs = ("shift", "forward", "backward", "seconds")
    heads = [*plain, *(_column(text) for text in (*map(heading, names), *costs))]
    empty = element("td")
    clean = element("tr", empty, _row_head("none"), empty, empty, _measured(report.clean, names), [empty] * 4)
    radii = sorted({result.eps for result in report.attacks} | {worst.eps for worst in report.worst})
    bodies = [element("tbody", clean), *(_at_radius(report, eps, names) for eps in radii)]
    how = (
        "Measures in percent, means over the queries. Shift: mean distance of perturbed from clean unit embeddings, 0 "
        "to 2. Forward, backward: images that were embedded, and whose gradient was taken. Bold: worst case per query."
    )
    return _section("Attacks", element("p", how, class_="quiet"), _table("Every attack at every eps", heads, bodies))


def _at_radius(report: Report, eps: float, names: Sequence[str]) -> Markup:
    rows = [
        *((None, _attack_row(result, names)) for result in report.attacks if result.eps == eps),
        *(("worst", _worst_row(worst, names)) for worst in report.worst if worst.eps == eps),
    ]
    heads = [element("th", _eps(eps, _norm(report)), scope="rowgroup", rowspan=len(rows)), *[""] * (len(rows) - 1)]
    return element(
        "tbody", [element("tr", head, *row, class_=kind) for head, (kind, row) in zip(heads, rows, strict=True)]
    )


def _attack_row(result: AttackResult, names: Sequence[str]) -> list[Content]:
    access = "black box" if result.black_box else "white box"
    costs = [
        _number(result.shift, f"{result.shift:.3f}"),
        *(_number(passes, f"{passes:,}") for passes in (result.forward_passes, result.backward_passes)),
        _number(result.seconds, f"{result.seconds:.1f}"),
    ]
    named = [_row_head(result.attack), element("td", result.target), element("td", access, class_="word")]
    return [*named, *_measured(result.measures, names), *map(_cell, costs)]


def _worst_row(worst: WorstCase, names: Sequence[str]) -> list[Content]:
    named = [_row_head("worst case"), element("td", worst.target), element("td")]
    return [*named, *_measured(worst.measures, names), *[element("td")] * 4]


def _embedding(report: Report) -> Markup:
    rows = [
        element("tr", _row_head(name.replace("_", " ")), _cell(_number(value, f"{value:.3f}")), _how_to_read(name))
        for name, value in report.collapse.items()
    ]
    heads = [_column("sign", None), _column("value"), _column("how to read it", None)]
    line = (
        "Has it collapsed? Where all items lie close together, an attack seems to move nothing, and what is nearest is "
        "left to chance."
    )
    return _section(
        "Embedding", element("p", line), _table("Signs of collapse", heads, [element("tbody", rows, _nmi_rows(report))])
    )


def _how_to_read(name: str) -> Markup:
    return element("td", _HOW_TO_READ.get(name, ""))


def _nmi_rows(report: Report) -> list[Markup]:
    found: list[tuple[Content, float, str]] = []
    if report.nmi is not None:
        found.append(("NMI, percent", report.nmi, "How well clusters of k-means agree with the classes; 100: fully."))
    for worst in report.worst:
        if worst.nmi is not None:
            name = ["NMI at eps ", _eps(worst.eps, _norm(report)), ", percent"]
            found.append((name, worst.nmi, "The same with each query under its worst attack."))
    return [element("tr", _row_head(name), _cell(_percent(nmi)), element("td", line)) for name, nmi, line in found]


def _examples(report: Report) -> Content:
    if not report.examples:
        return ""
    line = (
        "Each with the nearest items that it finds, nearest first: ✓ of its own class, solid frame; ✗ of another, "
        "dashed frame."
    )
    norm = _norm(report)
    return _section("Queries, before and after", element("p", line), [_example(part, norm) for part in report.examples])


def _example(example: Example, norm: str) -> Markup:
    difference, factor = magnified(example.clean, example.perturbed)
    query = f"query {example.query}"
    met = "no attack broke it" if example.attack == "none" else f"attack {example.attack}"
    caption = element("b", f"Query {example.query}, label {example.label}"), f"; {met}, eps ", _eps(example.eps, norm)
    triple = [
        _picture(visible(example.clean), f"{query}, clean", "clean"),
        _picture(visible(example.perturbed), f"{query}, perturbed", "perturbed"),
        _picture(
            difference, f"{query}, perturbed less clean, times {factor}, about grey", f"difference \u00d7 {factor}"
        ),
    ]
    finds = [
        _finds("finds, clean", example.before, example.label),
        _finds("finds, perturbed", example.after, example.label),
    ]
    pictures = element("div", element("div", triple, class_="triple"), element("div", finds), class_="panel")
    return element("figure", element("figcaption", caption), pictures, class_="example")


def _finds(title: str, found: Iterable[Neighbour], label: int) -> Markup:
    items = []
    for neighbour in found:
        right = neighbour.label == label
        alt = f"item {neighbour.item}, label {neighbour.label}, {'right' if right else 'wrong'}"
        mark = f"{'✓' if right else '✗'} {neighbour.label}"
        image = small(visible(neighbour.image), _THUMBNAIL)
        items.append(element("li", _picture(image, alt, mark), class_="right" if right else "wrong"))
    return element("div", element("h3", title), element("ol", items), class_="finds")


def _picture(image: Tensor, alt: str, caption: str) -> Markup:
    """An image above a few words; ``image`` is grey or RGB."""
    height, width = image.shape[-2:]
    class_ = "pixelated" if max(height, width) < _PIXELATED_BELOW else None
    shown = element("img", src=data_uri(image), alt=alt, width=width, height=height, class_=class_)
    return element("span", shown, element("span", caption), class_="picture")


def _settings(report: Report) -> Markup:
    """What is needed to measure it again."""
    parts = {"suite": report.suite, "protocol": report.protocol}
    groups = {"settings": report.settings, "versions": report.versions}
    text = _object({**{k: json.dumps(v) for k, v in parts.items()}, **{k: _values(v, 1) for k, v in groups.items()}})
    details = element("details", element("summary", "Settings and versions, as JSON"), element("pre", text, tabindex=0))
    return _section("To measure it again", details)


def _values(values: Mapping[str, object], depth: int) -> str:
    return _object({key: json.dumps(value, allow_nan=False) for key, value in values.items()}, depth)


def _object(values: Mapping[str, str], depth: int = 0) -> str:
    """A JSON object with one line per key, however long its value."""
    indent = "  " * depth
    lines = [f"{indent}  {json.dumps(key)}: {value}" for key, value in values.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _section(title: str, *content: Content) -> Markup:
    return element("section", element("h2", title), *content)


def _table(name: str, heads: Sequence[Markup], bodies: Sequence[Markup]) -> Markup:
    """A table that scrolls by itself where the page is narrower than it."""
    table = element("table", element("thead", element("tr", heads)), bodies, aria_label=name)
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=name)


def _column(text: Content, class_: str | None = "number") -> Markup:
    return element("th", text, scope="col", class_=class_)


def _row_head(text: Content) -> Markup:
    return element("th", text, scope="row")


def _cell(content: Content) -> Markup:
    return element("td", content, class_="number")


def _measured(measures: Mapping[str, float], names: Sequence[str]) -> list[Markup]:
    return [_cell(_percent(measures[name])) for name in names]


def _norm(report: Report) -> str:
    return str(report.settings.get("norm", ""))


def _number(value: float, shown: str) -> Markup:
    """A number as a reader wants it, with the whole of it for programs."""
    return element("data", shown, value=repr(value))


def _percent(value: float) -> Markup:
    return _number(value, f"{100 * value:.1f}")


def _share(value: float) -> Markup:
    return _number(value, f"{100 * value:.1f}\u00a0%")


def _eps(eps: float, norm: str) -> Markup:
    return _number(eps, radius(eps, norm))
