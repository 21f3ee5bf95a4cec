"""One gradient step that does not overfit to one step: noise twice as wide, and nothing is cut back to the ball."""

from __future__ import annotations

from torch import Tensor

from .ball import drawn
from .objective import Objective
from .pgd import ascend


class NFGSM:
    """N-FGSM (de Jorge et al., arXiv 2202.01181): uniform noise of ``spread * eps``, then one sign step of ``alpha``.

    A step from the ball's middle, or one that is cut back to the ball, is what models learn to bear without bearing
    anything else (catastrophic overfitting). Uncut, a pixel moves by up to ``spread * eps + alpha``, within [0, 1].

    Spares: all attack steps but one.

    Args:
        objective: what is raised.
        eps: radius that is meant, in pixels of [0, 1].
        alpha: the step; None: eps.
        spread: of the noise, in eps; 2 in the paper.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_adversarial import AdversarialLoss
        >>> loss_func = AdversarialLoss(ContrastiveLoss(), nn.Flatten(), attack=partial(NFGSM, eps=8 / 255))
    """

    def __init__(self, objective: Objective, eps: float = 8 / 255, alpha: float | None = None, spread: float = 2.0):
        self.objective, self.eps, self.spread = objective, eps, spread
        self.alpha = eps if alpha is None else alpha

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Inputs ``(M, ...)`` -> perturbed inputs ``(M, ...)``."""
        start = inputs + self.spread * self.eps * drawn(inputs)
        return ascend(self.objective, start, self.alpha)[0].clamp(0, 1)
