"""How much of what "standard-v2" finds do cheaper suites find? Three adversarially trained embeddings, three eps each.

    python benchmarks/fast_suite.py --omniglot omniglot28.npz --tiny tiny-imagenet-32.zip --out fast_run

A model whose file is in the output folder is not trained again, and an evaluation that was cut off goes on. The numbers
are written to ``fast_suite.json`` there.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchattacks
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn

from benchmarks import omniglot
from benchmarks.robustness.backbones import slim_resnet
from benchmarks.robustness.data import read_classes
from pml_adversarial import AdversarialLoss, Report, evaluate_robustness
from pml_adversarial.attacks import preset
from pml_adversarial.cli import experiment
from pml_adversarial.cli.images import OpenSetSplit, digits
from pml_adversarial.evaluation import QueryAttack, RetrievalAttack, fast, standard
from pml_adversarial.evaluation.attacks.gradients import (
    classifier_attack,
    gradient_attack,
    margin_score,
    targeted_score,
)

MultiSimilarity = partial(MultiSimilarityLoss, alpha=2, beta=40, base=0.5)


def margin(steps: int, restarts: int = 1) -> QueryAttack:
    return QueryAttack("margin", gradient_attack(margin_score, steps), restarts)


def targeted(steps: int, classes: int) -> QueryAttack:
    return QueryAttack("targeted", gradient_attack(targeted_score, steps), classes, follows=True)


def apgd_t(steps: int, classes: int) -> QueryAttack:
    attack = classifier_attack(partial(torchattacks.APGDT, steps=steps), classes)
    return QueryAttack("apgd-t", attack, follows=True, num_classes=4)


SUITES: dict[str, Sequence[RetrievalAttack]] = {
    "standard": standard(),
    "fast": fast(),
    "margin 20 x 4": (margin(20, 4),),
    "margin 10, targeted 20 x 4": (margin(10), targeted(20, 4)),
    "margin 10 x 3, targeted 20 x 3": (margin(10, 3), targeted(20, 3)),
    "margin 20 x 2, targeted 20 x 2": (margin(20, 2), targeted(20, 2)),
    "margin 10 x 5, targeted 10 x 4": (margin(10, 5), targeted(10, 4)),
    "margin 20, apgd-t 20 x 3": (margin(20), apgd_t(20, 3)),
}
"""The package's two, and others that were tried."""


def photographs(path: Path) -> OpenSetSplit:
    """Tiny ImageNet at 32x32: the first 100 classes to train on, the last 100, 20 images of each, to search."""
    images, labels = read_classes(path, 32)
    trained = labels < 100
    searched = torch.cat([(labels == label).nonzero().flatten()[:20] for label in range(100, 200)])
    pixels = images.float() / 255
    return OpenSetSplit(pixels[trained], labels[trained], pixels[searched], labels[searched])


def train_on_photographs(data: OpenSetSplit, steps: int = 300) -> nn.Module:
    """Adversarial training at 4/255, of mirrored images."""
    torch.manual_seed(0)
    model = slim_resnet()
    attack = preset(eps=4 / 255, steps=3)
    loss_func = AdversarialLoss(
        MultiSimilarity(), model, attack=attack, perturb="all", keep_clean=False, warmup=steps // 2, guard=False
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    by_class = [(data.train_labels == label).nonzero().squeeze(1) for label in data.train_labels.unique()]
    for step in range(steps):
        chosen = torch.randperm(len(by_class), generator=generator)[:32].tolist()
        rows = torch.cat([by_class[c][torch.randperm(len(by_class[c]), generator=generator)[:4]] for c in chosen])
        images = data.train_images[rows]
        mirrored = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        loss = loss_func(model(torch.where(mirrored, images.flip(3), images)), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            logging.info("photographs, step %d of %d, loss %.4f", step, steps, loss.item())
    return model


def train_on_digits(data: OpenSetSplit) -> nn.Module:
    """As the README's demo does it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        settings, attack = experiment.Settings(), preset(0.2, steps=5)
        return experiment.train(settings, data, MultiSimilarity(), None, attack, 0, lambda batches: batches)


def models(options: argparse.Namespace) -> Mapping[str, tuple[Any, Any, Any, list[float]]]:
    """Name -> data, an untrained network, how it is trained, and the eps of the evaluation."""
    found: dict[str, tuple[Any, Any, Any, list[float]]] = {
        "digits": (digits, experiment.small_network, train_on_digits, [0.05, 0.1, 0.13])
    }
    if options.omniglot:
        train = partial(omniglot.train, adversarial=True, steps=options.omniglot_steps)
        found["omniglot"] = (partial(omniglot.load, options.omniglot), omniglot.network, train, _in_255ths(4, 8, 13))
    if options.tiny:
        train = partial(train_on_photographs, steps=options.tiny_steps)
        found["photographs"] = (partial(photographs, options.tiny), slim_resnet, train, _in_255ths(0.5, 1, 2))
    return found


def _in_255ths(*radii: float) -> list[float]:
    return [radius / 255 for radius in radii]


def trained(path: Path, network: Callable[[], nn.Module], train: Callable[[], nn.Module]) -> nn.Module:
    if not path.exists():
        torch.save(train().state_dict(), path)
    model = network()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def right_queries(model: nn.Module, data: OpenSetSplit, count: int) -> list[int]:
    """Some test images that are right without attack, so that shares of robust queries tell most."""
    report = evaluate_robustness(
        model, (data.test_images, data.test_labels), eps=1e-6, attacks=(margin(1),), checks=False, batch_size=256
    )
    right = torch.tensor([flag == "1" for flag in report.clean_flags]).nonzero().squeeze(1)
    chosen = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))[:count]
    return right[chosen].sort().values.tolist()


def summary(report: Report) -> dict[str, Any]:
    """R@1 in the worst case by eps, and all image passes, by what is attacked."""
    passes: dict[str, int] = {"query": 0, "gallery": 0}
    for result in report.attacks:
        passes[result.target] += result.forward_passes + result.backward_passes
    targets = {worst.target for worst in report.worst}
    worst = {target: report.curve(target=target) for target in sorted(targets, reverse=True)}
    return {"queries": report.num_queries, "worst": worst, "passes": passes}


def main() -> None:
    """Trains what is not there yet, and attacks each model by each suite."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omniglot", type=Path, help="a .npz file, see omniglot.py")
    parser.add_argument("--tiny", type=Path, help="a .zip file with one folder of 32x32 images per class")
    parser.add_argument("--omniglot-steps", type=int, default=400)
    parser.add_argument("--tiny-steps", type=int, default=300)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("fast_run"))
    parser.add_argument("--models", nargs="+")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "fast_suite.json"
    for name, (load, network, train, radii) in models(options).items():
        if options.models and name not in options.models:
            continue
        data = load()
        model = trained(options.out / f"{name}.pt", network, partial(train, data))
        queries = right_queries(model, data, options.queries)
        for suite, attacks in SUITES.items():
            report = evaluate_robustness(
                model,
                (data.test_images, data.test_labels),
                eps=radii,
                attacks=attacks,
                subset=queries,
                checks=False,
                batch_size=50,
                resume=options.out / name / suite.replace(" ", "_").replace(",", ""),
            )
            results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            results.setdefault(name, {})[suite] = summary(report)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            logging.info("%s, %s: %s", name, suite, results[name][suite]["worst"]["query"])


if __name__ == "__main__":
    main()
