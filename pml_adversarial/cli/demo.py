"""The demo command: trains and attacks two models on handwritten digits, and writes a table, pictures and JSON."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torchattacks
from pytorch_metric_learning import losses, miners
from torch import nn
from torchattacks.attack import Attack as TorchAttack

from ..attacks.objective import AttackFactory
from ..errors import AdversarialError
from ..evaluation import save_comparison
from ..evaluation.evaluator import choose_queries
from ..evaluation.reports.results import decode_flags
from ..training.tuples import ROLES, parse_roles
from . import figures
from .experiment import MODELS, Settings, TrainedModel, run, summary
from .images import OpenSetSplit, digits
from .options import CONTEXT, FOLDER, FORCE, check_device, make_output, parse_class, parse_radii, try_option

_WRITTEN = ("results.json", "report.html", "comparison.html", "recall_against_eps.png", "queries.png")


@click.command(context_settings=CONTEXT)
@click.option("--loss", default="MultiSimilarityLoss:alpha=2,beta=40,base=0.5", help="A PML loss, with its options.")
@click.option("--miner", default=None, help="A PML tuple miner, with its options.  [default: none]")
@click.option("--attack", default="PGD:steps=5", help="A torchattacks class to train against, with its options.")
@click.option(
    "--train-eps", default=0.2, type=click.FloatRange(0, 1), help="Its full l-inf radius, in pixels of [0, 1]."
)
@click.option(
    "--perturb", default="all", help=f"Roles to perturb in training: {', '.join(ROLES)} (with commas), or all."
)
@click.option("--clean-weight", default=0.0, type=click.FloatRange(0), help="Weight of the clean loss beside it.")
@click.option(
    "--warmup", default=0.5, type=click.FloatRange(0, 1), help="Share of the steps in which eps grows from 0."
)
@click.option("--eps", default="0.05,0.1,0.15", help="Radii at which both models are attacked, with commas.")
@click.option("--attack-steps", default=40, type=click.IntRange(1), help="Steps of each evaluation attack.")
@click.option("--restarts", default=3, type=click.IntRange(1), help="Random starts of each evaluation attack.")
@click.option("--train-classes", default="0,1,2,3,4", help="Digits to train on, with commas; the others are the test.")
@click.option("--epochs", default=25, type=click.IntRange(1), help="Passes over the training images.")
@click.option("--batch-size", default=112, type=click.IntRange(2, 901), help="Images per step.")
@click.option("--learning-rate", default=1e-3, type=click.FloatRange(0, min_open=True), help="Of Adam.")
@click.option("--shift", default=1, type=click.IntRange(0), help="Training images move by up to so many pixels.")
@click.option("--seed", default=0, type=int, help="The first seed.")
@click.option("--seeds", default=1, type=click.IntRange(1), help="How many seeds; the table shows their mean.")
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1, mps.")
@click.option("--output", default="pml_adversarial_run", type=FOLDER, help="Folder.")
@FORCE
@click.option(
    "--threads", default=1, type=click.IntRange(1), help="CPU threads; images this small gain nothing from more."
)
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(
    loss: str,
    miner: str | None,
    attack: str,
    train_eps: float,
    perturb: str,
    eps: str,
    seed: int,
    seeds: int,
    output: Path,
    force: bool,
    quiet: bool,
    threads: int,
    train_classes: str,
    device: str,
    **numbers: Any,
) -> None:
    """Trains on handwritten digits, and attacks what came out.

    One embedding is trained plainly, one adversarially. Some digits are for training. The others are never seen in
    training and serve as the test. Each test image is attacked as a query that searches all others. A query is robust
    if every attack from every random start fails.

    For a saved model and images of your own, use the command evaluate.
    """
    torch.set_num_threads(threads)
    settings = Settings(
        eps=parse_radii(eps),
        perturb=try_option(lambda: parse_roles(perturb.split(",")), "--perturb"),
        seeds=tuple(range(seed, seed + seeds)),
        device=check_device(device),
        **numbers,
    )
    data = try_option(lambda: digits(_classes(train_classes)), "--train-classes")
    classes = len(data.train_labels.unique())
    make_loss = parse_class(losses, nn.Module, loss, "loss", num_classes=classes, embedding_size=64)
    make_miner: Callable[[], Any] = parse_class(miners, nn.Module, miner, "miner") if miner else lambda: None
    factory = _training_attack(attack, train_eps)
    some = torch.randn(2 * classes, 64), torch.arange(classes).repeat(2)
    try_option(lambda: make_loss()(*some), "--loss")
    try_option(lambda: miner and make_miner()(*some), "--miner")
    make_output(output, _WRITTEN, force)
    try:
        measured = run(settings, make_loss, make_miner, factory, data, progress=not quiet)
    except AdversarialError as error:
        raise click.ClickException(str(error)) from error
    described = {"train_classes": train_classes, "loss": loss, "miner": miner, "attack": attack, "train_eps": train_eps}
    report = summary(settings, measured, described)
    (output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    of_first_seed = {m.kind: m.report for m in measured[: len(MODELS)]}
    of_first_seed["adversarial"].save_html(output / "report.html")
    save_comparison(of_first_seed, output / "comparison.html")
    _draw(report, measured, data, output)
    click.echo(table(report))
    click.echo(f"\nWritten to {output}/: {', '.join(_WRITTEN)}")


def table(report: dict[str, Any]) -> str:
    """The report as a table, in percent."""
    settings = report["settings"]
    heads = ["", "R@1", "mAP@R", *(f"R@1 eps {eps:g}" for eps in settings["eps"])]
    rows = [
        [kind, *(f"{100 * v:.1f}" for v in (m["recall_at_1"], m["map_at_r"], *m["worst_case"].values()))]
        for kind, m in report["models"].items()
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    seeds, attacks = len(settings["seeds"]), len(report["evaluation"]["attacks"])
    notes = [
        "",
        f"Percent, on digits never seen in training, mean of {seeds} seed(s). Attacked R@1 is the worst case per",
        f"query over {attacks} attacks (toward the nearest wrong item, chosen anew in each step; away from its clean",
        f"embedding), l-inf PGD with momentum, {settings['attack_steps']} steps from {settings['restarts']} random "
        "starts each; the gallery is clean.",
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])


def _draw(report: dict[str, Any], measured: list[TrainedModel], data: OpenSetSplit, output: Path) -> None:
    curves = {
        kind: {0.0: m["recall_at_1"], **{float(eps): value for eps, value in m["worst_case"].items()}}
        for kind, m in report["models"].items()
    }
    figures.recall_curves(curves, measured[0].report.chance, output / "recall_against_eps.png")
    first = {m.kind: m for m in measured[: len(MODELS)]}
    shown = len(report["settings"]["eps"]) // 2
    eps = report["settings"]["eps"][shown]
    attacked = {kind: (m.model.cpu(), m.report.attacked[eps].cpu()) for kind, m in first.items() if m.report.attacked}
    plain = first["plain"].report
    broken = decode_flags(plain.clean_flags) & ~decode_flags(plain.worst[shown].robust_flags)
    queries = choose_queries(data.test_labels, broken, 5).tolist()
    figures.query_panel(attacked, data.test_images, data.test_labels, queries, eps, output / "queries.png")


def _training_attack(text: str, eps: float) -> AttackFactory:
    made = parse_class(torchattacks, TorchAttack, text, "attack")
    parameters, given = inspect.signature(made.func).parameters, made.keywords
    if "eps" not in parameters:
        raise click.BadParameter(f"{text} has no option eps; choose an attack with an l-inf radius, such as PGD.")
    eps = given.get("eps", eps)
    steps = given.get("steps", getattr(parameters.get("steps"), "default", 1))
    alpha = {"alpha": 2.5 * eps / steps} if "alpha" in parameters and "alpha" not in given else {}
    return partial(made, eps=eps, **alpha)


def _classes(text: str) -> list[int]:
    try:
        return [int(value) for value in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{text!r}; expected digits with commas, such as 0,1,2") from error
