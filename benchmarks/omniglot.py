"""Omniglot at 28x28: embeddings trained plainly ("batchnorm": with BatchNorm) and adversarially, then attacked.

Characters of five alphabets are for training, those of three others are never seen and are searched. Each model meets
"standard-v2", and RobRank's ten attacks as published and corrected, at the same eps and from the same queries.

    python benchmarks/omniglot.py                      # torchvision fetches Omniglot (Lake et al., 2015)
    python benchmarks/omniglot.py --data images.npz    # images of your own, see `load`

State dicts, reports and ``omniglot.json`` are written to the output folder; a model whose file is there is not trained
again, and an evaluation that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchattacks
from PIL import Image
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample
from torchvision.datasets import Omniglot

from pml_adversarial import AdversarialLoss, Report, evaluate_robustness
from pml_adversarial.cli.images import OpenSetSplit
from pml_adversarial.evaluation import robrank_scores

logger = logging.getLogger("omniglot")

TRAIN = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")
TEST = ("Japanese_(katakana)", "Sanskrit", "Tagalog")
MODELS = ("plain", "adversarial", "batchnorm")
CLASSES, PER_CLASS = 56, 2  # of a batch
ATTACK = partial(torchattacks.PGD, eps=40 / 255, alpha=20 / 255, steps=5)


def network(batchnorm: bool = False) -> nn.Sequential:
    """``(N, 1, 28, 28)`` in [0, 1] -> ``(N, 512)``: two 5x5 convolutions with max pooling, two linear layers."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64)):
        norm = [nn.BatchNorm2d(after)] if batchnorm else []
        layers += [nn.Conv2d(before, after, 5, padding=2), *norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 7 * 7, 1024), nn.ReLU(), nn.Linear(1024, 512))


def load(path: str | Path) -> OpenSetSplit:
    """Reads a ``.npz`` with ``images`` uint8 ``(N, 28, 28)``, ``labels`` ``(N,)`` and ``is_test`` bool ``(N,)``."""
    with np.load(path) as arrays:
        images, labels, is_test = (torch.from_numpy(arrays[name]) for name in ("images", "labels", "is_test"))
    return _split(images, labels, is_test)


def fetch(root: str | Path, download: bool = True) -> OpenSetSplit:
    """Takes the alphabets `TRAIN` and `TEST` from torchvision's background set, as 28x28 white strokes on black."""
    drawings = Omniglot(str(root), background=True, transform=_small_and_inverted, download=download)
    files = enumerate(drawings._flat_character_images)
    named = sorted((drawings._characters[label], name, row) for row, (name, label) in files)  # folders have no order
    wanted = [(character, row) for character, _, row in named if Path(character).parts[0] in TRAIN + TEST]
    characters, labels = np.unique([character for character, _ in wanted], return_inverse=True)
    is_test = np.array([Path(character).parts[0] in TEST for character in characters])[labels]
    images = torch.stack([drawings[row][0] for _, row in wanted])
    return _split(images, torch.from_numpy(labels), torch.from_numpy(is_test))


def _small_and_inverted(drawing: Image.Image) -> Tensor:
    return 255 - torch.from_numpy(np.array(drawing.resize((28, 28), Image.Resampling.BILINEAR)))  # PIL antialiases


def _split(images: Tensor, labels: Tensor, is_test: Tensor) -> OpenSetSplit:
    pixels, labels = images.unsqueeze(1).float() / 255, labels.long()
    return OpenSetSplit(pixels[~is_test], labels[~is_test], pixels[is_test], labels[is_test])


