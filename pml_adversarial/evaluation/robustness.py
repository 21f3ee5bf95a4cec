"""How robust is this embedding: every query under every attack, and each under its worst."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..training.isolation import isolated, random_stream
from ..training.pixels import Normalization, PixelSpace
from . import metrics
from .attacks import AnyAttack
from .checks import run_checks
from .gallery import chunks
from .images import Images
from .report import Report
from .resume import Folder
from .run import Run, examples_of, joined, marks, means
from .suites import SUITES, by_name
from .task import RetrievalTask, whole_numbers

NORMS = ("Linf", "L2")


def evaluate_robustness(
    model: nn.Module,
    queries: Images,
    gallery: Images | None = None,
    *,
    eps: float | Iterable[float],
    attacks: str | Sequence[str | AnyAttack] = "standard",
    norm: str = "Linf",
    recall_at: Sequence[int] = (1, 2, 4, 8),
    normalization: Normalization | None = None,
    subset: Sequence[int] | Tensor | None = None,
    own: Sequence[int] | Tensor | None = None,
    gallery_embeddings: Tensor | None = None,
    nmi: bool = False,
    checks: bool = True,
    keep_attacked: bool = False,
    seed: int = 0,
    chunk: int = 128,
    resume: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Attacks every query, and items of the gallery for every query, and says what is left of retrieval.

    A query stands if its nearest item is right, without attack and under every attack from every start. Ties count
    against it. The gallery is embedded once; items are compared by cosine similarity. What fails at one eps fails
    at every larger one, since its perturbation is allowed there.

    Args:
        model: images -> embeddings ``(N, D)``; attacked in eval mode, and it comes back as it was.
        queries: ``(images, labels)`` or a data set of pairs; pixels in [0, 1].
        gallery: the same; None: the queries themselves, of which none ever finds itself (leave one out).
        eps: radii, in pixels of [0, 1].
        attacks: "standard", "quick", names of attacks, or attacks such as `suites.standard` returns.
        norm: "Linf" or "L2".
        recall_at: the k of R@k; 1 is always among them.
        normalization: ``(mean, std)`` if the model takes normalised inputs; images are given as pixels all the same.
        subset: indices of the queries to attack; None: all. Without a gallery all others are searched nevertheless.
        own: where queries are in the gallery that is given: each query's index there, -1 for one that is not. It is
            never found.
        gallery_embeddings: ``(G, D)``, if the model's embeddings of the gallery are known.
        nmi: whether to cluster the embeddings too (needs faiss).
        checks: whether to ask for signs of a false claim, see `checks`.
        keep_attacked: whether to keep the perturbed queries, all at once in memory.
        seed: of all random choices.
        chunk: queries that are attacked together.
        resume: folder in which finished chunks are kept; a run that was cut off goes on from there.
        progress: whether to show progress bars (needs tqdm).

    Raises:
        InputError: inputs that cannot be evaluated, or a ``resume`` folder of another evaluation.
    """
    radii = to_radii(eps)
    suite, members = to_suite(attacks)
    recall_at = sorted({1, *whole_numbers(recall_at, "recall_at")})
    check_options(norm, chunk, recall_at, radii)
    PixelSpace(normalization)  # checks it
    bar = _bars(progress)
    settings: dict[str, Any] = {
        "eps": list(radii),
        "norm": norm,
        "attacks": [attack.name for attack in members],
        "recall_at": recall_at,
        "normalization": None if normalization is None else [list(map(float, part)) for part in normalization],
        "subset": None if subset is None else whole_numbers(subset, "subset"),
        "own": None if own is None else whole_numbers(own, "own"),
        "nmi": nmi,
        "checks": checks,
        "keep_attacked": keep_attacked,
        "seed": seed,
        "chunk": chunk,
    }
    with isolated(model), random_stream(seed, -1):
        task = RetrievalTask(model, queries, gallery, norm, normalization, own)
        folder = Folder(resume, settings, task, members, gallery_embeddings)
        known = None if gallery_embeddings is None else task.known(gallery_embeddings)
        task.search(folder.once("gallery", lambda: _embed_gallery(task, chunk, bar)) if known is None else known)
        rows, left_out = task.answerable(subset)
        members = tuple(attack for attack in members if attack.num_classes <= len(task.gallery.classes))
        run = Run(task, members, radii, recall_at, seed, keep_attacked, nmi)
        pieces = [rows[piece] for piece in chunks(len(rows), chunk)]
        with bar(total=len(pieces) * run.num_steps, desc=suite) as shown:
            parts = []
            for number, piece in enumerate(pieces):
                parts.append(folder.once(f"chunk_{number:05d}", lambda: run.chunk(piece, number == 0, shown.update)))  # noqa: B023
                shown.update((number + 1) * run.num_steps - shown.n)
        results = run.results(parts)
        clean, labels = joined(parts, "clean"), task.queries.labels[rows]
        return Report(
            suite=suite,
            protocol="leave-one-out" if task.leave_one_out else "separate gallery",
            num_queries=len(rows),
            num_gallery=len(task.gallery),
            num_classes=len(task.gallery.classes),
            left_out=left_out,
            clean=means(clean),
            chance=_chance(task, rows),
            attacks=results,
            worst=run.worst(parts, labels),
            collapse=metrics.collapse(task.gallery),
            nmi=run.nmi_of(parts, "clean", labels) if nmi else None,
            checks=run_checks(task, rows, marks(clean), results, seed, chunk) if checks else (),
            settings={**settings, "device": str(task.gallery.embeddings.device)},
            versions=_versions(),
            clean_standing=marks(clean),
            examples=examples_of(task, parts[0], members),
            attacked={eps: torch.cat([part["attacked"][str(eps)] for part in parts]) for eps in radii}
            if keep_attacked
            else None,
        )


