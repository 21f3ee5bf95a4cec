"""How robust an embedding model is: retrieval under every attack, and in the worst case per query."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..attacks.checks import check_choice, check_whole
from ..training.isolation import isolated, random_stream
from ..training.pixels import Normalization, PixelSpace
from . import attack_options, fingerprints, metrics, provenance
from .attacks import RetrievalAttack
from .checkpoint import Checkpoint
from .checks import run_checks
from .embedder import embed_all
from .evaluator import BatchResult, Evaluator, joined, means, robust_flags
from .images import Images
from .options import NORMS, to_radii, to_recall_at, to_whole_numbers
from .progress import progress_bar
from .report import Report
from .results import decode_flags
from .retrieval_task import RetrievalTask
from .suites import find_suite


def evaluate_robustness(
    model: nn.Module,
    queries: Images,
    gallery: Images | None = None,
    *,
    eps: float | Iterable[float],
    attacks: str | Sequence[str | RetrievalAttack] = "standard",
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
    batch_size: int = 128,
    resume: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Attacks queries, and items of the gallery, and measures how well retrieval still works.

    A query is robust if its nearest item is right without attack and under every attack from every start. Items are
    compared by cosine similarity. If a wrong item is as near as the nearest right one, the query counts as failed. A
    query that fails at one eps counts as failed at every larger eps, because the same perturbation is allowed there.

    Args:
        model: images -> embeddings ``(N, D)``. It is attacked in eval mode, and comes back in its own mode.
        queries: ``(images, labels)`` or a data set of pairs; pixels in [0, 1].
        gallery: what is searched, in the same form. None: the queries; then no query finds itself (leave-one-out).
        eps: one or more radii, in pixels of [0, 1].
        attacks: "standard", "quick", names of attacks, or attacks such as `suites.standard` returns.
        norm: of the perturbations, "Linf" or "L2".
        recall_at: the k of R@k; 1 is always among them.
        normalization: ``(mean, std)`` if the model takes normalised inputs. Images are given as pixels all the same.
        subset: indices of the queries to attack; None: all. Without a gallery, all queries are searched nevertheless.
        own: only with a gallery that holds queries: ``(Q,)``, for each query its index in the gallery, or -1. A query
            never finds itself.
        gallery_embeddings: ``(G, D)``, if the model's embeddings of the gallery are known already.
        nmi: whether to measure how well clusters of the embeddings agree with the classes (needs faiss).
        checks: whether to look for signs that the measured robustness is too high, see the module `checks`.
        keep_attacked: whether the report holds all perturbed queries.
        seed: of all random choices.
        batch_size: queries that are attacked together.
        resume: a folder that keeps finished batches. The same call with the same folder goes on from them.
        progress: whether to show progress bars (needs tqdm).

    Raises:
        InputError: the inputs cannot be evaluated, or the folder ``resume`` belongs to another evaluation.
    """
    check_choice("norm", norm, NORMS)
    check_whole("batch_size", batch_size)
    radii = to_radii(eps, norm)
    suite, members = find_suite(attacks)
    recall_at = to_recall_at(recall_at)
    PixelSpace(normalization)  # checks it
    settings: dict[str, Any] = {
        "eps": list(radii),
        "norm": norm,
        "attacks": [attack.name for attack in members],
        "attack_settings": [attack_options.to_json(attack) for attack in members],
        "recall_at": recall_at,
        "normalization": None if normalization is None else [list(map(float, part)) for part in normalization],
        "subset": None if subset is None else to_whole_numbers(subset, "subset"),
        "own": None if own is None else to_whole_numbers(own, "own"),
        "nmi": nmi,
        "checks": checks,
        "keep_attacked": keep_attacked,
        "seed": seed,
        "batch_size": batch_size,
    }
    with isolated(model), random_stream(seed, -1):
        task = RetrievalTask(model, queries, gallery, norm, normalization, own)
        measured = cache(partial(fingerprints.of_task, task, gallery_embeddings))
        checkpoint = Checkpoint(resume, lambda: {**settings, **measured()}, task.embed.device)
        embeddings = _gallery(task, gallery_embeddings, checkpoint, batch_size, progress)
        task.set_gallery(embeddings)
        origin = {**measured(), **provenance.surroundings(task.embed.device, embeddings)}
        rows, left_out = task.rows_with_right_item(subset)
        members = tuple(attack for attack in members if attack.num_classes <= len(task.gallery.classes))
        evaluator = Evaluator(task, members, radii, recall_at, seed, keep_attacked, nmi)
        found = _evaluate(evaluator, rows, checkpoint, batch_size, suite if progress else None)
        results = evaluator.attack_results(found)
        clean, labels = joined(found, "clean"), task.queries.labels[rows]
        flags = robust_flags(clean)
        return Report(
            suite=suite,
            protocol="leave-one-out" if task.leave_one_out else "separate gallery",
            num_queries=len(rows),
            num_gallery=len(task.gallery),
            num_classes=len(task.gallery.classes),
            left_out=left_out,
            clean=means(clean),
            chance=task.gallery.chance(task.targets(rows)).mean().item(),
            attacks=results,
            worst=evaluator.worst_cases(found, labels),
            collapse=metrics.collapse(task.gallery),
            nmi=evaluator.nmi_of(found, "clean", labels),
            checks=run_checks(task, rows, decode_flags(flags), results, seed, batch_size) if checks else (),
            settings={**settings, "device": str(task.embed.device)},
            versions=provenance.versions(),
            provenance=origin,
            clean_flags=flags,
            examples=evaluator.examples(found[0]),
            attacked=evaluator.attacked(found),
        )


def _gallery(
    task: RetrievalTask, known: Tensor | None, checkpoint: Checkpoint, batch_size: int, progress: bool
) -> Tensor:
    if known is not None:
        return task.check_embeddings(known)
    with progress_bar(progress, len(task.items), "gallery") as bar:
        return checkpoint.load_or_make("gallery", lambda: embed_all(task.embed, task.items, batch_size, bar.update))


def _evaluate(
    evaluator: Evaluator, rows: Tensor, checkpoint: Checkpoint, batch_size: int, title: str | None
) -> list[BatchResult]:
    """The results of all batches; with a title, a progress bar is shown."""
    parts, found = rows.split(batch_size), []
    with progress_bar(title is not None, len(parts) * evaluator.steps_per_batch, title or "") as bar:
        for number, part in enumerate(parts):
            make = partial(evaluator.evaluate_batch, part, number == 0, bar.update)
            found.append(checkpoint.load_or_make(f"batch_{number:05d}", make))
            bar.update((number + 1) * evaluator.steps_per_batch - bar.n)
    return found
