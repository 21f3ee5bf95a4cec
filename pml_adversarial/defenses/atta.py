"""Each image's perturbation of the last epoch is where the next one starts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..attacks.adapter import unchanged
from ..attacks.ball import is_radius, per_image, uniform_start
from ..attacks.objective import Attack, Objective
from ..attacks.pgd import PGD
from ..errors import InputError, PluginError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Batch
from ..training.plan import Plan


class ATTA:
    """l-inf PGD that goes on from what it found for the same image in the last epoch, in place of a random start.

    A perturbation mostly works on a model that is one epoch older or younger (Zheng et al., arXiv 1912.11969), so that
    one step an epoch adds up to many. The loss does not know which images it sees: say it before each call. Images
    that are augmented anew in each epoch hardly have anything to reuse.

    Spares: the attack steps that need not be done again. Costs the memory of one more image for each image.

    Args:
        eps: radius, in pixels of [0, 1].
        alpha: step; None: 1.25 eps.
        steps: of each epoch.

    Attributes:
        known: bool, of which images a perturbation is remembered.

    Example:
        >>> from torch import nn
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_adversarial import AdversarialLoss
        >>> model, reuse = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), ATTA(eps=8 / 255)
        >>> loss_func = AdversarialLoss(ContrastiveLoss(), model, plugins=[reuse], warmup=0)
        >>> images, labels, index = torch.rand(8, 1, 4, 4), torch.arange(8) // 2, torch.arange(8)
        >>> reuse.next(index)  # before each call, the places of the images in their data set
        >>> loss = loss_func(model(images), labels)
        >>> int(reuse.known.sum())
        8
    """

    def __init__(self, eps: float = 8 / 255, alpha: float | None = None, steps: int = 1) -> None:
        if not is_radius(eps) or not isinstance(steps, int) or steps < 1:
            raise InputError(f"eps={eps!r}, steps={steps!r}; expected eps in pixels of [0, 1], and steps from 1 on.")
        self.eps, self.steps = eps, steps
        self.alpha = 1.25 * eps if alpha is None else alpha
        self.known = torch.zeros(0, dtype=torch.bool)
        self._found: Tensor | None = None
        self._index: Tensor | None = None

    def next(self, index: Tensor) -> None:
        """Which images the next call is about.

        Args:
            index: ``(N,)`` long, places in the data set, in the order of the inputs.

        Raises:
            InputError: it is something else.
        """
        if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.long or (index < 0).any():
            found = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise InputError(
                f"index is {found}; expected torch.long of one dimension, places in the data set from 0 on."
            )
        self._index = index

    @hookimpl
    def pml_adversarial_attack(self, objective: Objective, batch: Batch, plan: Plan) -> Attack:
        """Goes on where it was, and remembers where it came to."""
        if self._index is None or len(self._index) != len(batch.inputs):
            found = "nothing" if self._index is None else f"{len(self._index)} places"
            raise PluginError(
                f"ATTA was told {found} before a call with {len(batch.inputs)} inputs; call `reuse.next(index)` with "
                "the places of the batch's images in the data set before each call of the loss."
            )
        places = batch.places_of(batch.own(plan.rows, plan.rows))
        index, self._index = self._index.to(places.device)[places], None
        return partial(self._attack, objective, index, batch.strength) if batch.strength else unchanged

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return {"known": self.known, "found": self._found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.known, self._found = state["known"], state["found"]

    def _attack(self, objective: Objective, index: Tensor, strength: float, inputs: Tensor, labels: Tensor) -> Tensor:
        eps, alpha = strength * self.eps, strength * self.alpha
        self._make_room(int(index.max()) + 1, inputs)
        found = cast(Tensor, self._found)
        known = per_image(self.known[index], inputs)
        first = torch.where(known, found[index], eps * uniform_start(inputs))
        points = _FromPerturbation(objective, eps, alpha, self.steps, first)(inputs)
        found[index] = points - inputs
        self.known[index] = True
        return points

    def _make_room(self, size: int, like: Tensor) -> None:
        """For so many images, and twice as many where there have to be more, where the inputs are."""
        found = like.new_zeros(0, *like.shape[1:]) if self._found is None else self._found.to(like)
        self._found, self.known = found, self.known.to(like.device)
        if size > len(found):
            more = 2 * size - len(found)
            self._found = torch.cat([found, found.new_zeros(more, *found.shape[1:])])
            self.known = torch.cat([self.known, self.known.new_zeros(more)])


class _FromPerturbation(PGD):
    """PGD that starts at a given perturbation ``(M, ...)``."""

    def __init__(self, objective: Objective, eps: float, alpha: float, steps: int, first: Tensor) -> None:
        super().__init__(objective, eps, alpha, steps)
        self.first = first

    def start(self, inputs: Tensor) -> Tensor:
        """The inputs with the perturbation added."""
        return self.project(inputs + self.first, inputs)
