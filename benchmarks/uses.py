"""The same embeddings in each use that they are deployed for: search, verification, targeted and black-box attacks.

    python benchmarks/uses.py --omniglot omniglot28.npz --out uses_run

Of digits and of Omniglot, a plainly and an adversarially trained embedding. A model whose file is in the output folder
is not trained again, and what is in ``uses.json`` there is not measured again. Logs the table of docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn

from benchmarks import omniglot
from pml_adversarial import evaluate_robustness
from pml_adversarial.attacks import preset
from pml_adversarial.cli import experiment
from pml_adversarial.cli.images import OpenSetSplit, digits
from pml_adversarial.evaluation import (
    evaluate_targeted,
    evaluate_verification,
    rank_only_attack,
    standard,
    transfer_attack,
    universal_attack,
    universal_perturbation,
)
from pml_adversarial.evaluation.reports.binomial import rate_interval

QUERIES, PAIRS, LEARNED_ON = 200, 100, 500  # attacked queries; attacked pairs of each kind; images of the universal one
FAR = 0.01
Interval = tuple[float, float]
Row = tuple[str, float, Interval]
"""What is measured, in percent, with its 95 % interval."""


@dataclass(frozen=True)
class Subject:
    """A model, the images it is tried on, and a model of the attacker: plainly trained, from another seed."""

    model: nn.Module
    surrogate: nn.Module
    data: OpenSetSplit
    eps: float

    @property
    def queries(self) -> list[int]:
        """Indices of the test images that are attacked."""
        return sorted(self._shuffled()[:QUERIES])

    @property
    def others(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Other test images, on which a universal perturbation is learned."""
        rows = self._shuffled()[QUERIES:][:LEARNED_ON]
        return self.data.test_images[rows], self.data.test_labels[rows]

    def _shuffled(self) -> list[int]:
        return torch.randperm(len(self.data.test_images), generator=torch.Generator().manual_seed(0)).tolist()

    @property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All test images, which are searched."""
        return self.data.test_images, self.data.test_labels


def search(subject: Subject, distance: str) -> Iterator[Row]:
    """R@1 in the worst case, and by attackers who know less."""
    attacks = list(standard())
    if distance == "cosine":
        learned = universal_perturbation(subject.model, subject.others, eps=subject.eps)
        attacks += [transfer_attack(subject.surrogate), universal_attack(learned), rank_only_attack()]
    report = evaluate_robustness(
        subject.model,
        subject.test,
        eps=subject.eps,
        attacks=attacks,
        distance=distance,
        subset=subject.queries,
    )
    logging.info("\n%s", report)
    yield f"R@1, {distance}, without attack", report.clean["recall_at_1"], report.interval(0)
    yield f"R@1, {distance}, worst case", report.worst_case(subject.eps), report.interval(subject.eps)
    for result in report.attacks:
        if distance == "cosine" and result.attack in ("square", "transfer", "universal", "rank-only"):
            yield f"R@1, {distance}, {result.attack} alone", *_rate(result.robust_flags)


def _rate(flags: str) -> tuple[float, Interval]:
    return flags.count("1") / len(flags), rate_interval(flags.count("1"), len(flags))


def verification(subject: Subject) -> Iterator[Row]:
    """Genuine and impostor pairs at the threshold for one false accept rate."""
    report = evaluate_verification(
        subject.model, subject.test, eps=subject.eps, genuine=2000, impostors=20_000, subset=PAIRS, far=FAR
    )
    logging.info("\n%s", report)
    clean, attacked = report.at(FAR), report.at(FAR, eps=subject.eps)
    assert clean is not None
    assert attacked is not None
    for name, found in (("without attack", clean), ("worst case", attacked)):
        yield f"TAR at FAR {FAR}, {name}", found.tar.rate, (found.tar.low, found.tar.high)
        yield f"FAR there, {name}", found.far.rate, (found.far.low, found.far.high)


def targeted(subject: Subject) -> Iterator[Row]:
    """Queries that find an item of a class that the attacker chose: of each query another one, drawn by lot."""
    labels = subject.data.test_labels
    classes = labels.unique()
    steps = torch.randint(1, len(classes), labels.shape, generator=torch.Generator().manual_seed(1))
    chosen = classes[(torch.searchsorted(classes, labels) + steps) % len(classes)]
    report = evaluate_targeted(
        subject.model, subject.test, target=chosen, eps=subject.eps, k=(1, 5), subset=subject.queries
    )
    logging.info("\n%s", report)
    for k in (1, 5):
        for name, eps in (("without attack", 0.0), ("worst case", subject.eps)):
            yield f"chosen class in the top {k}, {name}", report.success(eps, k), report.interval(eps, k)


USES: dict[str, Callable[[Subject], Iterator[Row]]] = {
    "cosine": partial(search, distance="cosine"),
    "euclidean": partial(search, distance="euclidean"),
    "verification": verification,
    "targeted": targeted,
}


def train_on_digits(data: OpenSetSplit, adversarial: bool, seed: int) -> nn.Module:
    """As the README's demo does it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        attack = preset(0.2, steps=5) if adversarial else None
        loss = MultiSimilarityLoss(alpha=2, beta=40, base=0.5)
        return experiment.train(experiment.Settings(), data, loss, None, attack, seed, lambda batches: batches)


def subjects(options: argparse.Namespace) -> Iterator[tuple[str, Subject]]:
    """Name -> what is tried."""
    train = partial(omniglot.train, steps=options.omniglot_steps)
    sets: dict[str, tuple[Any, ...]] = {"digits": (digits(), experiment.small_network, train_on_digits, 0.1)}
    if options.omniglot:
        sets["omniglot"] = omniglot.load(options.omniglot), omniglot.network, train, 13 / 255
    for name, (data, network, learn, eps) in sets.items():

        def trained(adversarial: bool, seed: int) -> nn.Module:
            path = options.out / f"{name}_{'adversarial' if adversarial else 'plain'}_{seed}.pt"  # noqa: B023
            if not path.exists():
                model = learn(data, adversarial=adversarial, seed=seed)  # noqa: B023
                torch.save(model.state_dict(), path)
            model = network()  # noqa: B023
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()

        for adversarial in (False, True):
            kind = "adversarial" if adversarial else "plain"
            yield f"{name}, {kind}", Subject(trained(adversarial, 0), trained(False, 1), data, eps)


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All results as a table in Markdown."""
    rows = dict.fromkeys(row for measured in results.values() for use in measured.values() for row in use)
    lines = [f"| percent | {' | '.join(results)} |", "| --- " + "| ---: " * len(results) + "|"]
    for row in rows:
        found = [next((use[row] for use in uses.values() if row in use), None) for uses in results.values()]
        lines.append(f"| {row} | {' | '.join(map(_cell, found))} |")
    return "\n".join(lines)


def _cell(found: tuple[float, Interval] | None) -> str:
    if found is None:
        return ""
    value, (low, high) = found
    return f"{100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def main() -> None:
    """Trains and measures what is not there yet, and prints the table."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omniglot", type=Path, help="a .npz file, see omniglot.py")
    parser.add_argument("--omniglot-steps", type=int, default=700)
    parser.add_argument("--out", type=Path, default=Path("uses_run"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "uses.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, subject in subjects(options):
        for use, measure in USES.items():
            if use not in results.setdefault(name, {}):
                logging.info("%s, %s", name, use)
                results[name][use] = {row: (value, interval) for row, value, interval in measure(subject)}
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    logging.info("\n%s", table(results))


if __name__ == "__main__":
    main()
