"""How robust verification is: how well pairs of images are told apart while one image of each pair is attacked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from ...attacks.ball import NORMS
from ...attacks.checks import check_choice, check_steps, check_whole
from ...errors import InputError
from ...training.isolation import random_stream
from ...training.pixels import Bounds, Normalization
from ..reports import provenance
from ..retrieval.distance import find_distance
from ..retrieval.embedder import Embedder, plain_surroundings
from ..retrieval.options import (
    JUNK,
    check_probability,
    check_radii,
    settings_of_inputs,
    to_radii,
    to_seed,
    to_whole_numbers,
)
from ..runs.progress import progress_bar
from .attacks import QUERIES, RESTARTS, STEPS, PairAttack, pair_attacks
from .checks import run_pair_checks
from .evaluator import PairEvaluator, find_thresholds
from .pairs import PairChoice, Pairs
from .report import VerificationReport
from .task import PairTask


def evaluate_verification(
    model: Any,
    pairs: Pairs,
    *,
    eps: float | Iterable[float],
    indices: Sequence[Sequence[int]] | Tensor | None = None,
    genuine: int | None = None,
    impostors: int | None = None,
    junk_label: int | None = JUNK,
    subset: Sequence[int] | Tensor | int | None = None,
    far: float | Iterable[float] = (1e-2, 1e-3, 1e-4),
    norm: str = "Linf",
    distance: Any = "cosine",
    steps: int = STEPS,
    restarts: int = RESTARTS,
    square: int = QUERIES,
    attacks: Sequence[PairAttack] = (),
    normalization: Normalization | None = None,
    bounds: Bounds | None = None,
    checks: bool = True,
    keep_attacked: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> VerificationReport:
    """Attacks pairs of images, and measures how well genuine pairs are still told from impostor pairs.

    A pair is accepted if ``similarity >= threshold``. The first image of each pair is perturbed, and the second one,
    which is enrolled, stays clean. Of a genuine pair the attacks lower the similarity (dodging), of an impostor pair
    they raise it (impersonation). Thresholds are set on all pairs without attack. For each pair the worst similarity
    counts, over all attacks, starts and smaller eps, that without attack included. Ties count against the model: an
    impostor pair that is as similar as a genuine one, up to rounding, counts as more similar.

    Args:
        model: as in `evaluate_robustness`.
        pairs: ``(first images, second images, same)``, a data set of such items, or labelled images; see `pairs.Pairs`.
        eps: one or more radii, as in `evaluate_robustness`.
        indices: with labelled images, ``(P, 2)``: the indices of the first and of the second image of each pair.
        genuine: with labelled images and no ``indices``, how many genuine pairs are drawn; None: all.
        impostors: in the same way, how many impostor pairs are drawn; None: as many as genuine ones.
        junk_label: with labelled images and no ``indices``, the label of images that are in no pair; None: all are.
        subset: indices of the pairs to attack, or a number, so many of each kind; None: all. Thresholds and results
            without attack are those of all pairs nevertheless.
        far: false accept rates for which thresholds are set. One below ``1 / impostor pairs`` cannot be measured.
        norm: of the perturbations: "Linf", "L2", "L1", "L0" or "patch", see `ball.NORMS`.
        distance: as in `evaluate_robustness`.
        steps: gradient steps of each run of an attack.
        restarts: runs of the attack "momentum", from different random starts.
        square: forward passes of the black-box attack; 0: it is left out.
        attacks: further attacks, which are made beside those of `verification.attacks.pair_attacks`.
        normalization: as in `evaluate_robustness`.
        bounds: as in `evaluate_robustness`.
        checks: whether to look for signs that the measured robustness is too high, see `verification.checks`.
        keep_attacked: whether the report holds the perturbed first images.
        seed: of all random choices.
        batch_size: pairs that are attacked together.
        progress: whether to show progress bars (needs tqdm).

    Raises:
        InputError: the pairs cannot be evaluated, or an option cannot be used.
    """
    check_choice("norm", norm, NORMS)
    batch_size, seed = check_whole("batch_size", batch_size), to_seed(seed)
    radii, rates = to_radii(eps, norm), _to_rates(far)
    suite, members = _suite(steps, restarts, square, attacks)
    embed = Embedder(model, normalization, bounds)
    if isinstance(subset, Integral):
        subset = subset if isinstance(subset, bool) else int(subset)
    else:
        subset = None if subset is None else to_whole_numbers(subset, "subset")
    settings: dict[str, Any] = {
        "eps": list(radii),
        "far": list(rates),
        "genuine": genuine,
        "impostors": impostors,
        "junk_label": junk_label,
        "subset": subset,
        "norm": norm,
        "distance": find_distance(distance).name,
        "attacks": [attack.name for attack in members],
        "steps": steps,
        "restarts": restarts,
        "square": square,
        **settings_of_inputs(normalization, bounds),
        "checks": checks,
        "keep_attacked": keep_attacked,
        "seed": seed,
        "batch_size": batch_size,
    }
    with plain_surroundings(), random_stream(seed, -1):
        task = PairTask(embed, pairs, norm, distance, PairChoice(indices, genuine, impostors, junk_label), seed)
        check_radii(radii, norm, task.pairs.first[:1].shape[1:])
        rows = task.rows(subset, seed)
        with embed.isolated():
            with progress_bar(progress, task.num_images, "embeddings") as bar:
                task.embed_all(batch_size, bar.update)
            _note_rates(task, rates)
            thresholds = find_thresholds(task.scores.roc(), rates)
            origin = {**task.fingerprints(), **provenance.surroundings(embed.device)}
            evaluator = PairEvaluator(task, members, radii, rows, seed, batch_size, keep_attacked)
            with progress_bar(progress, evaluator.num_runs, suite) as bar:
                evaluator.run(bar.update)
            if embed.not_finite:
                task.notes.append(
                    f"{embed.not_finite} embeddings of perturbed images were NaN or infinite; such pairs are rejected"
                )
            made = run_pair_checks(task, rows, thresholds["EER"], evaluator.reached, seed, batch_size) if checks else ()
        return VerificationReport(
            suite=suite,
            protocol=task.pairs.protocol,
            num_genuine=int(task.same.sum()),
            num_impostors=int((~task.same).sum()),
            results=evaluator.results(thresholds),
            attacks=evaluator.attack_results(thresholds),
            checks=made,
            settings={**settings, "device": str(embed.device), "precision": embed.precision},
            versions=provenance.versions(),
            provenance=origin,
            notes=tuple(task.notes),
            same="".join("1" if same else "0" for same in task.same.tolist()),
            attacked_pairs=tuple(rows.tolist()),
            tie=task.scores.tie,
            attacked=evaluator.attacked(),
        )


def _to_rates(far: float | Iterable[float]) -> tuple[float, ...]:
    """Different false accept rates, descending."""
    try:
        rates = sorted({float(rate) for rate in (far if isinstance(far, Iterable) else [far])}, reverse=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"far={far!r}; expected one or more rates between 0 and 1, such as 0.001.") from error
    for rate in rates:
        check_probability("far", rate)
    return tuple(rates)


def _suite(steps: int, restarts: int, square: int, attacks: Sequence[PairAttack]) -> tuple[str, tuple[PairAttack, ...]]:
    """Name in reports, and all attacks."""
    check_steps(steps, InputError)
    check_whole("restarts", restarts)
    check_whole("square", square, 0, hint=", as the number of passes of the black-box attack")
    own = pair_attacks(steps, restarts, square)
    names = {attack.name for attack in own} | {"square"}
    for attack in attacks:
        if not isinstance(attack, PairAttack) or attack.name in names:
            raise InputError(
                f"attacks holds {getattr(attack, 'name', attack)!r}; expected PairAttack objects of different names, "
                f"none of them {', '.join(sorted(names))}."
            )
        names.add(attack.name)
    is_whole = (steps, restarts, square) == (STEPS, RESTARTS, QUERIES) and not attacks
    return "pairs-v1" if is_whole else "custom", (*own, *attacks)


def _note_rates(task: PairTask, rates: Iterable[float]) -> None:
    roc, impostors = task.scores.roc(), int((~task.same).sum())
    hidden = [f"{rate:g}" for rate in rates if roc.threshold_at(rate) is None]
    if hidden:
        task.notes.append(
            f"{impostors} impostor pairs show no false accept rate below {1 / impostors:.2g}; FAR {', '.join(hidden)} "
            "cannot be measured"
        )
