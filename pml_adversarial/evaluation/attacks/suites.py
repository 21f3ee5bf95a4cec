"""The attacks that a model is evaluated with, and the suites that they form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torchattacks
from torch import Tensor

from ...attacks.ball import NORMS
from ...attacks.objective import Score
from ...attacks.pgd import MomentumPGD
from ...errors import InputError
from ..retrieval.batch import QueryBatch
from ..retrieval.classifier import separable_groups
from .kinds import GalleryAttack, Perturb, QueryAttack, RetrievalAttack
from .square import square_attack

# Scores of perturbed queries, by batch and number of the restart.


def margin_score(batch: QueryBatch, restart: int) -> Score:
    """How much nearer the nearest wrong item is than the nearest right item. Both are chosen anew in every step."""
    return lambda queries: batch.gallery.margin(queries, batch.targets)


def targeted_score(batch: QueryBatch, restart: int) -> Score:
    """How much nearer one wrong class is than the nearest right item.

    The class is the most similar one in the first run, the second most similar one in the second run, and so on. The
    nearest items of both classes are chosen anew in every step. What blocks the way to one class need not block the
    way to another, so this succeeds on some queries on which all restarts of `margin_score` fail.
    """
    gallery, wrong_class = batch.gallery, batch.targets.aimed_at(batch.classifier().wrong_classes(restart))

    def score(queries: Tensor) -> Tensor:
        wrong, right = (gallery.hardest(queries, targets)[1] for targets in (wrong_class, batch.targets))
        return gallery.lead(queries, wrong, right)

    return score


def shift_score(batch: QueryBatch, restart: int) -> Score:
    """How far the embedding is from that of the clean query, whatever the gallery holds."""
    return lambda queries: batch.gallery.shift_squared(queries, batch.clean)


def gradient_attack(score: Callable[[QueryBatch, int], Score], steps: int, samples: int | None = None) -> Perturb:
    """`MomentumPGD` that raises a score, as `QueryAttack` takes it.

    Args:
        score: what is raised.
        steps: gradient steps.
        samples: draws of the model over which each gradient is averaged (EOT, Athalye et al., arXiv 1707.07397); None:
            `attacks.SAMPLES` if the model answers at random, else one.
    """
    return partial(raise_score, score=score, steps=steps, **_if_given(samples))


def raise_score(
    batch: QueryBatch,
    eps: float,
    restart: int,
    *,
    score: Callable[[QueryBatch, int], Score],
    steps: int,
    samples: int | None = None,
) -> Tensor:
    """Queries ``(Q, C, H, W)`` whose score was raised by `MomentumPGD`, see `gradient_attack`."""
    objective = batch.objective(score(batch, restart), samples=samples)
    return MomentumPGD(objective, eps, steps, batch.norm)(batch.images, objective.labels)


def classifier_attack(make: Callable[..., Any], targets: int | None = None, samples: int | None = None) -> Perturb:
    """An attack of torchattacks on `RetrievalClassifier`, as `QueryAttack` takes it.

    Args:
        make: a class of torchattacks, or one with options bound. It is called with the classifier and with those of
            ``eps``, ``norm``, ``seed``, ``n_classes`` and ``eot_iter`` that it takes. Whatever it returns is held to
            the budget.
        targets: how many of the most similar wrong classes are targeted; None: all, for attacks that take
            ``n_classes``.
        samples: ``eot_iter``, for attacks that take it: see `gradient_attack`.
    """
    return partial(fool_classifier, make=make, targets=targets, **_if_given(samples))


def fool_classifier(
    batch: QueryBatch,
    eps: float,
    restart: int,
    *,
    make: Callable[..., Any],
    targets: int | None = None,
    samples: int | None = None,
) -> Tensor:
    """Queries ``(Q, C, H, W)`` as an attack on `RetrievalClassifier` returns them, see `classifier_attack`."""
    taken, found = _taken(make), batch.images.clone()
    for rows in separable_groups(batch.images, batch.targets, eps, batch.norm):
        part = batch[rows]
        model = part.classifier()
        options: dict[str, Any] = {"eps": eps, "norm": batch.norm, "seed": int(torch.randint(2**31, ()))}
        options["eot_iter"] = batch.num_samples(samples)
        options["n_classes"] = model.num_classes if targets is None else min(model.num_classes, targets + 1)
        options = {name: value for name, value in options.items() if taken(name)}
        images = part.images.float().clone()
        if images.ndim != 4:  # vectors, sounds or clips, which torchattacks does not know
            images = images.reshape(len(images), 1, 1, -1)
        found[rows] = make(model, **options)(images, model.labels).reshape(part.images.shape).to(found)
    return found


def _if_given(samples: int | None) -> dict[str, Any]:
    return {} if samples is None else {"samples": samples}


def _taken(make: Callable[..., Any]) -> Callable[[str], bool]:
    """Which of the names of `classifier_attack` a maker takes and has not bound to a value."""
    parameters = inspect.signature(make).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    bound = make.keywords if isinstance(make, partial) else {}
    return lambda name: (name in parameters or (any_name and name not in _SELDOM)) and name not in bound


_SELDOM = ("n_classes", "eot_iter")  # options that are given only to what names them
_LENGTHS = ("Linf", "L2")  # the norms of torchattacks

# Attacks on the gallery: which item is perturbed, and to what end.


def nearest_wrong(batch: QueryBatch, restart: int) -> Tensor:
    """Each query's nearest wrong item; in the second run the second nearest, and so on."""
    return batch.gallery.hardest(batch.clean, batch.targets, restart)[0]


