"""N-FGSM: one gradient step from noise that is wider than the ball."""

from __future__ import annotations

from torch import Tensor

from .ball import uniform_start
from .objective import Objective
from .pgd import PGD


class NFGSM(PGD):
    """N-FGSM (de Jorge et al., arXiv 2202.01181): uniform noise of ``spread * eps``, then one sign step of ``alpha``.

    A model learns to withstand a single step from the ball's centre, or one that is projected back to the ball, without
    withstanding anything else (catastrophic overfitting). So nothing is projected here, and a pixel moves by up to
    ``spread * eps + alpha``, within [0, 1].

    It saves all attack steps but one.

    Args:
        objective: what is raised.
        eps: the radius that training is for, in pixels of [0, 1].
        alpha: length of the step; None: eps.
        spread: half width of the noise, in units of eps; 2 in the paper.

    Raises:
        AttackError: ``eps`` is not a radius.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_adversarial import AdversarialLoss
        >>> loss_func = AdversarialLoss(ContrastiveLoss(), nn.Flatten(), attack=partial(NFGSM, eps=8 / 255))
    """

    def __init__(self, objective: Objective, eps: float = 8 / 255, alpha: float | None = None, spread: float = 2.0):
        super().__init__(objective, eps, eps if alpha is None else alpha, steps=1)
        self.spread = spread

    def start(self, inputs: Tensor) -> Tensor:
        """Noise wider than the ball, also outside [0, 1]."""
        return inputs + self.spread * self.eps * uniform_start(inputs)

    def project(self, points: Tensor, inputs: Tensor) -> Tensor:
        """The nearest points in [0, 1]."""
        return points.clamp(0, 1)
