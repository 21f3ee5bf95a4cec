"""The only door to torchattacks: attacks are built, given their strength, run, and held to their contract.

An attack is a *factory*, called with the objective (a classifier-like module) and returning a callable
``(inputs, labels) -> inputs``. A torchattacks class fits, with ``functools.partial`` for its options, if it raises
the loss of a whole batch; the others are refused with their reason.
"""

from __future__ import annotations

import inspect
import logging
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torchattacks
from torch import Tensor
from torchattacks.attack import Attack as TorchAttack

from ..errors import AttackError
from .ball import per_image
from .objective import Attack, AttackFactory, Objective

logger = logging.getLogger("pml_adversarial")


@runtime_checkable
class Learns(Protocol):
    """An attack that is told the gradient at the perturbed inputs which training's backward pass comes to anyway."""

    def learn(self, gradient: Tensor) -> None:
        """Gradient ``(M, ...)`` of what training lowers, at the inputs that the attack gave last."""


_SCALED = ("eps", "alpha")
_OUTSIDE = 1e-5

_GATED_BY_SUCCESS = (torchattacks.APGD, torchattacks.CW, torchattacks.Square)
"""Search with all they have, but hand back only rows that got misclassified, and others as they were."""

_NO_BOUNDARY = "it searches for the nearest decision boundary, and a score has none"
_ROWS_APART = "it takes rows apart or repeats them, and each row's fixed context is known by its position"
_NO_CLASSES = "it leads toward other classes, and a score has none"
_NOT_UPWARD = "it does not raise the loss of a label, so it may as well lower the score"
_NOT_FOR_TRAINING: dict[str, str] = {
    "APGDT": _NO_CLASSES,
    "AutoAttack": _NO_CLASSES,
    "DeepFool": _NO_BOUNDARY,
    "EADEN": _NO_BOUNDARY,
    "EADL1": _NO_BOUNDARY,
    "FAB": _NO_BOUNDARY,
    "SparseFool": _NO_BOUNDARY,
    "JSMA": _ROWS_APART,
    "OnePixel": _ROWS_APART,
    "PGDRS": _ROWS_APART,
    "PGDRSL2": _ROWS_APART,
    "Pixle": _ROWS_APART,
    "SPSA": _ROWS_APART,
    "GN": _NOT_UPWARD,
    "TPGD": _NOT_UPWARD,
    "VANILA": _NOT_UPWARD,
    "Jitter": "the noise that it adds to the output outweighs the gradient of two logits",
    "MultiAttack": "it hands on only rows that a member got misclassified; pass its strongest member",
    "LGV": "it trains a classifier's weights on a data loader of its own",
}


def budget(factory: AttackFactory) -> dict[str, float]:
    """The factory's ``eps`` and ``alpha``, as far as it has them as numbers."""
    parameters = inspect.signature(factory).parameters
    found = {name: parameters[name].default for name in _SCALED if name in parameters}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def check(factory: AttackFactory) -> None:
    """Refuses what cannot be a factory, before anything is spent.

    Raises:
        AttackError: it cannot be called, is an attack already, cannot raise a score, has options that do not fit, or a
            negative budget.
    """
    if not callable(factory) or isinstance(factory, TorchAttack):
        raise AttackError(
            f"attack={factory!r} is no factory; expected something to be called with the objective, such as "
            "partial(torchattacks.PGD, eps=8/255)."
        )
    _check_kind(_class_of(factory))
    try:
        found = budget(factory)
    except ValueError as error:
        raise AttackError(f"The attack cannot be made: {error}. Check its name and its options.") from error
    if any(value < 0 for value in found.values()):
        raise AttackError(f"The attack has {found}; expected numbers from 0 on, in pixels of [0, 1].")
    if found.get("eps", 0.0) > 1:
        logger.warning("eps=%g, but pixels are in [0, 1]: for 8 of 256 levels write eps=8/255.", found["eps"])


def check_warmup(factory: AttackFactory) -> None:
    """Refuses to warm up an attack that has no ``eps`` to start from 0.

    Raises:
        AttackError: the factory takes no ``eps`` with a number as its default.
    """
    if "eps" not in budget(factory):
        raise AttackError(
            f"warmup was asked of {factory}, which has no eps that could grow from 0; expected a factory with an "
            "eps keyword, such as partial(torchattacks.PGD, eps=8/255). Pass warmup=0 for this attack."
        )


