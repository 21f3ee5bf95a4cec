"""FreeAT: the backward pass of training also moves the perturbation, and each batch is trained on several times."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..attacks.adapter import unchanged
from ..attacks.ball import per_image, project
from ..attacks.checks import check_eps, check_number
from ..attacks.objective import Attack
from ..attacks.pgd import uniform_noise
from ..errors import InputError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.plan import Plan
from ..training.tuples import rank_in_group

logger = logging.getLogger("pml_adversarial")

_COPIES = 1 << 20  # more than a row has copies


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
        self._copies: Tensor | None = None
        self._waits = self._told = False

    @hookimpl
    def pml_adversarial_attack(self, batch: Batch, plan: Plan) -> Attack:
        """Adds the perturbation that the last backward pass moved to the images of this batch."""
        rows = batch.own(plan.rows, plan.rows)
        return _Continued(self, batch.strength, rows) if batch.strength else unchanged

    def state_dict(self) -> dict[str, Any]:
        """The perturbation of each copy, and which row of a batch each copy is of."""
        return {"change": self._change, "copies": self._copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned."""
        self._change, self._copies, self._waits = state["change"], state["copies"], False

    def start(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """The perturbations ``(M, ...)`` that copies of rows ``(M,)`` begin with: what was learned, or noise."""
        if self._waits and not self._told:
            self._told = True
            logger.warning(
                "FreeAT has learned nothing from the last step: no backward pass reached its perturbed images. It "
                "learns from loss.backward(), and not from torch.autograd.grad, backward(inputs=...) or in a miner."
            )
        copies, change = rows * _COPIES + rank_in_group(rows), uniform_noise(inputs, self.eps)
        if self._change is not None and self._copies is not None and self._change.shape[1:] == inputs.shape[1:]:
            order = self._copies.to(copies.device).argsort()
            learned = self._copies.to(copies)[order]
            places = torch.searchsorted(learned, copies).clamp(max=len(learned) - 1)
            known, before = learned[places] == copies, self._change.to(inputs)
            change = torch.where(per_image(known, inputs), before[order.to(before.device)][places], change)
        self._copies, self._waits = copies, True
        return change

    def learn(self, change: Tensor) -> None:
        """Keeps what the backward pass has moved the perturbations to."""
        self._change, self._waits = change, False


class _Continued:
    """The attack of one step of `FreeAT`."""

    def __init__(self, method: FreeAT, strength: float, rows: Tensor) -> None:
        self.method, self.rows = method, rows
        self.eps, self.alpha = strength * method.eps, strength * method.alpha

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        points = project(inputs + self.method.start(inputs, self.rows), inputs, self.eps)
        self.method._change = points - inputs
        return points

    def learn(self, gradient: Tensor) -> None:
        with torch.no_grad():
            change = self.method._change + self.alpha * gradient.sign()  # type: ignore[operator]
            self.method.learn(change.clamp(-self.eps, self.eps))
