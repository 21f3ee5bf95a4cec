"""An evaluation made again from its report, with the same model and the same images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..training.isolation import random_stream
from .attacks.as_json import from_json, to_json
from .attacks.kinds import RetrievalAttack
from .comparison import check_report
from .reports import fingerprints
from .reports.report import Report
from .retrieval.distance import DISTANCES, find_distance
from .retrieval.embedder import Embedder, plain_surroundings
from .retrieval.forms import Images
from .retrieval.options import description_of_mask
from .retrieval.task import Mask, RetrievalTask, Search
from .robustness import evaluate_robustness
from .suites import SUITES

_MEASURED = ("model", "queries", "gallery", "gallery_embeddings", "ignored_items", "relevant_items")
_GIVEN = ("distance", "ignore", "relevant")
_NO_OPTIONS = ("device", "precision", "attack_settings")


def repeat(
    report: Report,
    model: Any,
    queries: Images,
    gallery: Images | None = None,
    *,
    gallery_embeddings: Tensor | None = None,
    distance: Any = None,
    ignore: Mask = None,
    relevant: Mask = None,
    attacks: Sequence[RetrievalAttack] = (),
    resume: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Makes an evaluation again, with the settings of its report, which may come from `Report.load_json`.

    On the same device, with as many threads and the same versions, all numbers but the times are the same. Both reports
    have these in ``settings``, ``provenance`` and ``versions``.

    Args:
        report: of the evaluation.
        model: the same model.
        queries: the same images and labels.
        gallery: the same images and labels; None if the queries were the gallery.
        gallery_embeddings: the same embeddings, if the evaluation was given any.
        distance: the same distance, if it was an object of PML.
        ignore: the same mask, if the evaluation was given one.
        relevant: the same mask, if the evaluation was given one.
        attacks: the attacks of your own, if the evaluation had any: their code is not part of a report.
        resume: as in `evaluate_robustness`.
        progress: as in `evaluate_robustness`.

    Raises:
        InputError: what is given is not what the report measured, or something that the report does not hold is
            missing.
    """
    check_report(report, "report")
    settings = _settings(report)
    members = from_json(settings["attack_settings"], attacks)
    given = {"distance": _distance(settings, distance), "ignore": ignore, "relevant": relevant}
    embed = Embedder(model, settings["normalization"], settings["bounds"])
    search = Search(own=settings["own"], junk_label=settings["junk_label"], **given)
    with plain_surroundings(), random_stream(settings["seed"], -1):
        task = RetrievalTask(embed, queries, gallery, settings["norm"], search)
        found = fingerprints.of_task(task, task.rows(settings["subset"]), gallery_embeddings)
    found |= {"precision": embed.precision, "distance": find_distance(given["distance"]).name}
    found |= {name: description_of_mask(given[name]) for name in ("ignore", "relevant")}
    _check_same(found, report)
    options = {name: value for name, value in settings.items() if name not in _NO_OPTIONS}
    options |= {**given, "attacks": _suite(report, members), "gallery_embeddings": gallery_embeddings}
    return evaluate_robustness(model, queries, gallery, resume=resume, progress=progress, **options)


def _settings(report: Report) -> Mapping[str, Any]:
    """The settings of a report, if they are those that this version knows."""
    parameters = set(inspect.signature(evaluate_robustness).parameters)
    known = {*_NO_OPTIONS, *parameters} - {"model", "resume", "progress", "share", *_MEASURED}
    differ = sorted(known ^ set(report.settings))
    if differ:
        raise InputError(
            f"The report and this version differ in the settings {', '.join(differ)}. Install the version that made "
            f"the report, pml-adversarial {report.versions.get('pml-adversarial')}."
        )
    return report.settings


def _distance(settings: Mapping[str, Any], given: Any) -> Any:
    name = settings["distance"]
    if given is None and name not in DISTANCES:
        raise InputError(f"The report's distance is {name}, an object that it does not hold. Pass it as distance=....")
    return name if given is None else given


def _check_same(found: Mapping[str, Any], report: Report) -> None:
    expected = {name: report.provenance.get(name) for name in _MEASURED}
    expected |= {name: report.settings[name] for name in (*_GIVEN, "precision")}
    differ = [name for name, value in expected.items() if value != found.get(name)]
    if differ:
        values = "; ".join(f"{name}: found {found.get(name)}, the report has {expected[name]}" for name in differ)
        raise InputError(f"This is not what the report measured: {values}.")


def _suite(report: Report, members: Sequence[RetrievalAttack]) -> str | Sequence[RetrievalAttack]:
    """The name of a suite if the report is on one as it is now, so that the new report names it too; else attacks."""
    for name, (version, make) in SUITES.items():
        if version == report.suite and list(map(to_json, make())) == list(map(to_json, members)):
            return name
    return members
