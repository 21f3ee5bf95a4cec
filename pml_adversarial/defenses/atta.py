"""ATTA: the attack on an image starts at the perturbation that the last epoch found for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attacks.adapter import unchanged
from ..attacks.ball import per_image, project
from ..attacks.checks import check_eps, check_number, check_steps
from ..attacks.objective import Attack, Objective
from ..attacks.pgd import PGD, uniform_noise
from ..errors import InputError, PluginError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.plan import Plan


class ATTA:
    """Adversarial training with transferable adversarial examples (Zheng et al., arXiv 1912.11969).

    l-inf PGD starts at the perturbation that it found for the same image in the last epoch; the first time it starts at
    a random point. A perturbation mostly works on the model of the next epoch too, so one step in each epoch adds up to
    many. Images that are augmented in another way in each epoch gain little. Call `next` before each call of the loss.
    It takes the memory of one more image for each image.

    Args:
        eps: radius, in pixels of [0, 1].
        alpha: length of a step, in pixels of [0, 1]; None: 1.25 eps.
        steps: number of steps in each epoch.

    Attributes:
        known: ``(L,)`` bool, whether a perturbation is remembered of the image at each place of the data set.

    Raises:
        InputError: an option is out of its range.

    Example:
        >>> from torch import nn
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_adversarial import AdversarialLoss
        >>> model, atta = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), ATTA(eps=8 / 255)
        >>> loss_func = AdversarialLoss(ContrastiveLoss(), model, plugins=[atta], warmup=0)
        >>> images, labels, index = torch.rand(8, 1, 4, 4), torch.arange(8) // 2, torch.arange(8)
        >>> atta.next(index)  # before each call: the places of the images in the data set
        >>> loss = loss_func(model(images), labels)
        >>> int(atta.known.sum())
        8
    """

    def __init__(self, eps: float = 8 / 255, alpha: float | None = None, steps: int = 1) -> None:
        self.eps, self.steps = check_eps(eps, error=InputError), check_steps(steps, InputError)
        self.alpha = 1.25 * eps if alpha is None else check_number("alpha", alpha)
        self.known = torch.zeros(0, dtype=torch.bool)
        self._found: Tensor | None = None
        self._index: Tensor | None = None

    def next(self, index: Tensor) -> None:
        """Says at which places ``(N,)`` long of the data set the images of the next call of the loss are.

        Raises:
            InputError: ``index`` has another type or shape, or is negative.
        """
        if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.long or (index < 0).any():
            found = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise InputError(
                f"index is {found}; expected a tensor (N,) of type torch.long: places in the data set, from 0 on."
            )
        self._index = index

    @hookimpl
    def pml_adversarial_attack(self, objective: Objective, batch: Batch, plan: Plan) -> Attack:
        """PGD from the remembered perturbations; what it finds is remembered."""
        if self._index is None or len(self._index) != len(batch.inputs):
            found = "nothing" if self._index is None else f"{len(self._index)} places"
            raise PluginError(
                f"ATTA was told {found} before a call with {len(batch.inputs)} inputs; expected `atta.next(index)` "
                "with the place of each image in the data set, before each call of the loss."
            )
        places = batch.places_of(batch.own(plan.rows, plan.rows))
        index, self._index = self._index.to(places.device)[places], None
        return partial(self._attack, objective, index, batch.strength) if batch.strength else unchanged

    def state_dict(self) -> dict[str, Any]:
        """The perturbations, and of which images they are."""
        return {"known": self.known, "found": self._found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned."""
        self.known, self._found = state["known"], state["found"]

    def _attack(self, objective: Objective, index: Tensor, strength: float, inputs: Tensor, labels: Tensor) -> Tensor:
        eps, alpha = strength * self.eps, strength * self.alpha
        found = self._with_room(int(index.max()) + 1, inputs)
        known = per_image(self.known[index], inputs)
        first = torch.where(known, found[index], uniform_noise(inputs, eps))
        points = _FromPerturbation(objective, eps, alpha, self.steps, first)(inputs)
        found[index] = points - inputs
        self.known[index] = True
        return points

    def _with_room(self, size: int, like: Tensor) -> Tensor:
        """The perturbations on the device of the inputs; where there are fewer than ``size``, for twice as many."""
        found = like.new_zeros(0, *like.shape[1:]) if self._found is None else self._found.to(like)
        self.known = self.known.to(like.device)
        if size > len(found):
            more = 2 * size - len(found)
            found = torch.cat([found, found.new_zeros(more, *found.shape[1:])])
            self.known = torch.cat([self.known, self.known.new_zeros(more)])
        self._found = found
        return found


class _FromPerturbation(PGD):
    """PGD that starts at a given perturbation ``(M, ...)``."""

    def __init__(self, objective: Objective, eps: float, alpha: float, steps: int, first: Tensor) -> None:
        super().__init__(objective, eps, alpha, steps)
        self.first = first

    def start(self, inputs: Tensor) -> Tensor:
        return project(inputs + self.first, inputs, self.eps)
