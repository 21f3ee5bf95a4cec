"""Signs that the measured robustness is too high: gradients that lead nowhere, and attacks that are too weak.

After Carlini et al., "On Evaluating Adversarial Robustness" (arXiv 1902.06705), Athalye et al., "Obfuscated Gradients
Give a False Sense of Security" (arXiv 1802.00420), and the flags of AutoAttack (Croce, Hein, arXiv 2003.01690).

Each check measures something on a sample of the queries that are right without attack, and knows what it finds on a
model that hides nothing. It raises a flag if what it found has a probability below one in a thousand on such a model.
If no flag is raised, none of these signs was found; this proves nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..attacks.ball import COUNTS, per_image, project, radius_text
from ..attacks.objective import Score
from ..attacks.pgd import MomentumPGD, uniform_noise
from ..training.isolation import random_stream
from .attacks.gradients import margin_score
from .attacks.square import square_attack
from .reports import binomial
from .reports.results import AttackResult, Check, decode_flags
from .retrieval.batch import SAMPLES, QueryBatch
from .retrieval.gallery import Gallery, Targets, finite_or_zero
from .retrieval.options import largest_radius
from .retrieval.task import RetrievalTask
from .runs.sharing import Ranks

SAMPLE = 64  #: Queries in the sample, at most.
SEARCH = 200  #: Forward passes of the black-box attack that is made if the suite has none.
PASSES = 551 + SEARCH  #: Image passes of all checks for each query of the sample, about; without a search, fewer.
STEPS = 40  #: Gradient steps of the attack that other attacks are compared with.
LARGE = 0.5  #: l-inf radius that can make every image the same grey.
NEAR = 8 / 255  #: Size of the steps that ask whether gradients are true, in l-inf, where eps is no size of all pixels.
SIGNIFICANCE = 1e-3  #: A flag is raised if what was found has a smaller probability on a model that hides nothing.
FEW = 0.01  #: Share of the queries on which an attack may get stuck although the model hides nothing.
MOST = 0.95  #: Share of the queries whose gradients lead to their goal if the model hides nothing.
_ENOUGH = 10  # fewer queries prove nothing: even ten tossed coins show ten heads once in a thousand times
_DRAWS = 10  # of noise, and of roundings
_SCALES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of eps


class Verdict(NamedTuple):
    """Whether a check passed (None: there is no evidence either way), and what it found, in one line."""

    passed: bool | None
    message: str


def run_checks(
    task: RetrievalTask,
    rows: Tensor,
    clean_flags: Tensor,
    results: Sequence[AttackResult],
    seed: int,
    batch_size: int,
    ranks: Ranks | None = None,
    begin: Callable[[str], object] = str,
) -> tuple[Check, ...]:
    """Makes all checks on the queries ``rows`` ``(Q,)`` of a task whose model is in eval mode and frozen.

    ``clean_flags`` ``(Q,)`` says whether their nearest items are right without attack, ``results`` what all attacks on
    them gave. Each check is made by one of the processes ``ranks``; ``begin`` is told its name before it runs.
    """
    if not results:
        return ()
    sample = QuerySample(task, rows, clean_flags, results, seed, batch_size)
    few = f"only {len(sample)} queries are right without attack; {_ENOUGH} are needed"
    cannot = "not asked: the model cannot be asked for gradients, and no attack of the suite needs them"
    black_box_only = not task.embed.takes_gradient and not sample.on_queries(black_box=False)

    def make(number: int) -> Check:
        name, (measure, catches) = list(CHECKS.items())[number]
        begin(name)
        return Check(name, *answered(measure), catches)

    def answered(measure: Callable[[QuerySample], Verdict]) -> Verdict:
        if measure in _OF_ANY_QUERIES and len(rows) >= _ENOUGH:
            return measure(QuerySample(task, rows, torch.ones_like(clean_flags), results, seed, batch_size))
        if len(sample) < _ENOUGH:
            return Verdict(None, few)
        if black_box_only and measure not in _WITHOUT_GRADIENT:
            return Verdict(None, cannot)
        return measure(sample)

    return tuple((Ranks() if ranks is None else ranks).share(range(len(CHECKS)), make))


def passes_of_checks(queries: int, is_random: bool = False) -> int:
    """Image passes of the checks, about, if all of some queries are right without attack."""
    return PASSES * min(SAMPLE, queries) * (SAMPLES if is_random else 1)


@dataclass(eq=False)
class QuerySample:
    """A sample of the queries that are right without attack, and what is measured on all of them; see `run_checks`.

    Attributes:
        num_right: how many queries are right without attack.
        chosen: ``(n,)`` which of ``rows`` are in the sample.
        batches: the sample, in batches.
        eps: of all radii of the results, the one at which closest to half of the queries are robust. There, comparisons
            of attacks tell most.
    """

    task: RetrievalTask
    rows: Tensor
    clean_flags: Tensor
    results: Sequence[AttackResult]
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        right = self.clean_flags.nonzero().squeeze(1)
        self.num_right = len(right)
        with random_stream(self.seed, _stream("sample")):
            self.chosen = right[torch.randperm(len(right))[:SAMPLE]].sort().values
        self.batches = self._batches(self.chosen)
        self.eps = min(self.radii, key=self._distance_from_half)

    def __len__(self) -> int:
        return len(self.chosen)

    def _distance_from_half(self, eps: float) -> tuple[float, float]:
        """Of radii at which equally many queries are robust, it is less at the larger one if these are most of them."""
        excess = int(self.robust(eps).sum()) - self.num_right / 2
        return abs(excess), -eps if excess > 0 else eps

    def _batches(self, chosen: Tensor) -> tuple[QueryBatch, ...]:
        rows = self.rows[chosen.to(self.rows.device)]
        return tuple(self.task.batch(part) for part in rows.split(self.batch_size) if len(part))

    @property
    def radii(self) -> list[float]:
        """All eps of the results, ascending."""
        return sorted({result.eps for result in self.results})

    def shown(self, eps: float) -> str:
        """An eps in words."""
        return radius_text(eps, self.task.norm)

    @cached_property
    def precision(self) -> float:
        """Relative rounding error of the type of the embeddings."""
        with torch.no_grad():
            return torch.finfo(self.task.embed(self.batches[0].images[:1]).dtype).eps

    @property
    def large(self) -> float:
        """Radius at which an attack can make every image the same grey."""
        shape = self.batches[0].images.shape[1:]
        if self.task.norm == "patch":
            return max(shape[-2:])  # a patch that is wider than an image covers it
        return largest_radius(self.task.norm, shape) * (1 if self.task.norm in COUNTS else LARGE)

    @property
    def radii_around(self) -> tuple[float, float, float]:
        """Half of eps, eps, and twice eps: where eps counts, in whole numbers; none is wider than an image."""
        half = max(1, self.eps // 2) if self.task.norm in COUNTS else self.eps / 2
        largest = largest_radius(self.task.norm, self.batches[0].images.shape[1:])
        return half, self.eps, min(2 * self.eps, largest)

    def on_queries(self, black_box: bool) -> list[AttackResult]:
        """The results of attacks on queries: of the black-box ones, or of the others."""
        return [result for result in self.results if result.target == "query" and result.black_box == black_box]

    def robust(self, eps: float, *black_box: bool) -> Tensor:
        """``(Q,)`` bool: queries that no attack on queries broke, of both kinds or of one, see `on_queries`."""
        flags = torch.ones(len(self.results[0].robust_flags), dtype=torch.bool)
        for result in (result for kind in black_box or (True, False) for result in self.on_queries(kind)):
            if result.eps == eps:
                flags &= decode_flags(result.robust_flags)
        return flags

    def measure(self, on_batch: Callable[[QueryBatch], Tensor], stream: str, chosen: Tensor | None = None) -> Tensor:
        """What a function of a batch gives, joined over all batches; it draws from a random stream of its own.

        ``chosen`` says of which of ``rows`` ``(n,)`` there are to be batches; None: the sample.
        """
        batches = self.batches if chosen is None else self._batches(chosen)
        with random_stream(self.seed, _stream(stream)):
            return torch.cat([on_batch(batch) for batch in batches]).cpu()

    def broken(self, eps: float, steps: int, stream: str) -> Tensor:
        """``(n,)`` bool: queries on which one run of the margin attack succeeds."""
        return self.measure(lambda batch: is_adversarial(batch, margin_attack(batch, eps, steps)), f"{stream} {eps}")

    @cached_property
    def attacked(self) -> Tensor:
        """``(n,)`` bool: queries on which the attack succeeds that other attacks are compared with."""
        return self.broken(self.eps, STEPS, "attack")


def margin_attack(batch: QueryBatch, eps: float, steps: int, random_start: bool = True) -> Tensor:
    """Queries ``(Q, C, H, W)`` that one run of the margin attack perturbed."""
    objective = batch.objective(margin_score(batch, 0))
    return MomentumPGD(objective, eps, steps, batch.norm, random_start=random_start)(batch.images, objective.labels)


def is_adversarial(batch: QueryBatch, images: Tensor) -> Tensor:
    """``(Q,)`` bool: whether the nearest item of a perturbed query is wrong."""
    with torch.no_grad():
        return batch.gallery.ranking(batch.embed(images), batch.targets, 1).margin >= 0


# Is the attack strong enough?


def beats_a_single_step(sample: QuerySample) -> Verdict:
    """Iterative attacks are stronger than single-step ones (Carlini et al.)."""
    single = sample.measure(
        lambda batch: is_adversarial(batch, margin_attack(batch, sample.eps, 1, random_start=False)), "single"
    )
    return compared(sample.attacked, f"{STEPS} steps", single, "one step", sample.shown(sample.eps))


def beats_noise(sample: QuerySample) -> Verdict:
    """Random noise is weaker than an attack (Carlini et al.)."""

    def best_of_draws(batch: QueryBatch) -> Tensor:
        return torch.stack([is_adversarial(batch, at_the_border(batch, sample.eps)) for _ in range(_DRAWS)]).any(0)

    noise = sample.measure(best_of_draws, "noise")
    best = f"the best of {_DRAWS} draws of noise"
    return compared(sample.attacked, f"{STEPS} steps", noise, best, sample.shown(sample.eps))


def gains_by_steps(sample: QuerySample) -> Verdict:
    """More steps are no weaker (Carlini et al.)."""
    few = sample.broken(sample.eps, STEPS // 4, "few")
    return compared(sample.attacked, f"{STEPS} steps", few, f"{STEPS // 4} steps", sample.shown(sample.eps))


def gains_by_eps(sample: QuerySample) -> Verdict:
    """A larger eps is no weaker (Carlini et al.), in independent runs."""
    radii = sample.radii_around
    runs = [sample.broken(eps, STEPS // 2, "eps") for eps in radii]
    counts = ", ".join(f"{int(run.sum())} at eps {sample.shown(eps)}" for run, eps in zip(runs, radii, strict=True))
    passed = no_weaker(runs[1], runs[0]) and no_weaker(runs[2], runs[1])
    is_any_broken = any(run.any() for run in runs)
    return Verdict(passed if is_any_broken else None, f"of {len(sample)} queries {STEPS // 2} steps break {counts}")


def has_converged(sample: QuerySample) -> Verdict:
    """More steps and another start find nothing new (Carlini et al.): one longer run is no stronger than the suite."""
    suite = ~sample.robust(sample.eps)[sample.chosen]
    longer = sample.broken(sample.eps, 2 * STEPS, "longer")
    return compared(suite, "the suite", longer, f"one more run of {2 * STEPS} steps", sample.shown(sample.eps))


def falls_to_chance(sample: QuerySample) -> Verdict:
    """Unbounded attacks succeed on every query (Carlini et al.); here, attacks that can make all queries equal."""
    eps = max(sample.eps, sample.large)
    robust = int((~sample.broken(eps, STEPS, "large")).sum())
    chance = sample.measure(lambda batch: batch.gallery.chance(batch.targets), "chance").mean().item()
    passed = plausible(robust, len(sample), min(max(chance, FEW), 1 - MOST))
    message = f"{robust} of {len(sample)} are robust at eps {sample.shown(eps)}; chance is {chance * len(sample):.1f}"
    return Verdict(passed, message)


def black_box_adds_nothing(sample: QuerySample) -> Verdict:
    """Black-box attacks are no stronger than white-box ones (Athalye et al.)."""
    if not sample.on_queries(black_box=False):
        return Verdict(None, "the suite has no white-box attack on queries")
    if not sample.on_queries(black_box=True):
        return _search_adds_nothing(sample)
    found = []
    for eps in sample.radii:
        only = int((sample.robust(eps, False) & ~sample.robust(eps, True)).sum())
        broken = f"{only} of {sample.num_right} queries are broken"
        message = f"{broken} by black-box attacks alone, at eps {sample.shown(eps)}"
        found.append((binomial.tail(only, sample.num_right, FEW), message))
    probability, message = min(found)
    is_any_broken = any((~sample.robust(eps)[sample.chosen]).any() for eps in sample.radii)
    return Verdict(probability >= SIGNIFICANCE if is_any_broken else None, message)


def _search_adds_nothing(sample: QuerySample) -> Verdict:
    """The same for a suite without a black-box attack: Square is tried on the queries that it leaves."""
    left = sample.chosen[sample.robust(sample.eps)[sample.chosen]]

    def searched(batch: QueryBatch) -> Tensor:
        return is_adversarial(batch, square_attack(margin_score, SEARCH)(batch, sample.eps, 0))

    only = int(sample.measure(searched, "search", left).sum()) if len(left) else 0
    is_any_broken = only > 0 or len(left) < len(sample)
    return Verdict(
        plausible(only, len(sample), FEW) if is_any_broken else None,
        f"{only} of {len(sample)} queries are broken by Square with {SEARCH} passes alone, at eps "
        f"{sample.shown(sample.eps)}",
    )


def finds_what_is_planted(sample: QuerySample) -> Verdict:
    """An attack finds an adversarial example that exists by construction: a wrong item within eps of the query."""
    found = sample.measure(partial(_planted, eps=sample.eps), "planted")
    planted, reached, eps = int((found >= 0).sum()), int((found > 0).sum()), sample.shown(sample.eps)
    if planted < _ENOUGH:
        return Verdict(None, f"only {planted} of {len(sample)} points at eps {eps} differ from the query")
    passed = plausible(planted - reached, planted, 1 - MOST)
    return Verdict(passed, f"{reached} of {planted} wrong items planted within eps {eps} are found")


# Do gradients lead to where the score is higher?


def has_gradients(sample: QuerySample) -> Verdict:
    """Gradients are not zero (AutoAttack), and pixels without gradient hardly matter.

    A query is blind to noise if pixels whose gradient is zero account for most of what the noise does to its embedding.
    """
    near_eps, far_eps = sample.eps, max(sample.eps, sample.large)
    found = sample.measure(partial(_blindness, eps=near_eps, radii=(near_eps, far_eps)), "gradients")
    zero, near, far = (int(count) for count in found[:, :3].sum(0))
    passed = plausible(zero, len(sample), FEW) and plausible(max(near, far), len(sample), 1 - MOST)
    return Verdict(
        passed,
        f"{zero} of {len(sample)} queries have no gradient; {near} are blind to noise of eps "
        f"{sample.shown(near_eps)}, {far} to noise of {sample.shown(far_eps)}; "
        f"{100 * found[:, 3].mean().item():.0f} % of pixels have no gradient",
    )


def gradients_are_true(sample: QuerySample) -> Verdict:
    """A step along the gradient raises the score (Athalye et al.), at every scale up to eps."""
    is_wide = sample.task.norm in ("Linf", "L2")  # else eps allows large changes of few pixels
    size, unit = (sample.eps, "") if is_wide else (NEAR, " in l-inf")
    rises = sample.measure(partial(_rises, eps=sample.eps, size=size), "rises")
    found = []
    for scale, rise in zip(_SCALES, rises.T, strict=True):
        changed, raised = int((~rise.isnan()).sum()), int((rise > 0).sum())
        step = f"a step of {scale * size:.2g}{unit} along the gradient"
        message = f"{step} raises the score of {raised} of {changed} queries"
        if changed >= _ENOUGH:
            found.append((binomial.tail(changed - raised, changed, 1 - MOST), message))
    if not found:
        return Verdict(None, f"steps along the gradient change nothing for most of {len(sample)} queries")
    probability, message = min(found)
    return Verdict(probability >= SIGNIFICANCE, message)


# Can the embeddings be compared at all?


def answers_alike(sample: QuerySample) -> Verdict:
    """The model is not random (AutoAttack), and no embedding depends on the other images of its batch."""
    again, elsewhere = sample.measure(_differences, "alike").amax(0).tolist()
    embeddings = sample.task.distance.query_vectors(sample.task.gallery.embeddings)
    spread = (embeddings - embeddings.mean(0)).square().sum(1).mean().sqrt().item()
    size = embeddings.square().sum(1).mean().sqrt().item()
    return Verdict(
        max(again, elsewhere) <= 0.01 * spread + 8 * sample.precision * size,
        f"embeddings differ by up to {again:.2g} in a second call, {elsewhere:.2g} in another batch; their spread is "
        f"{spread:.2g}",
    )


def is_not_collapsed(sample: QuerySample) -> Verdict:
    """Rounding errors do not decide rankings."""
    found = sample.measure(partial(_decided, precision=sample.precision), "decided")
    margins = found[:, 0].abs()
    undecided = int((margins <= found[:, 1]).sum())
    median = margins.median().item()
    passed = plausible(undecided, len(sample), 1 - MOST)
    message = f"rounding may decide {undecided} of {len(sample)}; the median margin is {median:.2g}"
    return Verdict(passed, message)


def finds_no_copies(sample: QuerySample) -> Verdict:
    """The gallery holds no copies of the queries: each finds its copy, whatever the model does."""
    copies = int(sample.task.in_gallery[sample.rows].sum())
    message = f"{copies} of {len(sample.rows)} queries may find their own image in the gallery"
    return Verdict(copies <= FEW * len(sample.rows), message)


def moves_embeddings(sample: QuerySample) -> Verdict:
    """Attacks change embeddings."""
    eps = sample.radii[-1]
    shift = max(result.shift for result in sample.results if result.eps == eps)
    return Verdict(shift > 0, f"the suite moves embeddings by up to {shift:.2g} on average at eps {sample.shown(eps)}")


class Question(NamedTuple):
    """A check: what makes it, and what makes it fail, in a sentence."""

    measure: Callable[[QuerySample], Verdict]
    catches: str


CHECKS: dict[str, Question] = {
    "iterating beats a single step": Question(
        beats_a_single_step, "Catches attacks that get lost: forty small steps should break as much as a large one."
    ),
    "attack beats noise": Question(
        beats_noise, "Catches gradients that lead nowhere: an attack should break no less than random noise."
    ),
    "more steps are no weaker": Question(gains_by_steps, "Catches attacks that get worse the longer they run."),
    "larger eps is no weaker": Question(gains_by_eps, "Catches attacks that get worse when they are allowed more."),
    "a longer run adds nothing": Question(
        has_converged, "Catches suites that stop too early: one more, longer run should break nothing new."
    ),
    "falls to chance at a large eps": Question(
        falls_to_chance, "Catches attacks that cannot break even what must break: all queries made the same grey."
    ),
    "black box adds nothing": Question(
        black_box_adds_nothing, "Catches hidden gradients: an attack that uses none should break nothing new."
    ),
    "planted examples are found": Question(
        finds_what_is_planted, "Catches attacks that miss a perturbation which is known to exist."
    ),
    "gradients are there": Question(has_gradients, "Catches parts of the model that let no gradient through."),
    "gradients are true": Question(
        gradients_are_true, "Catches gradients that point the wrong way: a small step along them should help."
    ),
    "same answer twice": Question(
        answers_alike, "Catches models that answer at random, or that look at the whole batch."
    ),
    "not collapsed": Question(
        is_not_collapsed, "Catches embeddings so close together that rounding decides who is nearest."
    ),
    "attacks move embeddings": Question(moves_embeddings, "Catches attacks that change nothing at all."),
    "no copies in the gallery": Question(
        finds_no_copies, "Catches galleries that hold the queries' own images, which are found whatever the model does."
    ),
}
"""What should hold -> the check that measures it."""

_OF_ANY_QUERIES = (answers_alike, is_not_collapsed, moves_embeddings, finds_no_copies)  # also those that are wrong
_WITHOUT_GRADIENT = (black_box_adds_nothing, *_OF_ANY_QUERIES)


# Which numbers are plausible of a model that hides nothing.


def plausible(count: int, total: int, share: float) -> bool:
    """Whether ``count`` of ``total`` or more are plausible if each has a probability of at most ``share``."""
    return binomial.tail(count, total, share) >= SIGNIFICANCE


def no_weaker(strong: Tensor, weak: Tensor) -> bool:
    """Whether an attack seems no weaker than another, by a sign test on the queries that only one of them breaks."""
    alone = int((weak & ~strong).sum())
    return plausible(alone, alone + int((strong & ~weak).sum()), 0.5)


def compared(strong: Tensor, strong_name: str, weak: Tensor, weak_name: str, eps: str) -> Verdict:
    """Whether an attack seems no weaker than another; no evidence if neither breaks anything."""
    return Verdict(
        no_weaker(strong, weak) if (strong | weak).any() else None,
        f"{strong_name}: {int(strong.sum())} of {len(strong)} broken, {weak_name}: {int(weak.sum())}, "
        f"{int((weak & ~strong).sum())} of them alone, at eps {eps}",
    )


# Measured on one batch.


def at_the_border(batch: QueryBatch, eps: float) -> Tensor:
    """Queries with random noise of the largest size that eps allows, ``(Q, C, H, W)``."""
    return project(batch.images + largest_noise(batch.images, eps, batch.norm), batch.images, eps, batch.norm)


def largest_noise(images: Tensor, eps: float, norm: str) -> Tensor:
    """Random noise ``(Q, C, H, W)`` of the largest size that eps allows."""
    noise = torch.randn_like(images)
    if norm in ("Linf", "L2"):
        return eps * _directed(noise, norm)
    return project(images + noise, images, eps, norm) - images


def _directed(direction: Tensor, norm: str) -> Tensor:
    """The point of the unit ball in l-inf or l2 that is furthest in a direction: in l-inf, a corner."""
    if norm == "Linf":
        return direction.sign()
    length = direction.flatten(1).norm(dim=1).clamp(min=torch.finfo(direction.dtype).tiny)
    return direction / per_image(length, direction)


def _embed(batch: QueryBatch, images: Tensor) -> Tensor:
    """Embeddings ``(Q, D)`` as they are compared. A model that draws random numbers draws the same ones each time."""
    with random_stream(0, 0):
        return _vectors(batch, batch.embed(images))


def _vectors(batch: QueryBatch, embeddings: Tensor) -> Tensor:
    return batch.gallery.distance.query_vectors(finite_or_zero(embeddings))


def _random_point(batch: QueryBatch, eps: float) -> tuple[Tensor, Tensor]:
    """A random point of each ball, since clean images are often at special values such as black; and its embedding."""
    point = project(batch.images + uniform_noise(batch.images, eps, batch.norm), batch.images, eps, batch.norm)
    with torch.no_grad():
        return point, _embed(batch, point)


def _lead(batch: QueryBatch, embeddings: Tensor) -> Score:
    """How much nearer the wrong item is than the right one; both are those that are nearest to ``embeddings``."""
    wrong, right = batch.gallery.hardest(embeddings, batch.targets)
    return lambda moved: batch.gallery.lead(moved, wrong, right)


def _gradient(batch: QueryBatch, images: Tensor, score: Score) -> Tensor:
    """Gradient of a score of the embeddings with respect to the pixels; 0 where it is not finite."""
    pixels = images.detach().clone().requires_grad_()
    value = score(_embed(batch, pixels)).sum()
    return torch.autograd.grad(value, pixels)[0].nan_to_num(0.0, 0.0, 0.0)


def _planted(batch: QueryBatch, eps: float) -> Tensor:
    """``(Q,)`` 1 if an attack finds the planted item, 0 if not, -1 if that item is as near as the query itself.

    The gallery holds each query as its right item, and a point at distance eps from each query as a wrong item.
    """
    with torch.no_grad():
        embeddings = torch.cat([batch.embed(batch.images), batch.embed(at_the_border(batch, eps))])
    items = torch.arange(len(embeddings), device=embeddings.device)
    gallery, queries = Gallery(embeddings, items, distance=batch.gallery.distance), items[: len(batch)]
    targets = Targets(queries, torch.full_like(queries, -1))
    planted = replace(batch, gallery=gallery, clean=embeddings[queries], targets=targets)
    differs = gallery.ranking(planted.clean, targets, 1).margin < 0
    reached = is_adversarial(planted, margin_attack(planted, eps, STEPS // 2))
    return torch.where(differs, reached.float(), -1.0)


def _blindness(batch: QueryBatch, eps: float, radii: Sequence[float]) -> Tensor:
    """``(Q, 4)``: has no gradient; is blind to noise of each of two radii; share of pixels without gradient."""
    point, before = _random_point(batch, eps)
    none = _gradient(batch, point, _lead(batch, before)) == 0
    columns = [none.flatten(1).all(1).float()]
    for radius in radii:
        noise = largest_noise(point, radius, batch.norm)
        moved, blindly = ((_after(batch, point, s) - before).square().sum(1) for s in (noise, noise * none))
        columns.append((blindly > moved / 2).float())
    return torch.stack([*columns, none.flatten(1).float().mean(1)], 1)


def _rises(batch: QueryBatch, eps: float, size: float) -> Tensor:
    """``(Q, S)`` how much steps of each scale of ``size`` along the gradient raise the margin; NaN where still."""
    point, before = _random_point(batch, eps)
    lead = _lead(batch, before)
    norm = "L2" if batch.norm == "L2" else "Linf"
    direction = _directed(_gradient(batch, point, lead).sign(), norm)  # else, in l2, a few pixels would decide
    moved = [_after(batch, point, scale * size * direction) for scale in _SCALES]
    still = [(after == before).all(1) for after in moved]
    return torch.stack(
        [(lead(m) - lead(before)).masked_fill(s, torch.nan) for m, s in zip(moved, still, strict=True)], 1
    )


@torch.no_grad()
def _after(batch: QueryBatch, point: Tensor, step: Tensor) -> Tensor:
    """``(Q, D)`` embeddings after a step."""
    return _embed(batch, (point + step).clamp(0, 1))


def _differences(batch: QueryBatch) -> Tensor:
    """``(Q, 2)`` distance of embeddings from those of a second call, and from those of other, reversed batches."""
    back = torch.arange(len(batch)).flip(0)
    with torch.no_grad():
        first, again = (_vectors(batch, batch.embed(batch.images)) for _ in range(2))
        halves = [_vectors(batch, batch.embed(batch.images[rows])) for rows in back.tensor_split(2) if len(rows)]
    return torch.stack([(again - first).norm(dim=1), (torch.cat(halves)[back] - first).norm(dim=1)], 1)


def _decided(batch: QueryBatch, precision: float) -> Tensor:
    """``(Q, 2)`` by how much the right item is nearer, and how much of that rounding may change."""
    wrong, right = batch.gallery.hardest(batch.clean, batch.targets)
    vectors = torch.stack(
        [_vectors(batch, batch.clean), *(batch.gallery.embeddings[items] for items in (right, wrong))]
    )
    similarity = batch.gallery.distance.to_each

    def margin(query: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
        return similarity(query, right) - similarity(query, wrong)

    exact = margin(*vectors)
    rounded = [margin(*(vectors * (1 + precision * (torch.rand_like(vectors) - 0.5)))) for _ in range(_DRAWS)]
    change = (torch.stack(rounded) - exact).abs().amax(0)
    size = batch.gallery.distance.scale(batch.gallery.embeddings)
    return torch.stack([exact, change.clamp(min=8 * torch.finfo(exact.dtype).eps * size)], 1)


def _stream(name: str) -> int:
    return zlib.crc32(f"check: {name}".encode())
