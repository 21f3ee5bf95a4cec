"""Builds attacks, runs them, and checks what they return. The only module for training that knows torchattacks.

A *factory* takes the objective and returns a callable ``(inputs, labels) -> inputs``: a class of torchattacks that
raises the loss of a whole batch, or your own.
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
from .ball import COUNTS, NORMS, per_image
from .objective import Attack, AttackFactory, Objective

logger = logging.getLogger("pml_adversarial")


@runtime_checkable
class Learns(Protocol):
    """An attack that learns from the backward pass of training."""

    def learn(self, gradient: Tensor) -> None:
        """Receives the gradient ``(M, ...)`` of the training loss at the inputs that the attack returned last."""


_SCALED = ("eps", "alpha")
_OUTSIDE = 1e-5
_DIMENSIONS = 4  # of images (M, C, H, W)

_GATED_BY_SUCCESS = (torchattacks.APGD, torchattacks.CW, torchattacks.Square)
"""Attacks that spend their whole budget, but return a row unchanged unless it was misclassified."""

_NOT_FOR_TRAINING = {
    ("APGDT", "AutoAttack"): "it leads toward other classes, and a score has none",
    ("DeepFool", "EADEN", "EADL1", "FAB", "SparseFool"): (
        "it searches for the nearest decision boundary, and a score has none"
    ),
    ("JSMA", "OnePixel", "PGDRS", "PGDRSL2", "Pixle", "SPSA"): (
        "it takes rows apart or repeats them; a score knows rows by their places"
    ),
    ("GN", "TPGD", "VANILA"): "it does not raise the loss of a label, so the score may rise or fall",
    ("Jitter",): "the noise that it adds to the output outweighs the gradient of two logits",
    ("MultiAttack",): "it returns only rows that one of its attacks got misclassified; pass the strongest of them",
    ("LGV",): "it trains a classifier's weights on a data loader of its own",
}


def budget(factory: AttackFactory) -> dict[str, float]:
    """The default values of the factory's ``eps`` and ``alpha``, where it has them and they are numbers."""
    parameters = inspect.signature(factory).parameters
    found = {name: parameters[name].default for name in _SCALED if name in parameters}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def norm_of(factory: AttackFactory) -> str:
    """The norm of the factory's ``eps``, as far as its default ``norm``, or the name of its class, tells it."""
    parameter = inspect.signature(factory).parameters.get("norm")
    if parameter is not None and parameter.default in NORMS:
        return str(parameter.default)
    kind: Any = factory
    while isinstance(kind, partial):
        kind = kind.func
    return "L2" if getattr(kind, "__name__", "").endswith("L2") else "Linf"


def check(factory: AttackFactory) -> None:
    """Checks that a factory can be called, can raise a score, and has options that fit."""
    if not callable(factory) or isinstance(factory, TorchAttack):
        raise AttackError(
            f"attack={factory!r} is no factory; expected a callable that takes the objective, such as "
            "partial(torchattacks.PGD, eps=8/255)."
        )
    kind: Any = factory
    while isinstance(kind, partial):
        kind = kind.func
    _check_kind(kind)
    try:
        found = budget(factory)
    except ValueError as error:
        raise AttackError(f"The attack cannot be made: {error}. Check its name and its options.") from error
    if any(value < 0 for value in found.values()):
        raise AttackError(f"The attack has {found}; expected numbers from 0 on, in pixels of [0, 1].")
    if found.get("eps", 0.0) > 1 and norm_of(factory) == "Linf":
        logger.warning("eps=%g, but pixels are in [0, 1]: for 8 of 256 levels write eps=8/255.", found["eps"])


def check_warmup(factory: AttackFactory) -> None:
    """Checks that a factory has an ``eps`` with a number as its default, which can grow from 0."""
    if "eps" not in budget(factory):
        raise AttackError(
            f"warmup was asked of {factory}, which has no eps that could grow from 0; expected an eps keyword, as in "
            "partial(torchattacks.PGD, eps=8/255). Pass warmup=0 for this attack."
        )


