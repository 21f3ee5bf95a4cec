"""The suites of attacks that a model is evaluated with, and attacks by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torchattacks

from ..attacks.ball import NORMS
from ..attacks.objective import Score
from ..errors import InputError
from .attacks.gradients import (
    LENGTHS,
    classifier_attack,
    demotion,
    gradient_attack,
    margin_score,
    nearest_right,
    nearest_wrong,
    options_taken,
    promotion,
    shift_score,
    targeted_score,
)
from .attacks.kinds import GalleryAttack, QueryAttack, RetrievalAttack
from .attacks.square import square_attack
from .retrieval.batch import QueryBatch


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
            norms=LENGTHS,
            only_robust=True,
            passes=each * (2 * steps + 2) + 3,
        ),
        QueryAttack(
            "apgd-t",
            classifier_attack(apgd_t, targets, samples),
            norms=LENGTHS,
            only_robust=True,
            num_classes=4,
            passes=each * targets * (2 * (steps // 2) + 3) + 3,
        ),
        QueryAttack(
            "fab-t",
            classifier_attack(fab_t, targets),
            norms=LENGTHS,
            only_robust=True,
            passes=33 * targets + 3,
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
        norms = LENGTHS if options_taken(attack)("norm") else NORMS
        return QueryAttack(kind.__name__, classifier_attack(attack), norms=norms)
    return attack


def attacks_by_name() -> dict[str, RetrievalAttack]:
    """All attacks of the suites. Of two with one name, it is the one of "standard"."""
    return {attack.name: attack for _, make in reversed(SUITES.values()) for attack in make()}
