"""No attack steps: training's own backward pass moves the perturbation, and each batch is taken several times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..attacks.adapter import unchanged
from ..attacks.ball import is_radius, projected, uniform_start
from ..attacks.objective import Attack
from ..errors import InputError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch


class FreeAT:
    """Adversarial training "for free" (Shafahi et al., arXiv 1904.12843).

    Each batch is trained on several times in a row; the backward pass that moves the weights also gives the gradient at
    the perturbed images, and the next time starts one sign step further. What is raised is thus the training loss
    itself. It needs a training loop that repeats a batch: ``for images, labels in loader: for _ in range(4): ...``.

    Spares: all attack steps. Costs: only one of several optimiser steps sees new images.

    Args:
        eps: radius, in pixels of [0, 1].
        alpha: step; None: eps.

    Raises:
        InputError: ``eps`` is no radius.
    """

    def __init__(self, eps: float = 8 / 255, alpha: float | None = None) -> None:
        if not is_radius(eps):
            raise InputError(f"eps={eps!r}; expected a radius in pixels of [0, 1].")
        self.eps, self.alpha = eps, eps if alpha is None else alpha
        self._change: Tensor | None = None

    @hookimpl
    def pml_adversarial_attack(self, batch: Batch) -> Attack:
        """What the last backward pass left, on the images of this batch."""
        return _Carried(self, batch.strength) if batch.strength else unchanged

    def state_dict(self) -> dict[str, Any]:
        """Where the perturbation is."""
        return {"change": self._change}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self._change = state["change"]


class _Carried:
    """The attack of one step."""

    def __init__(self, replay: FreeAT, strength: float) -> None:
        self.replay, self.eps, self.alpha = replay, strength * replay.eps, strength * replay.alpha

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Inputs ``(M, ...)`` -> perturbed inputs ``(M, ...)``."""
        change = self.replay._change
        if change is None or change.shape != inputs.shape:
            change = self.eps * uniform_start(inputs)
        points = projected(inputs + change.to(inputs), inputs, self.eps)
        self.replay._change = points - inputs
        return points

    def learn(self, gradient: Tensor) -> None:
        """One sign step further, for the next time."""
        with torch.no_grad():
            change = self.replay._change + self.alpha * gradient.sign()  # type: ignore[operator]
            self.replay._change = change.clamp(-self.eps, self.eps)