def build(factory: AttackFactory, objective: Objective, strength: float = 1.0) -> Attack:
    """The attack on ``objective``, with eps and alpha scaled by ``strength``.

    It is `unchanged` where eps is 0, and where the score is satisfied from the start.

    Raises:
        AttackError: the factory returns something that cannot be called, or cannot raise a score.
    """
    full = budget(factory)
    if full.get("eps", 1.0) * strength == 0 or objective.is_satisfied:
        return unchanged
    scaled = {name: value * strength for name, value in full.items()} if strength < 1 else {}
    attack = factory(objective, **scaled)
    if not callable(attack):
        raise AttackError(
            f"The attack factory {factory} returned {type(attack).__name__}; expected a callable "
            "(inputs, labels) -> inputs."
        )
    _check_kind(type(attack))
    if isinstance(attack, TorchAttack) and isinstance(getattr(attack, "seed", None), int):
        attack.seed = int(torch.randint(2**31, ()))  # else it restarts from the same noise in every step
    return BestTried(attack, objective) if isinstance(attack, _GATED_BY_SUCCESS) else attack


class BestTried:
    """An attack that gives, for each row that it would hand back as it was, the best of what it tried.

    Args:
        attack: ``(inputs, labels) -> inputs``, gated by success.
        objective: what it asks, see `objective.Objective`.
    """

    def __init__(self, attack: Attack, objective: Any) -> None:
        self.attack, self.objective = attack, objective

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Inputs ``(M, ...)`` -> perturbed inputs ``(M, ...)``."""
        self.objective.keep_best(inputs)
        found = self.attack(inputs, labels)
        kept = (found == inputs).flatten(1).all(1)
        return torch.where(per_image(kept, inputs), self.objective.best_inputs, found)


def unchanged(inputs: Tensor, labels: Tensor) -> Tensor:
    """The attack of strength 0: it returns its inputs, on purpose."""
    return inputs


def run(attack: Attack, inputs: Tensor, labels: Tensor, objective: Objective | None = None) -> Tensor:
    """Runs an attack and holds it to its contract.

    Args:
        attack: ``(inputs, labels) -> inputs``.
        inputs: ``(M, ...)`` in [0, 1].
        labels: ``(M,)``.
        objective: what is raised; it may say that the attack may leave all inputs as they were.

    Returns:
        ``(M, ...)`` in [0, 1], detached; ``inputs`` itself where it is right that they were left as they were.

    Raises:
        AttackError: another type or shape came back, complex or sparse tensors, or values that are not finite,
            outside [0, 1], or all as they were.
    """
    if attack is unchanged:
        return inputs
    perturbed: Any = attack(inputs.clone(), labels)  # a clone: what it changes in place has to count as changed
    name = type(attack.attack if isinstance(attack, BestTried) else attack).__name__
    if not isinstance(perturbed, Tensor) or perturbed.shape != inputs.shape:
        found = tuple(perturbed.shape) if isinstance(perturbed, Tensor) else type(perturbed).__name__
        raise AttackError(f"{name} returned {found}; expected inputs of the shape {tuple(inputs.shape)}.")
    if perturbed.is_complex() or perturbed.layout != inputs.layout:
        raise AttackError(f"{name} returned {perturbed.layout}, {perturbed.dtype}; expected dense real numbers.")
    perturbed = (perturbed.detach() if perturbed.requires_grad else perturbed).to(inputs)
    low, high = torch.aminmax(perturbed)
    low, high, changed = torch.stack([low, high, (perturbed != inputs).any().to(low)]).tolist()
    if not -_OUTSIDE <= low <= high <= 1 + _OUTSIDE:
        found = f"values from {low:.3g} to {high:.3g}" if low == low else "NaN"
        raise AttackError(f"{name} returned {found}; expected finite values in [0, 1].")
    if not changed and objective is not None and objective.may_stay:
        return inputs
    if not changed:
        raise AttackError(
            f"{name} changed none of {len(inputs)} inputs, so training on its result would be plain training. Its "
            "gradients may all be zero (try random_start=True), its budget may be 0 steps or less than "
            f"{inputs.dtype} resolves, or it hands back only rows that got misclassified, and none ever is (use an "
            "attack that maximises a loss, such as PGD)."
        )
    return perturbed if 0 <= low <= high <= 1 else perturbed.clamp(0, 1)


def _class_of(factory: AttackFactory) -> Any:
    while isinstance(factory, partial):
        factory = factory.func
    return factory


def _check_kind(kind: Any) -> None:
    bases = kind.__mro__ if isinstance(kind, type) else ()
    theirs = [base.__name__ for base in bases if base.__module__.split(".")[0] == torchattacks.__name__]
    reason = next((_NOT_FOR_TRAINING[name] for name in theirs if name in _NOT_FOR_TRAINING), None)
    if reason is not None:
        raise AttackError(
            f"{kind.__name__} cannot be used in training: {reason}. Use an attack that raises the loss of a whole "
            "batch, such as PGD, APGD or Square."
        )
