"""Whether the number is to be believed: signs of masked gradients and of attacks that are too weak.

After Carlini et al., "On Evaluating Adversarial Robustness" (arXiv 1902.06705), Athalye et al., "Obfuscated Gradients
Give a False Sense of Security" (arXiv 1802.00420), and the flags of AutoAttack (Croce, Hein, arXiv 2003.01690).

Every check asks something of the model that an honest one answers, on a sample of the queries that are right without
attack. A flag needs evidence: of an honest model, what was seen is less likely than one in a thousand. No flag is no
proof: it means that none of these signs was found.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..attacks.ball import per_image, projected, uniform_start
from ..attacks.pgd import MomentumPGD
from ..training.isolation import random_stream
from .attacks import QueryBatch
from .gallery import Gallery, Targets, chunks, unit
from .report import AttackResult, Check
from .run import marked
from .suites import toward_nearest_wrong
from .task import RetrievalTask

SAMPLE = 64
"""Queries that are asked, at most."""

STEPS = 40
"""Gradient steps of the attack that others are compared with."""

LARGE = 0.5
"""l-inf radius at which every image can be made the same grey; for "L2" times the root of the number of pixels."""

UNLIKELY = 1e-3
"""Probability, of an honest model, below which what was seen is flagged."""

FEW = 0.01
"""Share of the queries at which an attack on an honest model may be stuck."""

MOST = 0.95
"""Share of the queries for which the gradients of an honest model lead to what is there."""

_ENOUGH = 10  # of fewer queries nothing is evidence: ten coins fall alike once in a thousand times
_DRAWS = 10  # of noise, and of roundings
_SCALES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of eps


class Finding(NamedTuple):
    """Whether a check passed, None if it could not be asked, and what was found in one line."""

    passed: bool | None
    line: str


def run_checks(
    task: RetrievalTask, rows: Tensor, clean_standing: str, results: Sequence[AttackResult], seed: int, chunk: int
) -> tuple[Check, ...]:
    """Asks for every sign of a false claim, at the cost of about 260 gradients for each of `SAMPLE` queries.

    Args:
        task: what was evaluated, in eval mode and frozen.
        rows: ``(Q,)`` the queries.
        clean_standing: one character per query, "1" if R@1 held without attack.
        results: what was measured of them.
        seed: of all random choices.
        chunk: queries that are asked together.
    """
    if not results:
        return ()
    probe = Probe(task, rows, clean_standing, results, seed, chunk)
    return tuple(Check(name, *_ask(question, probe)) for name, question in CHECKS.items())


class Probe:
    """A sample of the queries that are right without attack, and what is asked of all of them.

    Args:
        task: see `run_checks`, also for the others.
        rows: ``(Q,)``.
        clean_standing: Q characters.
        results: one or more.
        seed: of the sample and of all attacks.
        chunk: queries per batch.

    Attributes:
        num_right: how many are right without attack.
        picked: ``(n,)`` which of ``rows`` they are.
        scenes: they, at most ``chunk`` in each.
        eps: the radius at which the suite left closest to half of what it met: there, comparisons tell most.
    """

    def __init__(
        self,
        task: RetrievalTask,
        rows: Tensor,
        clean_standing: str,
        results: Sequence[AttackResult],
        seed: int,
        chunk: int,
    ) -> None:
        self.task, self.results, self.seed = task, results, seed
        right = marked(clean_standing).nonzero().squeeze(1)
        self.num_right = len(right)
        with random_stream(seed, _stream("sample")):
            self.picked = right[torch.randperm(len(right))[:SAMPLE]].sort().values
        chosen = rows[self.picked.to(rows.device)]
        self.scenes = tuple(task.batch(chosen[piece]) for piece in chunks(len(chosen), chunk))
        self.eps = min(self.radii, key=lambda eps: abs(int(self.standing(eps).sum()) - self.num_right / 2))

    def __len__(self) -> int:
        return len(self.picked)

    @property
    def radii(self) -> list[float]:
        """What the suite was run at, from small to large."""
        return sorted({result.eps for result in self.results})

    @cached_property
    def precision(self) -> float:
        """Relative rounding of the type that embeddings come in."""
        with torch.no_grad():
            return torch.finfo(self.task.embed(self.scenes[0].images[:1]).dtype).eps

    @property
    def large(self) -> float:
        """Radius at which every image can be made the same grey."""
        return LARGE if self.task.norm == "Linf" else LARGE * math.sqrt(self.scenes[0].images[0].numel())

    def on_queries(self, black_box: bool) -> list[AttackResult]:
        """What attacks on queries left, black-box ones or the others."""
        return [result for result in self.results if result.target == "query" and result.black_box == black_box]

    def standing(self, eps: float, *black_box: bool) -> Tensor:
        """``(Q,)`` bool: queries that stand against the attacks on them, of both kinds or of one."""
        chosen = [result for kind in black_box or (True, False) for result in self.on_queries(kind)]
        left = torch.ones(len(self.results[0].standing), dtype=torch.bool)
        for result in chosen:
            if result.eps == eps:
                left &= marked(result.standing)
        return left

    def each(self, ask: Callable[[QueryBatch], Tensor], stream: str) -> Tensor:
        """What is asked of every batch, joined, with random numbers of its own."""
        with random_stream(self.seed, _stream(stream)):
            return torch.cat([ask(batch) for batch in self.scenes]).cpu()

    def broken(self, eps: float, steps: int, stream: str) -> Tensor:
        """``(n,)`` bool: queries that one run of the margin attack breaks."""
        return self.each(lambda batch: breaks(batch, climb(batch, eps, steps)), f"{stream} {eps}")

    @cached_property
    def attacked(self) -> Tensor:
        """``(n,)`` bool: queries that the attack breaks that others are compared with."""
        return self.broken(self.eps, STEPS, "attack")


def climb(batch: QueryBatch, eps: float, steps: int, random_start: bool = True) -> Tensor:
    """Perturbed queries of one run of the margin attack."""
    objective = batch.objective(toward_nearest_wrong(batch, 0))
    return MomentumPGD(objective, eps, steps, batch.norm, random_start=random_start)(batch.images, objective.labels)


def breaks(batch: QueryBatch, images: Tensor) -> Tensor:
    """``(Q,)`` bool: whether perturbed queries find a wrong item first."""
    with torch.no_grad():
        return batch.gallery.ranking(batch.embed(images), batch.targets, 1).margin >= 0


# Is the attack as strong as it should be?


def beats_a_single_step(probe: Probe) -> Finding:
    """Iterative attacks are stronger than single-step ones (Carlini et al.)."""
    single = probe.each(lambda batch: breaks(batch, climb(batch, probe.eps, 1, random_start=False)), "single")
    return _compared(probe.attacked, f"{STEPS} steps", single, "one step", probe.eps)


def beats_noise(probe: Probe) -> Finding:
    """Random noise is weaker than an attack (Carlini et al.)."""

    def best_of_draws(batch: QueryBatch) -> Tensor:
        return torch.stack([breaks(batch, at_the_border(batch, probe.eps)) for _ in range(_DRAWS)]).any(0)

    noise = probe.each(best_of_draws, "noise")
    return _compared(probe.attacked, f"{STEPS} steps", noise, f"the best of {_DRAWS} noises", probe.eps)


def gains_by_steps(probe: Probe) -> Finding:
    """More steps are no weaker (Carlini et al.)."""
    few = probe.broken(probe.eps, STEPS // 4, "few")
    return _compared(probe.attacked, f"{STEPS} steps", few, f"{STEPS // 4} steps", probe.eps)


def gains_by_eps(probe: Probe) -> Finding:
    """A larger eps is no weaker (Carlini et al.), in runs that know nothing of one another."""
    radii = (probe.eps / 2, probe.eps, 2 * probe.eps)
    runs = [probe.broken(eps, STEPS // 2, "eps") for eps in radii]
    counts = ", ".join(f"{int(run.sum())} at eps {eps:.4g}" for run, eps in zip(runs, radii, strict=True))
    passed = no_weaker(runs[1], runs[0]) and no_weaker(runs[2], runs[1])
    return Finding(passed, f"of {len(probe)} queries {STEPS // 2} steps break {counts}")


def has_converged(probe: Probe) -> Finding:
    """More steps and another start find nothing new (Carlini et al.): one run does not break more than the suite."""
    suite = ~probe.standing(probe.eps)[probe.picked]
    longer = probe.broken(probe.eps, 2 * STEPS, "longer")
    return _compared(suite, "the suite", longer, f"one more run of {2 * STEPS} steps", probe.eps)


def falls_to_chance(probe: Probe) -> Finding:
    """Unbounded attacks reach 0 (Carlini et al.); here, where every query can be made the same."""
    eps = max(probe.eps, probe.large)
    standing = int((~probe.broken(eps, STEPS, "large")).sum())
    others = len(probe.task.gallery) - probe.task.leave_one_out
    chance = probe.each(lambda part: part.gallery.num_right(part.targets) / others, "chance").mean().item()
    passed = likely(standing, len(probe), min(max(chance, FEW), 1 - MOST))
    return Finding(passed, f"{standing} of {len(probe)} stand at eps {eps:.4g}, chance is {chance * len(probe):.1f}")


def black_box_adds_nothing(probe: Probe) -> Finding:
    """Black-box attacks are no stronger than white-box ones (Athalye et al.)."""
    for black_box, kind in ((True, "black-box"), (False, "white-box")):
        if not probe.on_queries(black_box):
            return Finding(None, f"the suite has no {kind} attack on queries")
    found = []
    for eps in probe.radii:
        only = int((probe.standing(eps, False) & ~probe.standing(eps, True)).sum())
        line = f"{only} of {probe.num_right} queries stand against gradients and not without them, at eps {eps:.4g}"
        found.append((at_least(only, probe.num_right, FEW), line))
    likelihood, line = min(found)
    return Finding(likelihood >= UNLIKELY, line)


def finds_what_is_planted(probe: Probe) -> Finding:
    """An example that is there by construction is found: a point of the query's own ball is a wrong item."""
    found = probe.each(partial(_planted, eps=probe.eps), "planted")
    asked, reached = int((found >= 0).sum()), int((found > 0).sum())
    if asked < _ENOUGH:
        return Finding(
            None, f"{asked} of {len(probe)} points at the border of eps {probe.eps:.4g} differ from the query"
        )
    passed = likely(asked - reached, asked, 1 - MOST)
    return Finding(passed, f"{reached} of {asked} wrong items planted within eps {probe.eps:.4g} are reached")


