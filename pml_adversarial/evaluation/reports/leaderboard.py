"""A leaderboard: one JSON file per model and protocol, in a folder per threat model, and the page made from them."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...attacks.ball import radius_text
from ...errors import InputError
from .binomial import rate_interval
from .report import Report
from .results import decode_flags

Entry = Mapping[str, Any]
"""What one file holds, see `entry_of`."""

MIN_QUERIES = 100
"""Fewer queries say too little: the interval of a rate near one half would be wider than 20 points."""

_SPLIT = 40  # characters of a split that tell two entries of a model apart


@dataclass(frozen=True)
class Model:
    """What a report does not know of a model.

    Attributes:
        method: what it was trained with.
        paper: of the method, such as "arXiv 2102.07265"; "" where there is none.
        data: name of the data and size of the images, such as "Cars196, 64x64".
        split: what was trained on, and what was searched.
        backbone: the network, and where its first weights come from.
        passes: image passes of training.
        train_eps: radius of the training attack, in pixels of [0, 1]; 0 for training without an attack.
        seed: of the training.
        source: where the weights or the code are.
    """

    method: str
    data: str
    split: str
    backbone: str
    passes: int
    train_eps: float
    paper: str = ""
    seed: int = 0
    source: str = ""


def entry_of(report: Path, model: Model, unchecked: bool = False) -> dict[str, Any]:
    """An entry from a saved report.

    Args:
        report: a report.json of `evaluate_robustness`.
        model: what was evaluated.
        unchecked: whether a report without checks is taken. The page then says that there are none.

    Raises:
        InputError: the report cannot be read, or has too few queries, or its checks flag or are missing, or its numbers
            contradict one another.
    """
    found = Report.load_json(report)
    _check(found, report, unchecked)
    made = sum(check.passed is not None for check in found.checks)
    return {
        **entry_from(found.to_dict(), model),
        "threat_model": found.settings["norm"],
        "checks": {"passed": made, "made": made} if made else None,
        "report_sha256": hashlib.sha256(report.read_bytes()).hexdigest(),
    }


def entry_from(report: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """An entry from what `Report.to_dict` tells, of attacks within l-inf, as if no checks were made.

    Reports of old versions, which tell less, are taken too.
    """
    queries, provenance = report["num_queries"], report.get("provenance", {})
    worst = [part for part in report["worst"] if part["target"] == "query"]
    return {
        **asdict(model),
        "threat_model": "Linf",
        "protocol": report["protocol"],
        "queries": queries,
        "gallery": report["num_gallery"],
        "suite": report["suite"],
        "attacks": sorted({attack["attack"] for attack in report["attacks"] if attack["target"] == "query"}),
        "checks": None,
        "clean": _rate(report["clean"]["recall_at_1"], queries),
        "map_at_r": report["clean"]["map_at_r"],
        "worst_case": [{"eps": part["eps"], **_rate(part["measures"]["recall_at_1"], queries)} for part in worst],
        "model_sha256": provenance.get("model", {}).get("sha256"),
        "report_sha256": None,
        "versions": dict(report["versions"]),
        "date": provenance.get("time", "")[:10] or None,
    }


def add(entry: Entry, board: Path, replace: bool = False) -> Path:
    """Writes an entry into the folder of its threat model.

    Returns:
        The file.

    Raises:
        InputError: there is an entry of that name or of this report already, and it shall not be replaced.
    """
    trained = f"trained at {radius_text(entry['train_eps'])}" if entry["train_eps"] else "no attack"
    run = trained, f"{entry['passes']} passes", f"seed {entry['seed']}"
    parts = (entry["data"], entry["method"], entry["backbone"], *run)
    folder = board / entry["threat_model"]
    path = _file(folder, *parts)
    if path.exists() and _read(path)["split"] != entry["split"]:
        path = _file(folder, *parts, entry["split"][:_SPLIT])
    if path.exists() and not replace:
        raise InputError(f"{path} is there already. Replace it with --force, or give the model another name or seed.")
    if digest := entry["report_sha256"]:
        for other in folder.glob("*.json"):
            if other != path and digest in other.read_text(encoding="utf-8"):
                raise InputError(f"This report is there already, as {other}. Delete that entry, or add another report.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    return path


def _file(folder: Path, *parts: str) -> Path:
    return folder / ("--".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts) + ".json")


def entries(board: Path) -> list[dict[str, Any]]:
    """All entries of a folder.

    Raises:
        InputError: there are none, or a file cannot be read.
    """
    paths = sorted(board.glob("*/*.json"))
    if not paths:
        raise InputError(f"{board} holds no entries; expected files such as Linf/name.json.")
    return list(map(_read, paths))


def _read(path: Path) -> dict[str, Any]:
    """One entry; all that the tables show of it is read."""
    try:
        entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"The entry {path} is no JSON: {error}") from error
    try:
        tables([entry])
        for rate in (entry["clean"], *entry["worst_case"]):
            low, high = rate["interval"]
            if not 0 <= low <= rate["recall_at_1"] <= high <= 1:
                raise ValueError(f"R@1 of {rate['recall_at_1']} in {low} to {high}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no entry ({error!r}); expected what `leaderboard add` writes.") from error
    return entry


def tables(found: Iterable[Entry]) -> str:
    """In Markdown, a table for each threat model and data: one line for each method, over its seeds.

    Runs of one method and network whose image passes differ by less than a twentieth or so are its seeds. Lines are
    ordered by R@1 in the worst case, averaged over the radii that all lines of a table share.
    """
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in found:
        groups.setdefault((entry["threat_model"], entry["data"], entry["split"]), []).append(entry)
    parts = []
    for (threat, data, split), members in sorted(groups.items()):
        parts += [f"## {data}, {threat}", f"{split}", _table(members)]
    return "\n\n".join(parts) + "\n"


def _table(members: Sequence[Entry]) -> str:
    by_model: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in members:
        key = tuple(entry[name] for name in ("method", "paper", "backbone", "train_eps", "suite", "queries"))
        by_model.setdefault((*key, float(f"{entry['passes']:.1e}"), _checks(entry)), []).append(entry)
    radii = sorted({worst["eps"] for entry in members for worst in entry["worst_case"]})
    shared = [eps for eps in radii if all(_worst(entry, eps) is not None for entry in members)]

    def strength(runs: Sequence[Entry]) -> float:
        rates = [_worst(run, eps) for run in runs for eps in shared]
        return statistics.fmean([rate["recall_at_1"] for rate in rates if rate is not None] or [0.0])

    head = ["method", "network", "passes", "trained at", "R@1", *(f"at {radius_text(eps)}" for eps in radii), "seeds"]
    lines = [[*head, "queries", "attacks", "checks"]]
    for (method, paper, backbone, train_eps, suite, queries, _, checks), runs in sorted(
        by_model.items(), key=lambda item: -strength(item[1])
    ):
        passes = f"{statistics.fmean(run['passes'] for run in runs):,.0f}"
        cells = [
            f"{method} ({paper})" if paper else method,
            backbone,
            passes,
            radius_text(train_eps) if train_eps else "no attack",
        ]
        cells += [_cell([run["clean"] for run in runs]), *(_cell([_worst(run, eps) for run in runs]) for eps in radii)]
        lines.append([*cells, str(len(runs)), str(queries), suite, checks])
    rule = ["---", "---", *["---:"] * (len(lines[0]) - 4), "---", "---"]
    return "\n".join(f"| {' | '.join(map(_escaped, cells))} |" for cells in (lines[0], rule, *lines[1:]))


def _escaped(cell: str) -> str:
    """Text that stays in one cell of a table in Markdown."""
    return " ".join(cell.split()).replace("|", "\\|")


def _worst(entry: Entry, eps: float) -> Mapping[str, Any] | None:
    return next((worst for worst in entry["worst_case"] if worst["eps"] == eps), None)


def _cell(rates: Sequence[Mapping[str, Any] | None]) -> str:
    """Mean and deviation over seeds, in percent; of one seed, its rate and interval."""
    known = [rate for rate in rates if rate is not None]
    if not known:
        return ""
    values = [100 * rate["recall_at_1"] for rate in known]
    if len(known) > 1:
        return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
    low, high = (100 * end for end in known[0]["interval"])
    return f"{values[0]:.1f} [{low:.1f}, {high:.1f}]"


def _checks(entry: Entry) -> str:
    return f"{entry['checks']['passed']} of {entry['checks']['made']} passed" if entry["checks"] else "not made"


def _rate(value: float, queries: int) -> dict[str, Any]:
    return {"recall_at_1": value, "interval": list(rate_interval(round(value * queries), queries))}


def _check(report: Report, path: Path, unchecked: bool) -> None:
    if report.num_queries < MIN_QUERIES:
        raise InputError(f"{path} has {report.num_queries} queries; expected {MIN_QUERIES} or more.")
    if not any(worst.target == "query" for worst in report.worst):
        raise InputError(f"{path} has no attack on queries; expected a suite that attacks them.")
    if report.flagged:
        said = "; ".join(f"{check.name}: {check.message}" for check in report.flagged)
        raise InputError(
            f"{path} is flagged, so its numbers are likely too high: {said}. Find out why, see docs/evaluation.md, "
            "and evaluate the model again."
        )
    if not any(check.passed for check in report.checks) and not unchecked:
        raise InputError(
            f"{path} was made without checks; expected checks=True and the suite 'standard'. --unchecked adds it with "
            "a note that there are none."
        )
    clean = decode_flags(report.clean_flags)
    for worst in report.worst:
        robust = decode_flags(worst.robust_flags)
        single = [a for a in report.attacks if a.target == worst.target and a.eps == worst.eps]
        missed = any((robust & ~decode_flags(attack.robust_flags)).any() for attack in single)
        if missed or (robust & ~clean).any():
            raise InputError(
                f"{path}: the worst case at eps {worst.eps:g} is not that of the attacks in it. Make the report again "
                "with evaluate_robustness, and do not change it."
            )