def nearest_right(batch: QueryBatch, restart: int) -> Tensor:
    """Each query's nearest right item; in the second run the second nearest, and so on."""
    return batch.gallery.hardest(batch.clean, batch.targets, restart)[1]


def promotion(batch: QueryBatch) -> Score:
    """How similar the item is to the query."""
    return lambda items: batch.gallery.similarity_of_items(batch.clean, items)


def demotion(batch: QueryBatch) -> Score:
    """How dissimilar the item is to the query."""
    return lambda items: -batch.gallery.similarity_of_items(batch.clean, items)


def _raising(
    name: str,
    score: Callable[[QueryBatch, int], Score],
    steps: int,
    restarts: int = 1,
    samples: int | None = None,
    **options: Any,
) -> QueryAttack:
    """An attack that raises a score in some gradient steps. Some scores take two passes to choose their classes."""
    passes = (samples or 1) * (2 * steps + 1) + 3
    return QueryAttack(name, gradient_attack(score, steps, samples), restarts, passes=passes, **options)


def standard(
    steps: int = 50, restarts: int = 3, queries: int = 500, targets: int = 5, samples: int | None = None
) -> tuple[RetrievalAttack, ...]:
    """The attacks of "standard-v2", if called without arguments: the strongest that we know at a bounded cost.

    Args:
        steps: gradient steps of each run.
        restarts: runs of the attack "margin", from different random starts.
        queries: forward passes of the black-box attack.
        targets: how many wrong classes targeted attacks try, the most similar one first.
        samples: draws over which gradients are averaged, see `gradient_attack`; FAB and Square take one.
    """
    each = samples or 1
    apgd = partial(torchattacks.APGD, steps=steps)
    apgd_t = partial(torchattacks.APGDT, steps=steps // 2)
    fab_t = partial(torchattacks.FAB, multi_targeted=True, steps=10)
    return (
        _raising("margin", margin_score, steps, restarts, samples),
        _raising("targeted", targeted_score, steps, targets, samples, only_robust=True),
        _raising("shift", shift_score, steps, samples=samples),
        QueryAttack(
            "apgd-ce",
            classifier_attack(apgd, samples=samples),
            norms=_LENGTHS,
            only_robust=True,
            passes=each * (2 * steps + 2) + 3,
        ),
        QueryAttack(
            "apgd-t",
            classifier_attack(apgd_t, targets, samples),
            norms=_LENGTHS,
            only_robust=True,
            num_classes=4,
            passes=each * targets * (2 * (steps // 2) + 3) + 3,
        ),
        QueryAttack(
            "fab-t", classifier_attack(fab_t, targets), norms=_LENGTHS, only_robust=True, passes=33 * targets + 3
        ),
        QueryAttack(
            "square", square_attack(margin_score, queries), black_box=True, only_robust=True, passes=queries + 1
        ),
        GalleryAttack("promote", nearest_wrong, promotion, steps, samples=samples),
        GalleryAttack("demote", nearest_right, demotion, steps, samples=samples),
    )


def fast(
    steps: int = 15, restarts: int = 3, targets: int = 3, samples: int | None = None
) -> tuple[RetrievalAttack, ...]:
    """The attacks of "fast-v1", if called without arguments: most of what "standard-v2" finds, for a tenth of its cost.

    The targeted attack is given only queries that are still robust after "margin".

    Args:
        steps: gradient steps of each run; half of it on the gallery.
        restarts: runs of the attack "margin", from different random starts.
        targets: how many wrong classes the targeted attack tries, the most similar one first.
        samples: draws over which gradients are averaged, see `gradient_attack`.
    """
    return (
        _raising("margin", margin_score, steps, restarts, samples),
        _raising("targeted", targeted_score, steps, targets, samples, follows=True),
        GalleryAttack("promote", nearest_wrong, promotion, steps // 2, samples=samples),
        GalleryAttack("demote", nearest_right, demotion, steps // 2, samples=samples),
    )


def quick(steps: int = 40, restarts: int = 3, samples: int | None = None) -> tuple[RetrievalAttack, ...]:
    """The attacks of "quick-v1", if called without arguments: two on the query, for comparisons during development.

    Both run ``restarts`` times, with ``steps`` gradient steps from different random starts. For ``samples`` see
    `gradient_attack`.
    """
    return (
        _raising("margin", margin_score, steps, restarts, samples),
        _raising("shift", shift_score, steps, restarts, samples),
    )


SUITES: dict[str, tuple[str, Callable[[], tuple[RetrievalAttack, ...]]]] = {
    "standard": ("standard-v2", standard),
    "fast": ("fast-v1", fast),
    "quick": ("quick-v1", quick),
}
"""Name in ``attacks="..."`` -> name and version in reports, and the attacks. Other attacks get another version.

``attacks=`` also takes the name with the version.
"""


def find_suite(attacks: str | Sequence[str | RetrievalAttack]) -> tuple[str, tuple[RetrievalAttack, ...]]:
    """Name in reports and attacks of a suite, from its name or from a list of attacks and names of attacks.

    Raises:
        InputError: a name is unknown, there is no attack, two have one name, or something else is in the list.
    """
    known = attacks_by_name()
    if isinstance(attacks, str):
        made = next((suite for name, suite in SUITES.items() if attacks in (name, suite[0])), None)
        if made is None:
            cure = f"[{attacks!r}]" if attacks in known else f"one of {', '.join(SUITES)}, or a list of attacks"
            raise InputError(f"attacks={attacks!r}; expected {cure}.")
        return made[0], made[1]()
    if isinstance(attacks, RetrievalAttack):
        attacks = (attacks,)
    if not callable(attacks) and not isinstance(attacks, Iterable):
        raise InputError(f"attacks={attacks!r}; expected one of {', '.join(SUITES)}, or a list of attacks.")
    if callable(attacks):
        raise InputError(f"attacks is {attacks!r}, which was not called; expected a list of attacks, such as quick().")
    members: tuple[Any, ...] = tuple(known.get(a, a) if isinstance(a, str) else _as_attack(a) for a in attacks)
    names = [getattr(attack, "name", None) for attack in members]
    kinds_fit = all(isinstance(attack, RetrievalAttack) for attack in members)
    if not members or not kinds_fit or len(set(names)) < len(names):
        found = ", ".join(str(getattr(attack, "name", repr(attack))) for attack in members) or "none"
        twice = sorted({str(name) for name in names if names.count(name) > 1 and name is not None})
        cure = f" More than one is named {', '.join(twice)}: give them names, name=...." if twice else ""
        raise InputError(
            f"attacks holds {found}; expected QueryAttack and GalleryAttack objects of different names, or some of "
            f"{', '.join(known)}.{cure}"
        )
    return "custom", members


def _as_attack(attack: Any) -> Any:
    """An attack on queries of a class of torchattacks, or of one with options bound; anything else as it is."""
    kind = attack.func if isinstance(attack, partial) else attack
    if isinstance(kind, type) and issubclass(kind, torchattacks.attack.Attack):
        norms = _LENGTHS if _taken(attack)("norm") else NORMS
        return QueryAttack(kind.__name__, classifier_attack(attack), norms=norms)
    return attack


def attacks_by_name() -> dict[str, RetrievalAttack]:
    """All attacks of the suites. Of two with one name, it is the one of "standard"."""
    return {attack.name: attack for _, make in reversed(SUITES.values()) for attack in make()}
