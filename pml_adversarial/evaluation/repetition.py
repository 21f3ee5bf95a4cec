"""An evaluation made again from its report, with the same model and the same images."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from . import fingerprints
from .attack_options import from_json, to_json
from .attacks import RetrievalAttack
from .images import Images
from .report import Report
from .retrieval_task import RetrievalTask
from .robustness import evaluate_robustness
from .suites import SUITES

_SAID = ("model", "queries", "gallery", "gallery_embeddings")


def repeat(
    report: Report,
    model: nn.Module,
    queries: Images,
    gallery: Images | None = None,
    *,
    gallery_embeddings: Tensor | None = None,
    attacks: Sequence[RetrievalAttack] = (),
    resume: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Makes an evaluation again, with the settings of its report, which may come from `Report.load_json`.

    With the same device, number of threads and versions, all numbers but the times are the same. These stand in
    ``provenance`` and ``versions`` of both reports.

    Args:
        report: of the evaluation.
        model: the same model.
        queries: the same images and labels.
        gallery: the same images and labels; None if the queries were the gallery.
        gallery_embeddings: the same embeddings, if the evaluation was given any.
        attacks: the attacks of your own, if the evaluation had any: their code is not part of a report.
        resume: as in `evaluate_robustness`.
        progress: as in `evaluate_robustness`.

    Raises:
        InputError: the model or the images are others than those of the report, or an attack of your own is missing.
    """
    settings = _settings(report)
    members = from_json(settings.pop("attack_settings"), attacks)
    task = RetrievalTask(model, queries, gallery, settings["norm"], settings["normalization"], settings["own"])
    _check_same(report, fingerprints.of_task(task, gallery_embeddings))
    settings["attacks"] = _suite(report, members)
    return evaluate_robustness(
        model, queries, gallery, gallery_embeddings=gallery_embeddings, resume=resume, progress=progress, **settings
    )


def _settings(report: Report) -> dict[str, Any]:
    """The options of `evaluate_robustness`, with ``attack_settings``."""
    found = {name: value for name, value in report.settings.items() if name != "device"}  # the model is on a device
    known = {*inspect.signature(evaluate_robustness).parameters, "attack_settings"}
    unknown = [name for name in found if name not in known]
    if unknown:
        raise InputError(
            f"The report has the settings {', '.join(unknown)}, which this version does not have. Install the version "
            f"that made it: {report.versions.get('pml-adversarial')}."
        )
    missing = [name for name in ("attack_settings", "norm", "normalization", "own") if name not in found]
    if missing:
        raise InputError(f"The report does not say {', '.join(missing)}; expected a report of evaluate_robustness.")
    return found


def _check_same(report: Report, found: dict[str, Any]) -> None:
    expected = {name: report.provenance.get(name) for name in _SAID}
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