def train(
    data: OpenSetSplit,
    adversarial: bool = False,
    batchnorm: bool = False,
    steps: int = 700,
    clean_weight: float = 0.0,
    seed: int = 0,
) -> nn.Sequential:
    """Trains a `network` with Adam and a cosine schedule on augmented images; ``adversarial`` changes nothing else."""
    torch.manual_seed(seed)
    model = network(batchnorm)
    loss_func: nn.Module = MultiSimilarityLoss(alpha=2, beta=40, base=0.5)
    if adversarial:
        loss_func = AdversarialLoss(
            loss_func,
            model,
            attack=ATTACK,
            perturb="all",
            keep_clean=False,
            clean_weight=clean_weight,
            warmup=steps // 2,
            guard=False,
            seed=seed,
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, rows in enumerate(_batches(data.train_labels, steps, seed)):
        loss = loss_func(model(augment(data.train_images[rows])), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            logger.info("step %d of %d, loss %.4f", step + 1, steps, loss.item())
    return model.eval()


def augment(images: Tensor, strength: float = 1.0) -> Tensor:
    """A random rotation, scaling, shearing and translation of each image; what moves in is background, 0."""
    drawn = strength * (2 * torch.rand(7, len(images)) - 1)
    angle, shear_x, shear_y, shift_x, shift_y, scale_x, scale_y = drawn.unbind()
    cos, sin = torch.cos(0.25 * angle), torch.sin(0.25 * angle)  # radians: up to 14 degrees each way
    turned = torch.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2)
    bent = torch.stack([1 + 0.15 * scale_x, 0.2 * shear_x, 0.2 * shear_y, 1 + 0.15 * scale_y], -1).reshape(-1, 2, 2)
    moved = 0.2 * torch.stack([shift_x, shift_y], -1).unsqueeze(-1)  # 1 is half an image
    grid = affine_grid(torch.cat([turned @ bent, moved], -1).to(images), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False).clamp(0, 1)


def _batches(labels: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    members = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    for _ in range(steps):
        chosen = torch.randperm(len(members), generator=generator)[:CLASSES].tolist()
        yield torch.cat([members[c][torch.randperm(len(members[c]), generator=generator)[:PER_CLASS]] for c in chosen])


def compare(
    model: nn.Module, data: OpenSetSplit, eps: Sequence[float], queries: Sequence[int], peer_eps: float, resume: Path
) -> tuple[Report, dict[str, Any]]:
    """The suite, and beside it what each peer's attack leaves of R@1 of the same queries, at ``peer_eps``."""
    report = evaluate_robustness(
        model, (data.test_images, data.test_labels), eps=eps, subset=queries, resume=resume, progress=True
    )
    report.save_json(resume / "report.json")
    report.save_html(resume / "report.html")
    worst = {w.eps: w.robust_flags for w in report.worst if w.target == "query"}[peer_eps]
    found: dict[str, Any] = {"worst_case": report.worst_case(peer_eps), "peers": {}}
    for version in ("published", "corrected"):
        scores = robrank_scores(
            model,
            (data.test_images, data.test_labels),
            eps=peer_eps,
            version=version,  # type: ignore[arg-type]
            subset=queries,
        )
        recalls = {name: scores.robust_flags[name] for name in ("ES:R", "LTM", "GTM")}
        missed = {
            name: sum(bool(ours == "1") and not bool(robust) for ours, robust in zip(worst, kept, strict=True))
            for name, kept in recalls.items()
        }
        found["peers"][version] = {
            **scores.to_dict(),
            "recall_at_1_under": {name: kept.double().mean().item() for name, kept in recalls.items()},
            "broken_by_it_alone": missed,
        }
    return report, found


def main() -> None:
    """Trains what is asked for and not there yet, and attacks it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a .npz file; without it, torchvision's Omniglot")
    parser.add_argument("--out", type=Path, default=Path("omniglot_run"), help="folder of state dicts and downloads")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--clean-weight", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eps", type=float, nargs="+", default=[13, 26], help="radii, in 255ths")
    parser.add_argument("--queries", type=int, default=500, help="how many test drawings are attacked")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = load(options.data) if options.data else fetch(options.out)
    for name in options.models:
        path, start = options.out / f"{name}.pt", time.perf_counter()
        if not path.exists():
            recipe = {"adversarial": name == "adversarial", "batchnorm": name == "batchnorm"}
            model = train(data, **recipe, steps=options.steps, clean_weight=options.clean_weight, seed=options.seed)
            torch.save(model.state_dict(), path)
            logger.info("%s: trained in %.0f s, saved as %s", name, time.perf_counter() - start, path)
    eps = [radius / 255 for radius in options.eps]
    generator = torch.Generator().manual_seed(options.seed)
    queries = torch.randperm(len(data.test_images), generator=generator)[: options.queries].sort().values.tolist()
    results: dict[str, Any] = {}
    for name in options.models:
        model = network(batchnorm=name == "batchnorm")
        model.load_state_dict(torch.load(options.out / f"{name}.pt", weights_only=True))
        report, found = compare(model.eval(), data, eps, queries, eps[-1], options.out / f"{name}_evaluation")
        logger.info("%s\n%s\n%s", name, report, json.dumps(found, indent=2))
        shown = {key: value for key, value in report.to_dict().items() if key not in ("settings", "clean_flags")}
        del shown["provenance"]["command"]  # which holds paths of the machine
        for part in (*shown["attacks"], *shown["worst"]):
            part.pop("robust_flags")
        results[name] = {"report": shown, **found}
        (options.out / "omniglot.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