def build(factory: AttackFactory, objective: Objective, strength: float = 1.0) -> Attack:
    """Makes the attack on an objective, with eps and alpha multiplied by the strength, from 0 to 1.

    It is `unchanged` where eps is 0, and where all rows are satisfied from the start. What the factory returns is
    refused if it cannot be called or cannot raise a score.
    """
    full = budget(factory)
    if full.get("eps", 1.0) * strength == 0 or objective.is_satisfied:
        return unchanged
    scaled = {name: value * strength for name, value in full.items()} if strength < 1 else {}
    if "eps" in scaled and norm_of(factory) in COUNTS:
        scaled["eps"] = max(1, round(scaled["eps"]))
    attack = factory(objective, **scaled)
    if not callable(attack):
        raise AttackError(
            f"The attack factory {factory} returned {type(attack).__name__}; expected a callable "
            "(inputs, labels) -> inputs."
        )
    _check_kind(type(attack))
    if isinstance(attack, TorchAttack) and isinstance(getattr(attack, "seed", None), int):
        attack.seed = int(torch.randint(2**31, ()))  # else it restarts from the same noise in every step
    return _BestTried(attack, objective) if isinstance(attack, _GATED_BY_SUCCESS) else attack


def unchanged(inputs: Tensor, labels: Tensor) -> Tensor:
    """The attack of strength 0, which returns its inputs on purpose."""
    return inputs


def run(attack: Attack, inputs: Tensor, labels: Tensor, objective: Objective | None = None) -> Tensor:
    """Runs an attack on inputs ``(M, ...)`` in [0, 1], and returns what it found, in [0, 1] and detached.

    Where the objective lets the inputs stay as they are, the same tensor ``inputs`` is returned.

    Raises:
        AttackError: the attack returned no dense real tensor of the same shape, finite and in [0, 1], or the inputs
            unchanged.
    """
    if attack is unchanged or (objective is not None and objective.is_satisfied):  # attacks that `build` did not make
        return inputs
    inner = attack.attack if isinstance(attack, _BestTried) else attack
    name, given = type(inner).__name__, inputs.clone()  # a clone: what it changes in place has to count as changed
    if isinstance(inner, TorchAttack) and objective is not None and inputs.ndim != _DIMENSIONS:
        with objective.taking(inputs.shape):  # these attacks count on images
            perturbed: Any = attack(given.reshape(len(inputs), 1, 1, -1), labels)
        perturbed = perturbed.reshape(inputs.shape) if isinstance(perturbed, Tensor) else perturbed
    else:
        perturbed = attack(given, labels)
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
            f"{name} changed none of {len(inputs)} inputs; training on them would be plain training. Its gradients may "
            f"be zero (try random_start=True), its budget 0 or below what {inputs.dtype} resolves, or it hands back "
            "only rows that got misclassified, and none is (use an attack that maximises a loss, such as PGD)."
        )
    return perturbed if 0 <= low <= high <= 1 else perturbed.clamp(0, 1)


def _check_kind(kind: Any) -> None:
    bases = kind.__mro__ if isinstance(kind, type) else ()
    theirs = [base.__name__ for base in bases if base.__module__.split(".")[0] == torchattacks.__name__]
    for names, reason in _NOT_FOR_TRAINING.items():
        if not set(names).isdisjoint(theirs):
            raise AttackError(
                f"{kind.__name__} cannot be used in training: {reason}. Use an attack that raises the loss of a whole "
                "batch, such as PGD, APGD or Square."
            )


class _BestTried:
    """Wraps an attack that returns some rows unchanged: they become the best inputs that it tried for them."""

    def __init__(self, attack: Attack, objective: Any) -> None:
        self.attack, self.objective = attack, objective

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.objective.keep_best(inputs)
        found = self.attack(inputs, labels)
        kept = (found == inputs).flatten(1).all(1)
        return torch.where(per_image(kept, inputs), self.objective.best_inputs, found)
