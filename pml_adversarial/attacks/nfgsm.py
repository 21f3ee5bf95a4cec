"""N-FGSM: one large step from a noisy start."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import AttackError
from .checks import check_number
from .objective import Objective
from .pgd import PGD, uniform_noise


class NFGSM(PGD):
    """N-FGSM (de Jorge et al., arXiv 2202.01181): uniform noise of ``spread * eps``, then one sign step of ``alpha``.

    It saves all attack steps but one. A model that is trained against one step within the ball may withstand this step
    and nothing else (catastrophic overfitting). So the ball does not bound this attack: a pixel moves by up to
    ``spread * eps + alpha``, within [0, 1].

    Args:
        objective: what is raised.
        eps: the radius that training is for, in pixels of [0, 1].
        alpha: length of the step, in pixels of [0, 1]; None: eps.
        spread: the noise reaches so many eps in either direction; 2 in the paper.

    Raises:
        AttackError: an option cannot be used.
    """

    def __init__(self, objective: Objective, eps: float = 8 / 255, alpha: float | None = None, spread: float = 2.0):
        super().__init__(objective, eps, eps if alpha is None else alpha, steps=1)
        self.spread = check_number("spread", spread, error=AttackError)

    def start(self, inputs: Tensor) -> Tensor:
        """The inputs with noise, which may lead out of [0, 1]."""
        return uniform_noise(inputs, self.spread * self.eps).add_(inputs)

    def projection(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that moves points into [0, 1]."""
        return lambda points: points.clamp(0, 1)
