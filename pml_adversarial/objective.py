"""A fixed-context score, dressed as a classifier, so that attacks on classifiers raise it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .errors import AttackError

Score = Callable[[Tensor], Tensor]
"""Embeddings ``(M, D)`` of the perturbed rows -> one score per row ``(M,)``, or a scalar."""

_HIGHEST = 0.69  # just under log 2, the cross-entropy at which label 0 would lose the lead


class Objective(nn.Module):
    """Two logits per row whose cross-entropy with label 0 grows with the row's score.

    Label 0 stays on top whatever the score, so no attack stops early because a row counts as misclassified. The
    cross-entropy is a bounded function of the score with slowly decaying tails: no score is so large that its
    gradient vanishes.

    Args:
        embed: inputs of the attack ``(M, ...)`` -> embeddings ``(M, D)``.
        score: what is to be raised; everything else that it needs is held fixed in it.
        clean: ``(M, D)`` embeddings of the unperturbed rows, from which the score is measured.
        modules: the modules that ``embed`` runs through: attacks ask for their parameters and mode.
    """

    def __init__(
        self, embed: Callable[[Tensor], Tensor], score: Score, clean: Tensor, modules: Iterable[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.device_marker = nn.Parameter(clean.new_empty(0), requires_grad=False)  # attacks look for a device here
        self.watched = nn.ModuleList(modules)
        self._embed, self._score = embed, score
        with torch.no_grad():
            self.clean_score = self._rows(score(clean), len(clean)).float()
        self.has_gradient = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        self.best_inputs: Tensor | None = None
        self._watched_gradient = False
        self.training = False  # torchattacks "restores" train mode, in all submodules, where it found it

    @property
    def zero_gradient(self) -> Tensor:
        """``(M,)`` bool: rows whose gradient was zero in every pass that asked for one."""
        return ~self.has_gradient if self._watched_gradient else torch.zeros_like(self.has_gradient)

    @property
    def labels(self) -> Tensor:
        """``(M,)`` zeros: the label that every row has and that the attack leads it away from."""
        return torch.zeros_like(self.has_gradient, dtype=torch.long)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(M, 2)`` of the perturbed rows.

        Raises:
            AttackError: the attack asks about some of the rows; a row's context is known by its position.
        """
        if len(inputs) != len(self.clean_score):
            raise AttackError(
                f"The attack asked about {len(inputs)} of {len(self.clean_score)} perturbed rows. Each row has its own "
                "fixed context, known by its position, so attacks that take rows one by one, drop or repeat some "
                "cannot be used in training. Use one that moves the whole batch, such as PGD."
            )
        if inputs.requires_grad:
            inputs.register_hook(self._watch_gradient)
        score = self._rows(self._score(self._embed(inputs)), len(inputs)).float()
        self._keep_better(inputs.detach(), score.detach())
        return _logits(score - self.clean_score)

    def keep_best(self, clean_inputs: Tensor) -> None:
        """From now on, ``best_inputs`` is what raised each row's score most of all that was asked about."""
        self.best_inputs, self._best_score = clean_inputs, self.clean_score

    def _keep_better(self, inputs: Tensor, score: Tensor) -> None:
        if self.best_inputs is None:
            return
        better = score > self._best_score
        self._best_score = torch.where(better, score, self._best_score)
        self.best_inputs = torch.where(better.reshape(-1, *[1] * (inputs.ndim - 1)), inputs, self.best_inputs)

    def _watch_gradient(self, gradient: Tensor) -> None:
        self._watched_gradient = True
        self.has_gradient |= gradient.detach().flatten(1).any(1)

    @staticmethod
    def _rows(score: Tensor, count: int) -> Tensor:
        if score.shape not in ((), (count,)):
            raise AttackError(
                f"A score of shape {tuple(score.shape)} was given; expected one per perturbed row, ({count},), "
                "or a scalar."
            )
        return score.expand(count)


def _logits(score: Tensor) -> Tensor:
    # The cross-entropy, softplus(-lead), is made to be a sigmoid of the score with tails of 1 / |score|. The
    # two branches meet at 0 with their slope; abs() and clamp() would have none there, where attacks start.
    positive, zero = score > 0, torch.zeros_like(score)
    below = 0.5 / (1 - torch.where(positive, zero, score))
    above = 1 - 0.5 / (1 + torch.where(positive, score, zero))
    cross_entropy = _HIGHEST * torch.where(positive, above, below)
    lead = -torch.log(torch.expm1(cross_entropy))
    other = torch.ones_like(score)  # both above 0: some attacks multiply logits with masks, and take the maximum
    return torch.stack([other + lead, other], dim=1)