# Are gradients what they should be?


def has_gradients(probe: Probe) -> Finding:
    """Gradients are not zero (AutoAttack), and what has none does not matter.

    A query is blind if most of what noise does to its embedding comes through pixels whose gradient is zero.
    """
    near_eps, far_eps = probe.eps, max(probe.eps, probe.large)
    found = probe.each(partial(_blindness, eps=near_eps, radii=(near_eps, far_eps)), "gradients")
    zero, near, far = (int(count) for count in found[:, :3].sum(0))
    passed = likely(zero, len(probe), FEW) and likely(max(near, far), len(probe), 1 - MOST)
    return Finding(
        passed,
        f"{zero} of {len(probe)} queries have none; {near} are blind to noise of eps {near_eps:.4g}, {far} of "
        f"{far_eps:.4g}; {100 * found[:, 3].mean().item():.0f} % of pixels have none",
    )


def gradients_are_true(probe: Probe) -> Finding:
    """A step along the gradient raises the score (Athalye et al.), at every scale up to eps."""
    rises = probe.each(partial(_rises, eps=probe.eps), "rises")
    found = []
    for scale, rise in zip(_SCALES, rises.T, strict=True):
        asked, count = int((~rise.isnan()).sum()), int((rise > 0).sum())
        line = f"a step of {scale * probe.eps:.2g} along the gradient raises the score of {count} of {asked} queries"
        if asked >= _ENOUGH:
            found.append((at_least(asked - count, asked, 1 - MOST), line))
    if not found:
        return Finding(None, f"steps along the gradient change nothing for most of {len(probe)} queries")
    likelihood, line = min(found)
    return Finding(likelihood >= UNLIKELY, line)


# Does the model answer at all?


def answers_alike(probe: Probe) -> Finding:
    """Nothing is random (AutoAttack), and an embedding does not depend on the rest of its batch."""
    again, elsewhere = probe.each(_differences, "alike").amax(0).tolist()
    embeddings = probe.task.gallery.embeddings
    spread = (embeddings - embeddings.mean(0)).square().sum(1).mean().sqrt().item()
    return Finding(
        max(again, elsewhere) <= 0.01 * spread + 8 * probe.precision,
        f"embeddings differ by up to {again:.2g} when asked again, {elsewhere:.2g} in other batches; they spread by "
        f"{spread:.2g}",
    )


def is_not_collapsed(probe: Probe) -> Finding:
    """Rankings are not decided by rounding."""
    found = probe.each(partial(_decided, precision=probe.precision), "decided")
    undecided = int((found[:, 0] <= found[:, 1]).sum())
    median = found[:, 0].median().item()
    passed = likely(undecided, len(probe), 1 - MOST)
    return Finding(
        passed, f"rounding may decide {undecided} of {len(probe)}; the median margin in cosine is {median:.2g}"
    )


def moves_embeddings(probe: Probe) -> Finding:
    """Attacks change what the model sees."""
    eps = probe.radii[-1]
    shift = max(result.shift for result in probe.results if result.eps == eps)
    return Finding(shift > 0, f"the suite moves embeddings by up to {shift:.2g} on average at eps {eps:.4g}")


CHECKS: dict[str, Callable[[Probe], Finding]] = {
    "iterating beats a single step": beats_a_single_step,
    "attack beats noise": beats_noise,
    "more steps are no weaker": gains_by_steps,
    "larger eps is no weaker": gains_by_eps,
    "a longer run adds nothing": has_converged,
    "falls to chance at a large eps": falls_to_chance,
    "black box adds nothing": black_box_adds_nothing,
    "planted examples are found": finds_what_is_planted,
    "gradients are there": has_gradients,
    "gradients are true": gradients_are_true,
    "same answer twice": answers_alike,
    "not collapsed": is_not_collapsed,
    "attacks move embeddings": moves_embeddings,
}
"""Name of a check, which says what holds if it is passed -> how it is asked."""


def _ask(question: Callable[[Probe], Finding], probe: Probe) -> Finding:
    if len(probe) < _ENOUGH:
        return Finding(None, f"{len(probe)} queries are right without attack, {_ENOUGH} are needed")
    return question(probe)


# What is likely of an honest model.


def at_least(count: int, total: int, share: float) -> float:
    """Probability of ``count`` or more of ``total`` if each comes with probability ``share``, between 0 and 1.

    >>> round(at_least(10, 10, 0.5) * 2**10, 6)
    1.0
    """
    if count <= 0:
        return 1.0
    whole, yes, no = math.lgamma(total + 1), math.log(share), math.log1p(-share)
    terms = (
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * yes + (total - k) * no)
        for k in range(count, total + 1)
    )
    return min(1.0, math.fsum(terms))


def likely(count: int, total: int, share: float) -> bool:
    """Whether ``count`` of ``total`` may be, if each comes with probability ``share`` at most."""
    return at_least(count, total, share) >= UNLIKELY


def no_weaker(strong: Tensor, weak: Tensor) -> bool:
    """A sign test: of the queries that one of two attacks breaks alone, the weak one does not break too many."""
    alone = int((weak & ~strong).sum())
    return likely(alone, alone + int((strong & ~weak).sum()), 0.5)


def _compared(strong: Tensor, strong_name: str, weak: Tensor, weak_name: str, eps: float) -> Finding:
    return Finding(
        no_weaker(strong, weak),
        f"{strong_name}: {int(strong.sum())} of {len(strong)} broken, {weak_name}: {int(weak.sum())}, "
        f"{int((weak & ~strong).sum())} of them alone, at eps {eps:.4g}",
    )


# What is asked of one batch.


def at_the_border(batch: QueryBatch, eps: float) -> Tensor:
    """Queries with random noise as large as it may be: a corner of the ball for "Linf"."""
    return projected(
        batch.images + eps * _directed(torch.randn_like(batch.images), batch.norm), batch.images, eps, batch.norm
    )


def _directed(direction: Tensor, norm: str) -> Tensor:
    """The furthest point of the unit ball in a direction."""
    if norm == "Linf":
        return direction.sign()
    length = direction.flatten(1).norm(dim=1).clamp(min=torch.finfo(direction.dtype).tiny)
    return direction / per_image(length, direction)


def _embed(batch: QueryBatch, images: Tensor) -> Tensor:
    """Unit embeddings; a model that draws random numbers draws the same ones each time."""
    with random_stream(0, 0):
        return unit(batch.embed(images))


def _random_point(batch: QueryBatch, eps: float) -> Tensor:
    """Where attacks start: clean images are often at special values, such as 8-bit levels or black."""
    return projected(batch.images + eps * uniform_start(batch.images, batch.norm), batch.images, eps, batch.norm)


def _toward(batch: QueryBatch, embeddings: Tensor) -> Tensor:
    """``(Q, D)`` from the nearest right item to the nearest wrong one, so that the margin is the product with it."""
    wrong, right = batch.gallery.hardest(embeddings, batch.targets)
    return batch.gallery.embeddings[wrong] - batch.gallery.embeddings[right]


def _gradient(batch: QueryBatch, images: Tensor, toward: Tensor) -> Tensor:
    """Of the product of embeddings and ``toward``, with respect to the pixels; 0 where it is not finite."""
    pixels = images.detach().clone().requires_grad_()
    score = (_embed(batch, pixels) * toward).sum()
    return torch.autograd.grad(score, pixels)[0].nan_to_num(0.0, 0.0, 0.0)


def _planted(batch: QueryBatch, eps: float) -> Tensor:
    """``(Q,)`` 1 if a planted item is reached, 0 if not, -1 if it cannot be told from the query.

    The gallery holds every query itself, as the right item, and of every query a point at the border, as a wrong one.
    """
    with torch.no_grad():
        embeddings = torch.cat([batch.embed(batch.images), batch.embed(at_the_border(batch, eps))])
    items = torch.arange(len(embeddings), device=embeddings.device)
    gallery, queries = Gallery(embeddings, items), items[: len(batch)]
    targets = Targets(queries, torch.full_like(queries, -1))
    planted = replace(batch, gallery=gallery, clean=gallery.embeddings[queries], targets=targets)
    differs = gallery.ranking(planted.clean, targets, 1).margin < 0
    reached = breaks(planted, climb(planted, eps, STEPS // 2))
    return torch.where(differs, reached.float(), -1.0)


def _blindness(batch: QueryBatch, eps: float, radii: Sequence[float]) -> Tensor:
    """``(Q, 4)``: no gradient, blind to noise of two radii, and the share of pixels without gradient."""
    point = _random_point(batch, eps)
    with torch.no_grad():
        before = _embed(batch, point)
    none = _gradient(batch, point, _toward(batch, before)) == 0
    columns = [none.flatten(1).all(1).float()]
    for radius in radii:
        noise = radius * _directed(torch.randn_like(point), batch.norm)
        moved, blindly = (_moved(batch, point, before, part).square().sum(1) for part in (noise, noise * none))
        columns.append((blindly > moved / 2).float())
    return torch.stack([*columns, none.flatten(1).float().mean(1)], 1)


def _rises(batch: QueryBatch, eps: float) -> Tensor:
    """``(Q, S)`` how much steps of each scale along the gradient raise the margin; NaN where they change nothing."""
    point = _random_point(batch, eps)
    with torch.no_grad():
        before = _embed(batch, point)
    toward = _toward(batch, before)
    direction = _directed(_gradient(batch, point, toward).sign(), batch.norm)  # in l2, few steep pixels would decide
    moved = [_moved(batch, point, before, scale * eps * direction) for scale in _SCALES]
    return torch.stack([(by * toward).sum(1).masked_fill(~by.any(1), torch.nan) for by in moved], 1)


@torch.no_grad()
def _moved(batch: QueryBatch, point: Tensor, before: Tensor, step: Tensor) -> Tensor:
    """``(Q, D)`` by what a step moves the embeddings."""
    return _embed(batch, (point + step).clamp(0, 1)) - before


def _differences(batch: QueryBatch) -> Tensor:
    """``(Q, 2)`` how far embeddings are from those of a second call, and of calls with half of the batch in reverse."""
    back = torch.arange(len(batch)).flip(0)
    with torch.no_grad():
        first, again = (unit(batch.embed(batch.images)) for _ in range(2))
        halves = torch.cat([unit(batch.embed(batch.images[rows])) for rows in back.tensor_split(2) if len(rows)])
    return torch.stack([(again - first).norm(dim=1), (halves[back] - first).norm(dim=1)], 1)


def _decided(batch: QueryBatch, precision: float) -> Tensor:
    """``(Q, 2)`` by how much the right item is nearer, and how much rounding, of embeddings or cosines, may be."""
    wrong, right = batch.gallery.hardest(batch.clean, batch.targets)
    vectors = torch.stack([unit(batch.clean), batch.gallery.embeddings[right], batch.gallery.embeddings[wrong]])

    def margin(query: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
        return (query * (right - wrong)).sum(1)

    exact = margin(*vectors)
    rounded = [margin(*(vectors * (1 + precision * (torch.rand_like(vectors) - 0.5)))) for _ in range(_DRAWS)]
    change = (torch.stack(rounded) - exact).abs().amax(0)
    return torch.stack([exact, change.clamp(min=8 * torch.finfo(exact.dtype).eps)], 1)


def _stream(name: str) -> int:
    return zlib.crc32(f"check: {name}".encode())
