"""Puts the committed runs of ``benchmarks.robustness`` on the leaderboard.

    python benchmarks/leaderboard.py
    pml-adversarial leaderboard page

These runs were attacked by three attacks of the standard suite, without checks, and say so there. A model that was
evaluated by "standard" comes with ``pml-adversarial leaderboard add report.json ...``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.protocol import Protocol
from benchmarks.robustness.run import Evaluation
from pml_adversarial.attacks import budget
from pml_adversarial.evaluation.reports.leaderboard import Model, add, entry_from

RESULTS = Path(__file__).parent / "robustness" / "results"
BOARD = Path(__file__).parent / "leaderboard"
SETS = {
    "digits": ("Digits, 8x8", "Trained on the digits 0 to 4. Each of 5 to 9 searches all others of them."),
    "omniglot": ("Omniglot, 28x28", "Trained on 136 characters of five alphabets; 106 of three others are searched."),
    "cars": ("Cars196 (half), {size}x{size}", "Trained on classes 1 to 98; the photographs of 99 to 196 are searched."),
    "tiny-imagenet": ("Tiny ImageNet, 32x32", "Trained on the first 100 classes by wnid; the last 100 are searched."),
}
NAMES = {
    "plain": ("TripletMarginLoss, random negatives", ""),
    "plain-softhard": ("TripletMarginLoss, soft-hard negatives", ""),
    "plain-ms": ("MultiSimilarityLoss", ""),
    "plain-supcon": ("SupConLoss", ""),
    "plain-both": ("SupConLoss and MultiSimilarityLoss", ""),
    "plain-softmax": ("NormalizedSoftmaxLoss", ""),
    "seed-paper": ("Panum et al., positives", "arXiv 2102.07265"),
    "amd": ("AMD", "arXiv 1706.06083"),
    "ramd": ("RAMD", "arXiv 1706.06083"),
    "est": ("EST", "arXiv 2002.11293"),
    "ses": ("SES", "arXiv 2002.11293"),
    "act": ("ACT", "arXiv 2106.03614"),
    "hm-lga": ("HM[S, LGA]", "arXiv 2203.01439"),
    "hm-lga-ics": ("HM[S, LGA] & ICS", "arXiv 2203.01439"),
    "hm-lga-ics-as-coded": ("HM[S, LGA] & ICS, as its authors' code draws triplets", "arXiv 2203.01439"),
    "tride": ("CA-TRIDE", "arXiv 2312.07364"),
    "trades": ("TRADES on neighbours", "arXiv 1901.08573"),
    "preset-ms": ("AdversarialLoss(MultiSimilarityLoss)", ""),
    "preset-supcon": ("AdversarialLoss(SupConLoss)", ""),
    "preset-both": ("AdversarialLoss(SupConLoss and MultiSimilarityLoss)", ""),
    "preset-softmax-one-step": ("AdversarialLoss(NormalizedSoftmaxLoss), 1 step, perturbed rows alone", ""),
    "preset-ms-one-step": ("AdversarialLoss(MultiSimilarityLoss), 1 step", ""),
    "preset-ms-two-steps": ("AdversarialLoss(MultiSimilarityLoss), 2 steps", ""),
    "preset-ms-replaced": ("AdversarialLoss(MultiSimilarityLoss), perturbed rows alone", ""),
    "preset-ms-awp": ("AdversarialLoss(MultiSimilarityLoss) with AWP", "arXiv 2004.05884"),
    "trades-ms": ("MultiSimilarityLoss with TRADES on neighbours", "arXiv 1901.08573"),
    "trades-ms-decoupled": ("MultiSimilarityLoss with TRADES, decoupled", "arXiv 2305.13948"),
    "start": ("the network at the start", ""),
    "fare": ("FARE", "arXiv 2402.12336"),
    "fare-one-step": ("FARE, 1 step", "arXiv 2402.12336"),
    "fare-ms-one-step": ("FARE with MultiSimilarityLoss, 1 step", "arXiv 2402.12336"),
    "fare-clean-one-step": ("FARE with clean rows, 1 step", "arXiv 2402.12336"),
    "fare-clean": ("FARE with clean rows", "arXiv 2402.12336"),
}
"""Method of `METHODS` -> its name on the page, and its paper."""

EXPERIMENTS = (
    "digits",
    "omniglot-peers",
    "omniglot-240k",
    "omniglot-1700k",
    "omniglot-batchnorm-1700k",
    "omniglot-resnet18-1700k",
    "tiny-imagenet-1700k",
    "tiny-imagenet-1700k-b64",
    "tiny-imagenet-1700k-5-steps",
    "tiny-imagenet-smooth",
    "tiny-imagenet-fare",
    "tiny-imagenet-fare-eps8",
    "tiny-imagenet-fare-850k",
    "cars-64-plain",
    "cars-64-200k",
    "cars-64-800k",
    "cars-64-batchnorm",
    "cars-64-batchnorm-1000k",
    "cars-64-mixed-1000k",
    "cars-64-smooth",
    "cars-64-smooth-eps8",
    "cars-64-published",
    "cars-64-fare",
    "cars-64-fare-1000k",
    "cars-64-fare-clean",
)
"""Folders of the results."""


def entries() -> Iterator[dict[str, Any]]:
    """One for each committed run that trained something."""
    for experiment in EXPERIMENTS:
        for path in sorted((RESULTS / experiment).glob("*/*/run.json")):
            run = json.loads(path.read_text(encoding="utf-8"))
            if METHODS[run["method"]].trains:
                yield entry(run, path)


def entry(run: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """As `leaderboard.entry_of` makes it, from what a run keeps of its report."""
    protocol, report = run["protocol"], run["report"]
    data, split = SETS[protocol["data"]]
    name, paper = NAMES[run["method"]]
    if protocol.get("mixed"):
        name += ", on blended images"
    if Evaluation(**run["evaluation"]).keeps_gallery(METHODS[run["method"]]):
        name += ", in the gallery of the start"
    attacked = METHODS[run["method"]].options is not None
    model = Model(
        name,
        data.format(size=protocol["size"]),
        split,
        backbone(protocol),
        run["training"]["forward"],
        train_eps(run["method"], protocol) if attacked else 0.0,
        paper,
        run["seed"],
        f"benchmarks/robustness/results/{path.relative_to(RESULTS).as_posix()}",
    )
    found = entry_from(report, model)
    return {**found, "suite": ", ".join(found["attacks"]) if found["suite"] == "custom" else found["suite"]}


def backbone(protocol: Mapping[str, Any]) -> str:
    """The network, and where its first weights come from."""
    start = protocol["pretrained"]
    parts = [protocol["backbone"], *([f"from {start}"] if start else [])]
    parts += ["starts as thresholds"] if protocol["thresholds"] else []
    parts += ["SiLU for ReLU"] if protocol.get("smooth") else []
    parts += ["BatchNorm frozen"] if protocol.get("frozen_batchnorm") else []
    return ", ".join(parts)


def train_eps(method: str, protocol: Mapping[str, Any]) -> float:
    """Radius of the training attack, in pixels of [0, 1]."""
    made = Protocol(**{**protocol, "pretrained": protocol["pretrained"] or ""})
    options = METHODS[method].options
    attack = None if options is None else options(made).get("attack")
    radius: float = protocol["preset_eps"] if attack is None else budget(attack)["eps"]
    return radius


def main() -> None:
    """Writes all entries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--board", type=Path, default=BOARD)
    board = parser.parse_args().board
    for found in entries():
        add(found, board, replace=True)


if __name__ == "__main__":
    main()
