"""FreeAT: the backward pass of training also moves the perturbation, and each batch is trained on several times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..attacks.adapter import unchanged
from ..attacks.ball import project
from ..attacks.checks import check_eps, check_number
from ..attacks.objective import Attack
from ..attacks.pgd import uniform_noise
from ..errors import InputError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch


class FreeAT:
    """Adversarial training "for free" (Shafahi et al., arXiv 1904.12843).

    The training loop takes each batch several times: ``for images, labels in loader: for _ in range(4): ...``. The
    backward pass of training also gives the gradient at the perturbed images, and the next call starts one sign step
    further. It saves all attack steps. In return, only one of several optimiser steps sees new images.

    Args:
        eps: radius, in pixels of [0, 1].
        alpha: length of a step, in pixels of [0, 1]; None: eps.

    Raises:
        InputError: an option is out of its range.
    """

    def __init__(self, eps: float = 8 / 255, alpha: float | None = None) -> None:
        self.eps = check_eps(eps, error=InputError)
        self.alpha = eps if alpha is None else check_number("alpha", alpha)
        self._change: Tensor | None = None

    @hookimpl
    def pml_adversarial_attack(self, batch: Batch) -> Attack:
        """Adds the perturbation that the last backward pass moved to the images of this batch."""
        return _Continued(self, batch.strength) if batch.strength else unchanged

    def state_dict(self) -> dict[str, Any]:
        """The perturbation."""
        return {"change": self._change}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned."""
        self._change = state["change"]


class _Continued:
    """The attack of one step of `FreeAT`."""

    def __init__(self, method: FreeAT, strength: float) -> None:
        self.method, self.eps, self.alpha = method, strength * method.eps, strength * method.alpha

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        change = self.method._change
        if change is None or change.shape != inputs.shape:
            change = uniform_noise(inputs, self.eps)
        points = project(inputs + change.to(inputs), inputs, self.eps)
        self.method._change = points - inputs
        return points

    def learn(self, gradient: Tensor) -> None:
        with torch.no_grad():
            change = self.method._change + self.alpha * gradient.sign()  # type: ignore[operator]
            self.method._change = change.clamp(-self.eps, self.eps)