def _embed_gallery(task: RetrievalTask, chunk: int, bar: Callable[..., Any]) -> Tensor:
    parts = []
    with torch.no_grad(), bar(total=len(task.items), desc="gallery") as shown:
        for piece in chunks(len(task.items), chunk):
            parts.append(task.embed(task.items.pixels(range(piece.start, piece.stop))))
            shown.update(piece.stop - piece.start)
    return torch.cat(parts)


def _chance(task: RetrievalTask, rows: Tensor) -> float:
    targets = task.targets(rows)
    others = len(task.gallery) - (targets.own >= 0).double()
    return (task.gallery.num_right(targets) / others).mean().item()


def _versions() -> dict[str, str]:
    packages = ("pml-adversarial", "torch", "pytorch-metric-learning", "torchattacks")
    return {**{package: _version(package) for package in packages}, "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from a folder
        return "not installed"


def to_radii(eps: float | Iterable[float]) -> tuple[float, ...]:
    """Different radii, ascending."""
    try:
        radii = tuple(sorted({float(radius) for radius in ([eps] if isinstance(eps, int | float | str) else eps)}))
    except (TypeError, ValueError):
        radii = ()
    if isinstance(eps, str) or not radii or not all(0 < radius < math.inf for radius in radii):
        raise InputError(f"eps={eps!r}; expected a radius above 0, or several, in pixels of [0, 1], such as 8/255.")
    return radii


def to_suite(attacks: str | Sequence[str | AnyAttack]) -> tuple[str, tuple[AnyAttack, ...]]:
    """The suite's name in reports, and its attacks."""
    if isinstance(attacks, str):
        if attacks not in SUITES:
            raise InputError(f"attacks={attacks!r}; expected one of {', '.join(SUITES)}, or a list of attacks.")
        name, make = SUITES[attacks]
        return name, make()
    known = by_name()
    members: tuple[Any, ...] = tuple(known.get(a, a) if isinstance(a, str) else a for a in attacks)
    names = [getattr(attack, "name", None) for attack in members]
    if not members or not all(isinstance(attack, AnyAttack) for attack in members) or len(set(names)) < len(names):
        found = ", ".join(str(getattr(attack, "name", repr(attack))) for attack in members) or "none"
        raise InputError(
            f"attacks holds {found}; expected QueryAttack and GalleryAttack objects of different names, or some of "
            f"{', '.join(known)}."
        )
    return "custom", members


def check_options(norm: str, chunk: int, recall_at: Sequence[int], radii: Sequence[float]) -> None:
    """Refuses what no evaluation can be made with; ``recall_at`` ascending."""
    if norm not in NORMS:
        raise InputError(f"norm={norm!r}; expected one of {', '.join(NORMS)}.")
    if norm == "Linf" and radii[-1] > 1:
        raise InputError(f"eps={radii[-1]:g} is wider than all pixels; expected 1 at most in Linf, such as 8/255.")
    if not isinstance(chunk, int) or chunk < 1 or recall_at[0] < 1:
        raise InputError(f"chunk={chunk}, recall_at={recall_at}; expected whole numbers from 1 on.")


def _bars(shown: bool) -> Callable[..., Any]:
    if not shown:
        return _NoBar
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise InputError("progress=True needs tqdm; install it with `pip install tqdm`.") from error
    return tqdm


class _NoBar:
    """A progress bar that nobody sees."""

    def __init__(self, total: int, desc: str) -> None:
        self.total, self.desc, self.n = total, desc, 0

    def update(self, steps: int = 1) -> None:
        self.n += steps

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass
