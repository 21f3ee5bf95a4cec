"""Whether the number is to be believed: signs of masked gradients and of attacks that are too weak.

After Carlini et al., "On Evaluating Adversarial Robustness" (arXiv 1902.06705), Athalye et al., "Obfuscated Gradients
Give a False Sense of Security" (arXiv 1802.00420), and the flags that AutoAttack raises (Croce, Hein, arXiv
2003.01690). Every check is a question to the model that an honest one answers, asked on a sample of the queries that are
right without attack. A flag needs evidence: what was seen would happen to an honest model by chance once in a thousand
times.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..isolation import random_stream
from .bench import Bench
from .report import AttackResult, Check
from .retrieval import Gallery, Sought, chunks, unit
from .suites import Scene, in_ball, like, momentum_pgd, toward_nearest_wrong, within

SAMPLE = 64
"""Queries that are asked."""

STEPS = 40
"""Gradient steps of the attack that the others are compared with."""

_CHANCE = 1e-3  # of a flag by bad luck, per question
_FEW = 0.01  # share of the queries at which an attack on an honest model may be stuck
_MOST = 0.9  # share of the queries for which gradients of an honest model lead to what is there
_ENOUGH = 10  # queries; of fewer, nothing would be evidence: ten coins fall alike once in a thousand times
_DRAWS = 10  # of random noise
_LARGE = 0.5  # eps at which every image can be made the same grey


class Finding(NamedTuple):
    """Whether a check passed, None if it could not be asked, and what was found in one line."""

    passed: bool | None
    line: str


def run_checks(
    bench: Bench, rows: Tensor, clean_standing: str, results: Sequence[AttackResult], seed: int, chunk: int
) -> tuple[Check, ...]:
    """Asks for every sign of a false claim, at the cost of about 200 gradients for each of `SAMPLE` queries.

    Args:
        bench: what was evaluated, in eval mode and frozen.
        rows: ``(Q,)`` the queries.
        clean_standing: one character per query, "1" if R@1 held without attack.
        results: what was measured of them.
        seed: of all random choices.
        chunk: queries that are asked together.
    """
    probe = Probe(bench, rows, clean_standing, results, seed, chunk)
    return tuple(Check(name, *_asked(ask, probe)) for name, ask in CHECKS.items())


class Probe:
    """A sample of the queries that are right without attack, and what is asked of them.

    Args:
        bench: see `run_checks`, also the others.
        rows: ``(Q,)``.
        clean_standing: Q characters.
        results: may be empty.
        seed: of the sample and of all attacks.
        chunk: queries per scene.

    Attributes:
        picked: ``(n,)`` which of ``rows`` they are.
        scenes: they, at most ``chunk`` in each.
        eps: the radius at which the attacks left closest to half of them: there, comparisons tell most.
    """

    def __init__(
        self, bench: Bench, rows: Tensor, clean_standing: str, results: Sequence[AttackResult], seed: int, chunk: int
    ) -> None:
        self.bench, self.results, self.seed = bench, results, seed
        right = _marked(clean_standing).nonzero().squeeze(1)
        with random_stream(seed, _stream("sample")):
            self.picked = right[torch.randperm(len(right))[:SAMPLE]].sort().values
        chosen = rows[self.picked.to(rows.device)]
        self.scenes = tuple(bench.scene(chosen[piece]) for piece in chunks(len(chosen), chunk))
        left = {eps: self.standing(eps, black_box=None).sum().item() for eps in sorted({r.eps for r in results})}
        self.eps = min(left, key=lambda eps: abs(left[eps] - len(right) / 2)) if left else math.nan

    def __len__(self) -> int:
        return len(self.picked)

    def standing(self, eps: float, black_box: bool | None) -> Tensor:
        """``(Q,)`` bool: queries that stand against the black-box attacks on them, the others, or (None) all."""
        chosen = [
            _marked(result.standing)
            for result in self.results
            if result.eps == eps and result.target == "query" and black_box in (None, result.black_box)
        ]
        count = len(self.results[0].standing)
        return torch.stack(chosen).all(0) if chosen else torch.ones(count, dtype=torch.bool)

    def each(self, ask: Callable[[Scene], Tensor], stream: str) -> Tensor:
        """What is asked of every scene, joined, with random numbers of its own."""
        with random_stream(self.seed, _stream(stream)):
            return torch.cat([ask(scene) for scene in self.scenes]).cpu()

    def broken(self, eps: float, steps: int, stream: str) -> Tensor:
        """``(n,)`` bool: queries that one run of the margin attack breaks."""
        return self.each(lambda scene: breaks(scene, climb(scene, eps, steps)), f"{stream} {eps} {steps}")

    @cached_property
    def attacked(self) -> Tensor:
        """``(n,)`` bool: queries that the attack breaks that others are compared with."""
        return self.broken(self.eps, STEPS, "attack")


def climb(scene: Scene, eps: float, steps: int, random_start: bool = True) -> Tensor:
    """Perturbed queries of the margin attack."""
    objective = scene.objective(toward_nearest_wrong(scene))
    return momentum_pgd(objective, eps, steps, scene.norm, random_start=random_start)(scene.images, objective.labels)


def breaks(scene: Scene, images: Tensor) -> Tensor:
    """``(Q,)`` bool: whether perturbed queries find a wrong item first."""
    with torch.no_grad():
        return scene.gallery.ranking(scene.embed(images), scene.sought, 1).margin >= 0


# What is asked.


def beats_a_single_step(probe: Probe) -> Finding:
    """Carlini et al.: iterative attacks are stronger than single-step ones."""
    single = probe.each(lambda scene: breaks(scene, climb(scene, probe.eps, 1, random_start=False)), "single")
    return _compared(probe.attacked, f"{STEPS} steps", single, "one step", probe.eps)


def beats_noise(probe: Probe) -> Finding:
    """Carlini et al.: random noise is weaker than an attack."""

    def best_of_draws(scene: Scene) -> Tensor:
        return torch.stack([breaks(scene, _noisy(scene, probe.eps)) for _ in range(_DRAWS)]).any(0)

    noise = probe.each(best_of_draws, "noise")
    return _compared(probe.attacked, f"{STEPS} steps", noise, f"the best of {_DRAWS} random corners", probe.eps)


def gains_by_steps(probe: Probe) -> Finding:
    """Carlini et al.: more steps are no weaker."""
    few = probe.broken(probe.eps, STEPS // 4, "few steps")
    return _compared(probe.attacked, f"{STEPS} steps", few, f"{STEPS // 4} steps", probe.eps)


def gains_by_eps(probe: Probe) -> Finding:
    """Carlini et al.: a larger eps is no weaker, in runs that know nothing of one another."""
    radii = (probe.eps / 2, probe.eps, 2 * probe.eps)
    runs = [probe.broken(eps, STEPS // 2, "eps") for eps in radii]
    found = [
        _compared(larger, f"eps {radius:.4g}", smaller, f"eps {before:.4g}", None)
        for larger, radius, smaller, before in zip(runs[1:], radii[1:], runs, radii, strict=False)
    ]
    counts = ", ".join(
        f"{int(run.sum())} of {len(probe)} at eps {eps:.4g}" for run, eps in zip(runs, radii, strict=True)
    )
    return Finding(all(part.passed for part in found), f"{STEPS // 2} steps break {counts}")


def suffices(probe: Probe) -> Finding:
    """Carlini et al.: the attack has converged; here, one longer run does not break more than the whole suite."""
    measured = ~probe.standing(probe.eps, black_box=None)[probe.picked]
    longer = probe.broken(probe.eps, 2 * STEPS, "longer")
    return _compared(measured, "the suite", longer, f"one run of {2 * STEPS} steps", probe.eps)


def falls_to_chance(probe: Probe) -> Finding:
    """Carlini et al.: unbounded attacks reach 0; here, at an eps at which every image can be made the same."""
    scene = probe.scenes[0]
    eps = _LARGE if scene.norm == "Linf" else _LARGE * math.sqrt(scene.images[0].numel())
    standing = int((~probe.broken(eps, STEPS, "large")).sum())
    others = len(probe.bench.gallery) - probe.bench.leave_one_out
    chance = probe.each(lambda scene: scene.gallery.num_right(scene.sought) / others, "chance").double().mean().item()
    passed = at_least(standing, len(probe), max(chance, _FEW)) >= _CHANCE
    return Finding(passed, f"{standing} of {len(probe)} stand at eps {eps:.4g}, chance is {chance * len(probe):.1f}")


def black_box_adds_nothing(probe: Probe) -> Finding:
    """Athalye et al.: black-box attacks are not stronger than white-box ones."""
    asked = {black: any(r.black_box == black and r.target == "query" for r in probe.results) for black in (True, False)}
    if not all(asked.values()):
        return Finding(None, f"the suite has no {'black' if asked[False] else 'white'}-box attack on queries")
    only, left = 0, 0
    for eps in sorted({result.eps for result in probe.results}):
        white, black = probe.standing(eps, black_box=False), probe.standing(eps, black_box=True)
        if only_here := int((white & ~black).sum()):
            only, left = max((only, left), (only_here, int(white.sum())))
    passed = at_least(only, left, _FEW) >= _CHANCE
    return Finding(passed, f"{only} of {left} queries that stand against gradients fall without them")


def has_gradients(probe: Probe) -> Finding:
    """AutoAttack: gradients are not zero; and pixels without gradient do not matter.

    A query is blind if its gradient is zero or not finite, or if most of what noise does to its embedding comes through
    pixels whose gradient is zero.
    """
    found = probe.each(partial(_blindness, eps=probe.eps), "gradients")
    blind, zero, pixels = found[:, 0].sum().item(), int(found[:, 1].sum()), found[:, 2].mean().item()
    passed = at_least(int(blind), len(probe), _FEW) >= _CHANCE
    return Finding(
        passed,
        f"{int(blind)} of {len(probe)} blind to what noise of eps {probe.eps:.4g} moves, {zero} without any gradient; "
        f"{100 * pixels:.0f} % of pixels have none",
    )


def gradients_are_true(probe: Probe) -> Finding:
    """A step along the gradient raises the score: gradients are those of the function, at the scale of eps."""
    rises = probe.each(partial(_rise, eps=probe.eps / 10), "rise")
    has_gradient = ~rises.isnan()
    if has_gradient.sum() < _ENOUGH:
        return Finding(None, f"{int(has_gradient.sum())} of {len(probe)} queries have a gradient")
    count, total = int((rises > 0).sum()), int(has_gradient.sum())
    passed = at_least(total - count, total, 1 - _MOST) >= _CHANCE
    return Finding(passed, f"a step of {probe.eps / 10:.4g} along the gradient raises the score of {count} of {total}")


def finds_what_is_planted(probe: Probe) -> Finding:
    """An example that is there by construction is found: a corner of the query's own ball is a wrong item."""
    found = probe.each(partial(_planted, eps=probe.eps), "planted")
    asked, broken = int((found >= 0).sum()), int((found > 0).sum())
    if asked < _ENOUGH:
        return Finding(
            None, f"{asked} of {len(probe)} corners of the ball of eps {probe.eps:.4g} differ from the query"
        )
    passed = at_least(asked - broken, asked, 1 - _MOST) >= _CHANCE
    return Finding(passed, f"{broken} of {asked} wrong items planted within eps {probe.eps:.4g} are reached")


def answers_alike(probe: Probe) -> Finding:
    """AutoAttack: no randomness; and an image's embedding does not depend on the others in its batch."""
    again = probe.each(lambda scene: _difference(scene, scene.images), "again").max().item()
    apart = probe.each(_differs_apart, "apart").max().item()
    embeddings = probe.bench.gallery.embeddings
    spread = (embeddings - embeddings.mean(0)).square().sum(1).mean().sqrt().item()
    precision = torch.finfo(probe.each(_raw_type, "type").dtype).eps
    allowed = 0.01 * spread + 8 * precision
    return Finding(
        max(again, apart) <= allowed,
        f"embeddings differ by up to {again:.2g} when asked again, {apart:.2g} in other batches; spread {spread:.2g}",
    )


def is_not_collapsed(probe: Probe) -> Finding:
    """Rankings are not decided by rounding."""
    margins = -probe.each(lambda scene: scene.gallery.margin(scene.clean, scene.sought), "margins")
    precision = torch.finfo(probe.each(_raw_type, "type").dtype).eps
    decided = margins.median().item()
    return Finding(decided > 8 * precision, f"right items are nearer by {decided:.2g} in cosine (median)")


def moves_embeddings(probe: Probe) -> Finding:
    """Attacks had an effect on what the model sees."""
    moved = {r.eps: 0.0 for r in probe.results}
    for result in probe.results:
        moved[result.eps] = max(moved[result.eps], result.shift)
    smallest = min(moved, key=lambda eps: moved[eps])
    return Finding(moved[smallest] > 0, f"the suite moves embeddings by {moved[smallest]:.2g} at eps {smallest:.4g}")


CHECKS: dict[str, Callable[[Probe], Finding]] = {
    "iterating beats a single step": beats_a_single_step,
    "attack beats noise": beats_noise,
    "more steps are no weaker": gains_by_steps,
    "larger eps is no weaker": gains_by_eps,
    "suite suffices": suffices,
    "falls to chance at a large eps": falls_to_chance,
    "black box adds nothing": black_box_adds_nothing,
    "gradients are there": has_gradients,
    "gradients are true": gradients_are_true,
    "planted examples are found": finds_what_is_planted,
    "same answer twice": answers_alike,
    "not collapsed": is_not_collapsed,
    "attacks move embeddings": moves_embeddings,
}
"""Name of a check -> how it is asked."""


def _asked(ask: Callable[[Probe], Finding], probe: Probe) -> Finding:
    if len(probe) < _ENOUGH:
        return Finding(None, f"{len(probe)} queries are right without attack, {_ENOUGH} are needed")
    return ask(probe)


def _compared(strong: Tensor, strong_name: str, weak: Tensor, weak_name: str, eps: float | None) -> Finding:
    """A sign test of paired answers: does the weak attack break more of the queries on which they differ."""
    only_weak, only_strong = int((weak & ~strong).sum()), int((strong & ~weak).sum())
    passed = at_least(only_weak, only_weak + only_strong, 0.5) >= _CHANCE
    at = "" if eps is None else f" at eps {eps:.4g}"
    return Finding(
        passed,
        f"{strong_name}: {int(strong.sum())} of {len(strong)} broken, {weak_name}: {int(weak.sum())} "
        f"({only_weak} only by it){at}",
    )


def at_least(count: int, total: int, share: float) -> float:
    """Probability of ``count`` or more of ``total`` if each comes with probability ``share``.

    >>> round(at_least(10, 10, 0.5) * 1024, 6)
    1.0
    """
    if count <= 0:
        return 1.0
    logs = [
        math.lgamma(total + 1)
        - math.lgamma(k + 1)
        - math.lgamma(total - k + 1)
        + k * math.log(share)
        + (total - k) * math.log1p(-share)
        for k in range(count, total + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def _noisy(scene: Scene, eps: float, images: Tensor | None = None, where: Tensor | None = None) -> Tensor:
    noise = torch.randn_like(scene.images)
    step = noise.sign() if scene.norm == "Linf" else noise / like(noise.flatten(1).norm(dim=1), noise)
    return within(scene.images + eps * step, scene.images, eps, scene.norm)


def _gradient(scene: Scene, images: Tensor) -> Tensor:
    """Of the margin, with respect to the pixels."""
    pixels = images.detach().clone().requires_grad_()
    score = toward_nearest_wrong(scene)(scene.embed(pixels)).sum()
    return torch.autograd.grad(score, pixels)[0]


def _blindness(scene: Scene, eps: float) -> Tensor:
    """``(Q, 3)``: whether a query is blind, whether its gradient is zero, and its share of pixels without."""
    point = within(scene.images + eps * in_ball(scene.images, scene.norm), scene.images, eps, scene.norm)
    gradient = _gradient(scene, point)
    none = (gradient == 0) | ~gradient.isfinite()
    step = eps * torch.randn_like(point).sign()
    moved, moved_blindly = _moved(scene, point, step), _moved(scene, point, step * none)
    zero = none.flatten(1).all(1)
    blind = zero | (moved_blindly > moved / 2)
    return torch.stack([blind.float(), zero.float(), none.flatten(1).float().mean(1)], 1)


def _moved(scene: Scene, point: Tensor, step: Tensor) -> Tensor:
    """``(Q,)`` squared distance that a step moves embeddings."""
    with torch.no_grad():
        before, after = (unit(scene.embed(images)) for images in (point, (point + step).clamp(0, 1)))
    return (after - before).square().sum(1)


def _rise(scene: Scene, eps: float) -> Tensor:
    """``(Q,)`` how much a step along the gradient raises the margin; NaN where there is no gradient."""
    gradient = _gradient(scene, scene.images)
    usable = (gradient.isfinite().flatten(1).all(1)) & gradient.flatten(1).any(1)
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    length = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
    step = gradient.sign() if scene.norm == "Linf" else gradient / like(length, gradient)
    stepped = within(scene.images + eps * step, scene.images, eps, scene.norm)
    wrong, right = scene.gallery.hardest(scene.clean, scene.sought)
    direction = scene.gallery.embeddings[wrong] - scene.gallery.embeddings[right]
    with torch.no_grad():
        before, after = (unit(scene.embed(images)) for images in (scene.images, stepped))
    return ((after - before) * direction).sum(1).masked_fill(~usable, torch.nan)


def _planted(scene: Scene, eps: float) -> Tensor:
    """``(Q,)`` 1 if a planted item is reached, 0 if not, -1 if it cannot be told from the query."""
    corner = _noisy(scene, eps)
    count = len(scene)
    with torch.no_grad():
        embeddings = torch.cat([scene.embed(scene.images), scene.embed(corner)])
    labels = torch.arange(2 * count, device=embeddings.device)
    gallery = Gallery(embeddings, labels)
    planted = Scene(
        scene.embed,
        scene.modules,
        gallery,
        scene.pixels_of,
        scene.images,
        gallery.embeddings[:count],
        Sought(labels[:count], torch.full_like(labels[:count], -1)),
        scene.norm,
    )
    differs = gallery.ranking(planted.clean, planted.sought, 1).margin < 0
    reached = breaks(planted, climb(planted, eps, STEPS // 2))
    return torch.where(differs, reached.float(), -1.0)


def _difference(scene: Scene, images: Tensor) -> Tensor:
    with torch.no_grad():
        return (unit(scene.embed(images)) - unit(scene.embed(scene.images))).norm(dim=1)


def _differs_apart(scene: Scene) -> Tensor:
    """``(Q,)`` how far embeddings are from those in reversed halves."""
    order = torch.arange(len(scene)).flip(0)
    with torch.no_grad():
        whole = unit(scene.embed(scene.images))
        parts = torch.cat([unit(scene.embed(scene.images[rows])) for rows in order.tensor_split(2) if len(rows)])
    return (parts - whole[order]).norm(dim=1)


def _raw_type(scene: Scene) -> Tensor:
    with torch.no_grad():
        return scene.embed(scene.images[:1])


def _marked(standing: str) -> Tensor:
    return torch.tensor([mark == "1" for mark in standing], dtype=torch.bool)


def _stream(name: str) -> int:
    return zlib.crc32(f"check: {name}".encode())
