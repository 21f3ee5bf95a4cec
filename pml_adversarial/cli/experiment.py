"""The experiment of the demo: trains one model plainly and one adversarially, and attacks both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from statistics import fmean
from typing import Any

import pytorch_metric_learning
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomCrop
from tqdm import tqdm

from .. import __version__
from ..attacks.objective import AttackFactory
from ..errors import InputError
from ..evaluation import Report, evaluate_robustness
from ..evaluation.suites import quick
from ..losses import AdversarialLoss
from ..training.isolation import random_stream
from ..training.tuples import Role
from .images import OpenSetSplit, digits

MODELS = ("plain", "adversarial")


@dataclass(frozen=True)
class Settings:
    """Settings of the experiment, the same for both models."""

    epochs: int = 25  # passes over the training images
    batch_size: int = 112
    learning_rate: float = 1e-3  # of Adam
    shift: int = 1  # largest number of pixels by which training images are moved at random each way
    perturb: tuple[Role, ...] = ("all",)
    clean_weight: float = 0.0
    warmup: float = 0.5  # share of the steps
    eps: tuple[float, ...] = (0.05, 0.1, 0.15)  # l-inf radii of the evaluation, in pixels of [0, 1]
    attack_steps: int = 40  # of each attack of the evaluation
    restarts: int = 3  # random starts of each of them
    seeds: tuple[int, ...] = (0,)
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model after training, and its robustness on the test images."""

    kind: str  # one of MODELS
    seed: int
    model: nn.Module  # on the device of the run
    report: Report
    seconds: float  # of training


def small_network() -> nn.Sequential:
    """8x8 images -> 64-dimensional embeddings, two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
    )


def run(
    settings: Settings,
    make_loss: Callable[[], nn.Module],
    make_miner: Callable[[], nn.Module | None],
    attack: AttackFactory,
    data: OpenSetSplit | None = None,
    progress: bool = True,
) -> list[TrainedModel]:
    """Trains and attacks both models for every seed, by default on the digits.

    Losses and miners are made anew for each model, since they may have parameters. A miner may be None.
    """
    data = digits() if data is None else data
    data = OpenSetSplit(*(tensor.to(settings.device) for tensor in vars(data).values()))
    measured = []
    for seed, kind in product(settings.seeds, MODELS):
        start = time.perf_counter()
        with random_stream(seed, -1):  # initial weights, proxies and miners draw the same for both models
            bar = partial(tqdm, desc=f"train {kind}, seed {seed}", disable=not progress, ncols=100)
            against = attack if kind == "adversarial" else None
            model = train(settings, data, make_loss(), make_miner(), against, seed, bar)
        seconds = time.perf_counter() - start
        report = evaluate_robustness(
            model,
            (data.test_images, data.test_labels),
            eps=settings.eps,
            attacks=quick(settings.attack_steps, settings.restarts),
            checks=False,
            keep_attacked=True,
            seed=seed,
            batch_size=512,
            progress=progress,
        )
        measured.append(TrainedModel(kind, seed, model, report, seconds))
    return measured


def train(
    settings: Settings,
    data: OpenSetSplit,
    loss: nn.Module,
    miner: nn.Module | None,
    attack: AttackFactory | None,
    seed: int,
    bar: Callable[..., tqdm],
) -> nn.Module:
    """Trains a model in a plain PyTorch loop. With an ``attack``, only the loss is another one."""
    total = len(data.train_images)
    if settings.batch_size > total:
        raise InputError(
            f"batch_size={settings.batch_size} for {total} training images; expected at least one full batch."
        )
    _, train_labels = data.train_labels.unique(return_inverse=True)  # losses with proxies count classes from 0
    model = small_network().to(settings.device)
    batches = list(_batches(settings, total, seed))
    loss_func = loss.to(settings.device)
    if attack is not None:
        loss_func = AdversarialLoss(
            loss,
            model,
            attack=attack,
            perturb=settings.perturb,
            keep_clean=False,
            clean_weight=settings.clean_weight,
            warmup=int(settings.warmup * len(batches)),
            guard=False,
            seed=seed,
        )
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], settings.learning_rate)
    augment = RandomCrop(data.train_images.shape[-2:], padding=settings.shift)
    for rows in bar(batches):
        embeddings = model(torch.stack([augment(image) for image in data.train_images[rows]]))
        labels = train_labels[rows]
        indices_tuple = None if miner is None else miner(embeddings, labels)
        value = loss_func(embeddings, labels, indices_tuple)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model


def summary(settings: Settings, measured: list[TrainedModel], described: Mapping[str, Any]) -> dict[str, Any]:
    """All results, and all that is needed to repeat the experiment, in types that JSON knows.

    ``described`` holds further settings, such as the names of loss and attack.
    """
    return {
        "schema": 1,
        "settings": {**asdict(settings), **described},
        "evaluation": {
            "attacks": list(measured[0].report.settings["attacks"]),
            "protocol": "leave one out, queries attacked, gallery clean, worst case per query",
            "norm": "linf",
        },
        "versions": {
            "pml_adversarial": __version__,
            "torch": torch.__version__,
            "pytorch_metric_learning": pytorch_metric_learning.__version__,
            "torchattacks": version("torchattacks"),
        },
        "models": {kind: _mean([m.report for m in measured if m.kind == kind]) for kind in MODELS},
        "runs": [_one(m) for m in measured],
    }


def _batches(settings: Settings, total: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        order = torch.randperm(total, generator=generator)
        yield from order[: total - total % settings.batch_size].split(settings.batch_size)


def _one(measured: TrainedModel) -> dict[str, Any]:
    report = measured.report
    robust = [
        {
            "eps": eps,
            "worst_case": report.worst_case(eps),
            "by_attack": {part.attack: part.measures["recall_at_1"] for part in report.attacks if part.eps == eps},
        }
        for eps in report.settings["eps"]
    ]
    return {
        "kind": measured.kind,
        "seed": measured.seed,
        "train_seconds": measured.seconds,
        "recall_at_1": report.clean["recall_at_1"],
        "map_at_r": report.clean["map_at_r"],
        "robust_recall_at_1": robust,
    }


def _mean(reports: list[Report]) -> dict[str, Any]:
    return {
        "recall_at_1": fmean(report.clean["recall_at_1"] for report in reports),
        "map_at_r": fmean(report.clean["map_at_r"] for report in reports),
        "worst_case": {
            str(eps): fmean(report.worst_case(eps) for report in reports) for eps in reports[0].settings["eps"]
        },
    }
