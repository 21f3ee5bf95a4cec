"""The experiment of the demo: trains one model plainly and one adversarially, and attacks both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
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
_BATCH_SIZE = 512


@dataclass(frozen=True)
class Settings:
    """Settings of the experiment.

    Attributes:
        epochs: passes over the training images, for each of the two models.
        batch_size: images per step.
        learning_rate: of Adam.
        shift: largest number of pixels by which training images are moved at random each way, for both models.
        perturb: roles that are perturbed in adversarial training.
        clean_weight: weight of the unperturbed loss in adversarial training.
        warmup: share of the steps over which the attack grows to its full strength.
        eps: l-inf radii at which both models are attacked, in pixels of [0, 1].
        attack_steps: gradient steps of the evaluation's attacks.
        restarts: random starts of each of them.
        seeds: one plain and one adversarial model are trained per seed.
        device: of models and data.
    """

    epochs: int = 25
    batch_size: int = 112
    learning_rate: float = 1e-3
    shift: int = 1
    perturb: tuple[Role, ...] = ("all",)
    clean_weight: float = 0.0
    warmup: float = 0.5
    eps: tuple[float, ...] = (0.05, 0.1, 0.15)
    attack_steps: int = 40
    restarts: int = 3
    seeds: tuple[int, ...] = (0,)
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model after training, and its robustness.

    Attributes:
        kind: one of `MODELS`.
        seed: of initial weights, batches and attacks.
        model: the embedding, on the device of the run.
        report: its robustness on the test images.
        seconds: wall-clock seconds of its training.
    """

    kind: str
    seed: int
    model: nn.Module
    report: Report
    seconds: float


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
    """Trains and attacks both models for every seed.

    Args:
        settings: see `Settings`.
        make_loss: makes the loss of a model. It is called once per model, since losses may have parameters.
        make_miner: makes the miner of a model, or returns None.
        attack: factory of the training attack.
        data: images to train on and unseen classes to test on; None: the digits.
        progress: whether to show progress bars.
    """
    data = digits() if data is None else data
    device = torch.device(settings.device)
    data = OpenSetSplit(*(tensor.to(device) for tensor in vars(data).values()))
    measured = []
    for seed in settings.seeds:
        for kind in MODELS:
            start = time.perf_counter()
            wrap = partial(_adversarial, settings, attack, seed) if kind == "adversarial" else _plain
            bar = _bar(progress, f"train {kind}, seed {seed}")
            with random_stream(seed, -1):  # initial weights, proxies and miners draw the same for both models
                model = train(settings, data, make_loss(), make_miner(), wrap, seed, bar)
            seconds = time.perf_counter() - start
            measured.append(TrainedModel(kind, seed, model, measure(settings, data, model, seed, progress), seconds))
    return measured


def train(
    settings: Settings,
    data: OpenSetSplit,
    loss: nn.Module,
    miner: nn.Module | None,
    wrap: Callable[[nn.Module, nn.Module, int], nn.Module],
    seed: int,
    bar: Callable[..., tqdm],
) -> nn.Module:
    """Trains a model in a plain PyTorch loop. Only ``wrap``, which wraps the loss, makes the training adversarial."""
    device = data.train_images.device
    if settings.batch_size > len(data.train_images):
        raise InputError(
            f"batch_size={settings.batch_size} for {len(data.train_images)} training images; expected at least one "
            "full batch."
        )
    _, train_labels = data.train_labels.unique(return_inverse=True)  # losses with proxies count classes from 0
    model = small_network().to(device)
    batches = list(_batches(settings, len(data.train_images), seed))
    loss_func = wrap(loss.to(device), model, len(batches))
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


def measure(settings: Settings, data: OpenSetSplit, model: nn.Module, seed: int, progress: bool) -> Report:
    """Attacks the model on the images of unseen classes."""
    return evaluate_robustness(
        model,
        (data.test_images, data.test_labels),
        eps=settings.eps,
        attacks=quick(settings.attack_steps, settings.restarts),
        checks=False,
        keep_attacked=True,
        seed=seed,
        batch_size=_BATCH_SIZE,
        progress=progress,
    )


def summary(settings: Settings, measured: list[TrainedModel], described: Mapping[str, Any]) -> dict[str, Any]:
    """All results, and all that is needed to repeat the experiment, in types that JSON knows.

    Args:
        settings: of the run.
        measured: its results.
        described: further settings, such as the names of loss and attack.
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
        "models": {kind: _mean([m for m in measured if m.kind == kind]) for kind in MODELS},
        "runs": [_one(m) for m in measured],
    }


def _adversarial(
    settings: Settings, attack: AttackFactory, seed: int, loss: nn.Module, model: nn.Module, steps: int
) -> AdversarialLoss:
    return AdversarialLoss(
        loss,
        model,
        attack=attack,
        perturb=settings.perturb,
        keep_clean=False,
        clean_weight=settings.clean_weight,
        warmup=int(settings.warmup * steps),
        guard=False,
        seed=seed,
    )


def _plain(loss: nn.Module, model: nn.Module, steps: int) -> nn.Module:
    return loss


def _batches(settings: Settings, total: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        order = torch.randperm(total, generator=generator)
        yield from order[: total - total % settings.batch_size].split(settings.batch_size)


def _bar(shown: bool, description: str) -> Callable[..., tqdm]:
    return partial(tqdm, desc=description, disable=not shown, ncols=100)


def _one(measured: TrainedModel) -> dict[str, Any]:
    report = measured.report
    by_attack = {(result.eps, result.attack): result.measures["recall_at_1"] for result in report.attacks}
    robust = [
        {
            "eps": eps,
            "worst_case": report.worst_case(eps),
            "by_attack": {attack: value for (radius, attack), value in by_attack.items() if radius == eps},
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


def _mean(measured: list[TrainedModel]) -> dict[str, Any]:
    def over_seeds(value: Callable[[Report], float]) -> float:
        return statistics.fmean(value(m.report) for m in measured)

    return {
        "recall_at_1": over_seeds(lambda report: report.clean["recall_at_1"]),
        "map_at_r": over_seeds(lambda report: report.clean["map_at_r"]),
        "worst_case": {
            str(eps): over_seeds(lambda report, eps=eps: report.worst_case(eps))  # type: ignore[misc]
            for eps in measured[0].report.settings["eps"]
        },
    }
