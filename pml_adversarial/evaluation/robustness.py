"""How robust an embedding model is: retrieval under every attack, and in the worst case per query."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attacks.checks import check_choice, check_whole
from ..errors import InputError
from ..training.isolation import random_stream
from ..training.pixels import Bounds, Normalization
from .attacks.as_json import code_of, to_json
from .attacks.kinds import RetrievalAttack
from .attacks.preparation import prepared
from .checks import passes_of_checks, run_checks
from .evaluator import BatchResult, Evaluator, most_passes
from .reports import fingerprints, provenance
from .reports.report import Report
from .reports.results import decode_flags
from .retrieval.embedder import Embedder, embed_all, plain_surroundings
from .retrieval.forms import Images
from .retrieval.images import ImageSet
from .retrieval.options import NORMS, settings_of_inputs, to_radii, to_recall_at, to_seed, to_whole_numbers
from .retrieval.task import JUNK, Mask, RetrievalTask, Search
from .runs.checkpoint import Checkpoint
from .runs.progress import Progress, progress_of
from .runs.sharing import Ranks, sharing
from .suites import find_suite

logger = logging.getLogger("pml_adversarial")


def evaluate_robustness(
    model: Any,
    queries: Images,
    gallery: Images | None = None,
    *,
    eps: float | Iterable[float],
    attacks: str | Sequence[str | RetrievalAttack] = "standard",
    norm: str = "Linf",
    distance: Any = "cosine",
    recall_at: Sequence[int] = (1, 2, 4, 8),
    normalization: Normalization | None = None,
    bounds: Bounds | None = None,
    subset: Sequence[int] | Tensor | None = None,
    own: Sequence[int] | Tensor | str | None = None,
    ignore: Mask = None,
    relevant: Mask = None,
    junk_label: int | None = JUNK,
    gallery_embeddings: Tensor | None = None,
    nmi: bool = False,
    checks: bool = True,
    keep_attacked: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    resume: str | Path | None = None,
    progress: bool = False,
    share: bool = True,
) -> Report:
    """Attacks queries, and items of the gallery, and measures how well retrieval still works.

    A query is robust if its nearest item is right without attack and under every attack from every start. If a wrong
    item is as near as the nearest right one, the query counts as failed. A query that fails at one eps counts as failed
    at every larger eps, because the same perturbation is allowed there.

    Similarities are computed in single precision at least, whatever surrounds the call. The model runs under the
    autocast that surrounds it, in its own type.

    Args:
        model: images -> embeddings ``(N, D)``: a module, modules in forward order, the ``models`` of a PML trainer, or
            any function, also one without gradient. If it is in train mode, its ``eval()`` is called; in eval mode it
            stays as it is, parts in train mode included. It comes back as it was.
        queries: labelled images, see `forms.Images`; pixels in [0, 1].
        gallery: what is searched, in the same form. None: the queries; then no query finds itself (leave-one-out).
            ``(None, labels)``: items that are known by ``gallery_embeddings`` alone; they cannot be attacked.
        eps: one or more radii: in pixels of [0, 1]; in "L0" how many pixels may change, in "patch" the side of the
            square that may.
        attacks: a suite, "standard", "fast" or "quick"; or a list of names of attacks and of attacks such as
            `suites.standard` returns.
        norm: of the perturbations: "Linf", "L2", "L1", "L0" or "patch", see `ball.NORMS`. Attacks that do not know
            it are left out, with a note.
        distance: how the deployed search compares embeddings: "cosine", "euclidean", "normalized_euclidean",
            "inner_product", or a distance object of PML. Attacks, ties and checks follow it.
        recall_at: the k of R@k; 1 is always among them.
        normalization: ``(mean, std)`` if the model takes normalised inputs. Images may be given as pixels, or
            normalised; then it is undone for the attack.
        bounds: ``(low, high)`` of the inputs if they are no images; eps then counts as a share of the range.
        subset: indices of the queries to attack; None: all. Without a gallery, all queries are searched nevertheless.
        own: only with a gallery that holds queries: ``(Q,)``, for each query its index in the gallery, or -1. A query
            never finds itself. "same": the item with the same image.
        ignore: items that a query never finds, as in person re-identification those of the same person and camera:
            ``(Q, G)`` bool, or a function of the indices ``(n,)`` of some queries that gives ``(n, G)``.
        relevant: items that are right for a query, in the same form. None: those of the same label.
        junk_label: items of the gallery with this label are never found by any query; None: there is no such label.
        gallery_embeddings: ``(G, D)``, if the model's embeddings of the gallery are known already.
        nmi: whether to measure how well clusters of the embeddings agree with the classes (needs faiss).
        checks: whether to look for signs that the measured robustness is too high, see the module `checks`.
        keep_attacked: whether the report holds all perturbed queries.
        seed: of all random choices.
        batch_size: queries that are attacked together.
        resume: a folder that keeps finished batches. The same call with the same folder goes on from them.
        progress: whether to show a progress bar (needs tqdm). After the first batch of queries, the expected cost is
            logged; without a bar, only if the evaluation will take minutes.
        share: whether processes of ``torch.distributed`` share the work, where there are several. Then all of them have
            to call, with the same arguments, and get the same report. If not, this process evaluates alone.

    Raises:
        InputError: the inputs cannot be evaluated, or the folder ``resume`` belongs to another evaluation.
    """
    check_choice("norm", norm, NORMS)
    batch_size, seed = check_whole("batch_size", batch_size), to_seed(seed)
    radii = to_radii(eps, norm)
    suite, members = find_suite(attacks)
    recall_at = to_recall_at(recall_at)
    subset = None if subset is None else to_whole_numbers(subset, "subset")
    embed = Embedder(model, normalization, bounds)
    search = Search(distance, own, ignore, relevant, junk_label)
    settings: dict[str, Any] = {
        "eps": list(radii),
        "norm": norm,
        **search.settings(),
        "attacks": [attack.name for attack in members],
        "attack_settings": [to_json(attack) for attack in members],
        "recall_at": recall_at,
        **settings_of_inputs(normalization, bounds),
        "subset": subset,
        "nmi": nmi,
        "checks": checks,
        "keep_attacked": keep_attacked,
        "seed": seed,
        "batch_size": batch_size,
    }
    with (
        plain_surroundings(),
        random_stream(seed, -1),
        sharing(share) as ranks,
        progress_of(progress, suite, ranks) as bar,
    ):
        task = RetrievalTask(embed, queries, gallery, norm, search)
        task.probe(radii)
        embed.on_passes = bar.add
        with embed.isolated():
            asked = task.rows(subset)
            measured = cache(partial(fingerprints.of_task, task, asked, gallery_embeddings))
            answers = {"precision": embed.precision, "at_random": embed.is_random, "model_notes": list(embed.notes)}
            code = {"code": code_of(members)}
            checkpoint = Checkpoint(resume, lambda: {**settings, **measured(), **answers, **code}, embed.device, ranks)
            embedded = partial(_embedded, task, checkpoint, batch_size, ranks, bar)
            task.embed_and_set(asked, batch_size, gallery_embeddings, embedded)
            gradient = checkpoint.load_or_make("gradient", lambda: embed.gradient)
            if checkpoint.has_loaded:
                task.check_clean(asked)
                embed.check_kept_gradient(gradient)
            origin = {**measured(), **provenance.surroundings(embed.device)}
            rows, left_out = task.with_right_item(asked)
            task.note_lengths(rows)
            members = tuple(prepared(attack, task, rows, radii) for attack in _able(members, task))
            evaluator = Evaluator(task, members, radii, recall_at, seed, keep_attacked, nmi)
            passes_after = passes_of_checks(len(rows), embed.is_random) // ranks.count if checks else 0
            found = _evaluate(evaluator, _split(rows, batch_size, ranks), checkpoint, ranks, bar, passes_after)
            task.note_not_finite(sum(int(batch["not_finite"]) for batch in found))
            measures = evaluator.measures(found, rows)
            if checks:
                right = decode_flags(measures["clean_flags"])
                made = run_checks(task, rows, right, measures["attacks"], seed, batch_size, ranks, bar.begin)
        devices = dict.fromkeys(ranks.share(range(ranks.count), lambda number: str(embed.device)))
        report = Report(
            suite=suite,
            left_out=left_out,
            **measures,
            checks=made if checks else (),
            settings={**settings, "device": ", ".join(devices), "precision": embed.precision},
            versions=provenance.versions(),
            provenance=origin,
            notes=tuple(task.notes),
        )
        return ranks.tell(report)


def _embedded(
    task: RetrievalTask,
    checkpoint: Checkpoint,
    batch_size: int,
    ranks: Ranks,
    bar: Progress,
    images: ImageSet,
    rows: Tensor,
) -> Tensor:
    """Embeddings ``(n, D)`` of some images, which are kept, shared among the processes, and shown by the bar."""

    def made() -> Tensor:
        bar.begin(images.role)
        bar.expect(len(rows) // ranks.count)
        return embed_all(task.embed, images, batch_size, rows, ranks)

    return checkpoint.load_or_make("gallery" if images is task.items else "queries", made)


def _able(attacks: tuple[RetrievalAttack, ...], task: RetrievalTask) -> tuple[RetrievalAttack, ...]:
    """The attacks that can be made on a task; the report notes which cannot."""
    reasons = [_reason_against(attack, task) for attack in attacks]
    left_out = [f"{attack.name} is left out: {why}" for attack, why in zip(attacks, reasons, strict=True) if why]
    if len(left_out) == len(attacks):
        raise InputError(f"None of the attacks can be made here: {'; '.join(left_out)}. Expected one or more that can.")
    task.notes.extend(left_out)
    return tuple(attack for attack, why in zip(attacks, reasons, strict=True) if not why)


def _reason_against(attack: RetrievalAttack, task: RetrievalTask) -> str | None:
    """Why an attack cannot be made on a task; None: it can."""
    if attack.num_classes > len(task.gallery.classes):
        return f"it needs {attack.num_classes} classes"
    if task.norm not in attack.norms:
        return f"it is made for {' and '.join(attack.norms)}, not for {task.norm}"
    if attack.needs_items and not task.items.has_images:
        return "it needs images of the gallery, and there are none"
    return None


def _evaluate(
    evaluator: Evaluator, parts: Sequence[Tensor], checkpoint: Checkpoint, ranks: Ranks, bar: Progress, then: int
) -> list[BatchResult]:
    """The results of all batches of queries; ``then`` passes of this process follow after them."""
    names = [f"batch_{number:05d}" for number in range(len(parts))]
    own = [len(parts[number]) for number in ranks.own(checkpoint.missing(names))]
    most = most_passes(evaluator.attacks, sum(own), len(evaluator.radii), evaluator.task.embed.is_random)
    bar.expect(None if most is None else most + then)
    batches = bar.batches(own, then)

    def make(number: int) -> BatchResult:
        with next(batches):
            return evaluator.evaluate_batch(parts[number], number == 0, bar.begin)

    found = list(checkpoint.load_or_share(names, make))
    bar.expect(then)
    return found


def _split(rows: Tensor, batch_size: int, ranks: Ranks) -> tuple[Tensor, ...]:
    parts = rows.split(batch_size)
    if len(parts) < ranks.count and ranks.is_first:
        logger.warning(
            "%d batch(es) of queries for %d processes: some have nothing to do. batch_size=%d gives each a batch.",
            len(parts),
            ranks.count,
            max(1, len(rows) // ranks.count),
        )
    return parts
