"""One method with one seed: trained, attacked and noted in a folder of its own; what is there is not made again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pml_adversarial import InputError, Report, evaluate_robustness

from .data import Part
from .methods import Method
from .protocol import Protocol
from .train import Passed, Training, build_for, original_for

RUN, MODEL, CHECKPOINT, TRAINING = "run.json", "model.pt", "checkpoint.pt", "training.json"


@dataclass(frozen=True)
class Evaluation:
    """How models are attacked, all alike.

    Attributes:
        eps: radii, in 255ths.
        suite: "standard", "quick", or names of attacks.
        queries: how many images are attacked, drawn once for all models; 0: all.
        new_gallery: whether each model embeds its gallery, also one whose method keeps the gallery of the start.
    """

    eps: tuple[float, ...]
    suite: tuple[str, ...] = ("standard",)
    queries: int = 500
    new_gallery: bool = False

    def described(self) -> dict[str, Any]:
        """In words and numbers; `new_gallery` only where it is asked for."""
        return {name: value for name, value in asdict(self).items() if name != "new_gallery" or value}

    def rows(self, total: int) -> list[int] | None:
        """The images that are attacked; None: all."""
        if not 0 < self.queries < total:
            return None
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        return drawn[: self.queries].sort().values.tolist()

    def measure(
        self, model: nn.Module, part: Part, resume: Path, progress: bool, original: nn.Module | None = None
    ) -> Report:
        """What is left of retrieval; chunks that are in the folder already are not attacked again.

        Args:
            model: embeds the queries.
            part: images that search one another.
            resume: folder of finished chunks.
            progress: whether to show bars.
            original: embeds the gallery; None: the model.
        """
        return evaluate_robustness(
            model,
            part.to_evaluate(),
            **({} if original is None else gallery_of(original, part)),
            eps=[radius / 255 for radius in self.eps],
            attacks=self.named(),
            subset=self.rows(len(part.labels)),
            checks=self.named() == "standard",
            resume=resume,
            progress=progress,
        )

    def named(self) -> str | list[str]:
        """A suite's name, or the attacks' names."""
        return self.suite[0] if self.suite in (("standard",), ("quick",)) else list(self.suite)

    def keeps_gallery(self, method: Method) -> bool:
        """Whether queries search the embeddings of the network at the start."""
        return method.original and not self.new_gallery

    def folder(self) -> str:
        """A name that differs where what is measured differs."""
        gallery = ["new-gallery"] if self.new_gallery else []
        radii = [f"{radius:g}" for radius in self.eps]
        return "_".join(["evaluation", *self.suite, *radii, f"{self.queries}queries", *gallery])


@dataclass(frozen=True, eq=False)
class Bench:
    """What the runs of one command have in common.

    Attributes:
        protocol: of training.
        evaluation: of what came out.
        train: images to train on.
        searched: images of other classes.
        device: of models.
        workers: processes that read images.
        progress: whether to show bars.
    """

    protocol: Protocol
    evaluation: Evaluation
    train: Part
    searched: Part
    device: torch.device
    workers: int = 0
    progress: bool = True

    def settings(self) -> dict[str, Any]:
        """In JSON's types."""
        images = {"trained_on": len(self.train.labels), "searched": len(self.searched.labels)}
        parts = {"protocol": self.protocol.described(), "images": images, "evaluation": self.evaluation.described()}
        described: dict[str, Any] = json.loads(json.dumps(parts))
        return described

    def run(self, name: str, method: Method, seed: int, folder: Path) -> dict[str, Any]:
        """What was measured of a model, trained now if it is not there yet.

        Raises:
            InputError: the folder holds a model that was trained otherwise.
        """
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"method": name, "seed": seed, **self.settings()}
        trained = {"method": name, "seed": seed, "recipe": method.recipe(self.protocol), **asked["protocol"]}
        if (folder / TRAINING).exists():
            _check_same(trained, folder)
        if (folder / RUN).exists() and all(_read(folder / RUN).get(key) == asked[key] for key in asked):
            return _read(folder / RUN)
        if not (folder / MODEL).exists():
            _write(folder / TRAINING, {"settings": trained})
            passed = self._train(f"{name}, seed {seed}", method, seed, folder)
            _write(folder / TRAINING, {"settings": trained, "passed": asdict(passed)})
            os.replace((folder / MODEL).with_suffix(".unfinished"), folder / MODEL)
            (folder / CHECKPOINT).unlink(missing_ok=True)
        model = build_for(self.protocol, self.shape()).to(self.device)
        model.load_state_dict(torch.load(folder / MODEL, map_location=self.device, weights_only=True))
        kept = folder / self.evaluation.folder()
        keeps_gallery = self.evaluation.keeps_gallery(method)
        original = original_for(self.protocol, self.shape()).to(self.device) if keeps_gallery else None
        report = self.evaluation.measure(model.eval(), self.searched, kept, self.progress, original)
        report.save_json(folder / "report.json")
        report.save_html(folder / "report.html")
        training = _read(folder / TRAINING)
        found = {**asked, "training": training["passed"], "report": _brief(report), "machine": machine(self.device)}
        _write(folder / RUN, found)
        return found

    def _train(self, shown: str, method: Method, seed: int, folder: Path) -> Passed:
        training = Training(method, self.protocol, self.train, seed, self.device)
        model = training.run(folder / CHECKPOINT, self.workers, shown if self.progress else None)
        torch.save(model.state_dict(), (folder / MODEL).with_suffix(".unfinished"))
        return training.passed

    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.train.pixels(torch.tensor([0])).shape[1:])


@torch.no_grad()
def gallery_of(original: nn.Module, part: Part) -> dict[str, Any]:
    """A gallery that is known by embeddings of another network alone, in which no query finds itself."""
    device = next(original.parameters()).device
    rows = torch.arange(len(part.labels))
    found = torch.cat([original(part.pixels(some).to(device)).cpu() for some in rows.split(256)])
    return {"gallery": (None, part.labels), "gallery_embeddings": found, "own": rows}


def finished(out: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All runs in a folder that were made with these settings."""
    found = [_read(path) for path in sorted(out.glob(f"*/*/{RUN}"))]
    return [run for run in found if all(run.get(key) == settings[key] for key in settings)]


def machine(device: torch.device) -> dict[str, Any]:
    """Where this runs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "system": platform.platform()}


def _check_same(asked: Mapping[str, Any], folder: Path) -> None:
    found = _read(folder / TRAINING).get("settings", {})
    differ = [f"{key} ({found.get(key)}, asked: {asked[key]})" for key in asked if found.get(key) != asked[key]]
    if differ:
        raise InputError(f"{folder} holds another training, by {', '.join(differ)}. Use another --out.")


def _brief(report: Report) -> dict[str, Any]:
    """The report without the fate of each query, which is in the report's own file."""
    kept = report.to_dict()
    for part in (*kept["attacks"], *kept["worst"]):
        part.pop("robust_flags")
    return {key: value for key, value in kept.items() if key not in ("settings", "clean_flags", "queries")}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}. Delete its folder.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no settings. Delete its folder.")
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
