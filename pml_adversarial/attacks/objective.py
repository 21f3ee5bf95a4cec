"""A fixed-context score, dressed as a classifier, so that attacks on classifiers raise it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import AttackError
from .ball import per_image

Score = Callable[[Tensor], Tensor]
"""Embeddings ``(M, D)`` of the perturbed rows -> one score per row ``(M,)``, or a scalar.

A score may have two attributes. ``satisfied(values) -> bool``, of ``(M,)`` or ``()`` values: rows that need no further
perturbation. `pgd.PGD` lets them rest, and a batch of which all rows are satisfied from the start is not attacked.
``may_be_flat = True``: an attack may leave all rows as they are where the score has no gradient.
"""

Attack = Callable[[Tensor, Tensor], Tensor]
"""Inputs ``(M, ...)`` and labels ``(M,)`` -> perturbed inputs ``(M, ...)``."""

AttackFactory = Callable[..., Attack]
"""Objective -> attack."""

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
        self.watched = nn.ModuleList(modules)
        self._embed, self._score, self._stand = embed, score, clean
        self.clean = clean
        self.satisfied: Callable[[Tensor], Tensor] | None = getattr(score, "satisfied", None)
        self.has_gradient: Tensor | None = None
        self.best_inputs: Tensor | None = None
        self.training = False  # torchattacks "restores" train mode, in all submodules, where it found it

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"  # torchattacks asks for it each time, and that of a large model takes long

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the modules, after an empty one: attacks look here for the device, and a model may have none."""
        yield nn.Parameter(self.clean.new_empty(0), requires_grad=False)
        yield from super().parameters(recurse)

    @cached_property
    def clean_score(self) -> Tensor:
        """``(M,)`` the score of the unperturbed rows."""
        with torch.no_grad():
            return self._rows(self._score(self.clean), len(self.clean)).float()

    @property
    def is_satisfied(self) -> bool:
        """Whether all rows are satisfied before any attack."""
        return self.satisfied is not None and bool(self.satisfied(self.clean_score).all())

    @property
    def may_stay(self) -> bool:
        """Whether it is right that an attack leaves all rows as they are: the score is flat, and may be."""
        flat = getattr(self._score, "may_be_flat", False)
        return flat and (bool(self.zero_gradient.all()) or not bool(self.clean_score.any()))

    @property
    def zero_gradient(self) -> Tensor:
        """``(M,)`` bool: rows whose gradient was zero in every pass that asked for one."""
        return self._no_rows() if self.has_gradient is None else ~self.has_gradient

    @property
    def labels(self) -> Tensor:
        """``(M,)`` zeros: the label that every row has and that the attack leads it away from."""
        return torch.zeros(len(self.clean), dtype=torch.long, device=self.clean.device)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(M, 2)`` of the perturbed rows.

        Raises:
            AttackError: the attack asks about some of the rows; a row's context is known by its position.
        """
        if len(inputs) != len(self.clean):
            raise AttackError(
                f"The attack asked about {len(inputs)} of {len(self.clean)} perturbed rows. Each row has its own "
                "fixed context, known by its position, so attacks that take rows one by one, drop or repeat some "
                "cannot be used in training. Use one that moves the whole batch, such as PGD."
            )
        score = self.score(inputs)
        self._keep_better(inputs.detach(), score.detach())
        logits: Tensor = _Logits.apply(score - self.clean_score)
        return logits

    def score(self, inputs: Tensor, rows: Tensor | None = None) -> Tensor:
        """What is raised, as it is, for attacks that know that it is one.

        Args:
            inputs: ``(K, ...)`` perturbed inputs.
            rows: ``(K,)`` which of the ``M`` rows they are of, where it is not all of them; the others stand where they
                were asked about last, and cost no pass.

        Returns:
            ``(K,)``.
        """
        if inputs.requires_grad:
            inputs.register_hook(partial(self._watch_gradient, rows))
        embeddings = self._embed(inputs)
        if rows is not None:
            embeddings = self._stand.detach().index_copy(0, rows, embeddings.to(self._stand.dtype))
        self._stand = embeddings
        score = self._rows(self._score(embeddings), len(self.clean)).float()
        return score if rows is None else score[rows]

    def keep_best(self, clean_inputs: Tensor) -> None:
        """From now on, ``best_inputs`` is what raised each row's score most of all that was asked about."""
        self.best_inputs, self._best_score = clean_inputs, self.clean_score

    def _keep_better(self, inputs: Tensor, score: Tensor) -> None:
        if self.best_inputs is None:
            return
        better = score > self._best_score
        self._best_score = torch.where(better, score, self._best_score)
        self.best_inputs = torch.where(per_image(better, inputs), inputs, self.best_inputs)

    def _watch_gradient(self, rows: Tensor | None, gradient: Tensor) -> None:
        found = gradient.any(tuple(range(1, gradient.ndim))) if gradient.ndim > 1 else gradient != 0
        if rows is not None:
            found = self._no_rows().index_copy(0, rows, found)
        self.has_gradient = found if self.has_gradient is None else self.has_gradient.logical_or(found)

    def _no_rows(self) -> Tensor:
        return torch.zeros(len(self.clean), dtype=torch.bool, device=self.clean.device)

    @staticmethod
    def _rows(score: Tensor, count: int) -> Tensor:
        if not isinstance(score, Tensor) or score.shape not in ((), (count,)):
            found = f"of shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise AttackError(
                f"A score {found} was given; expected one per perturbed row, ({count},), or a scalar, as a tensor."
            )
        return score if score.shape == (count,) else score.expand(count)


class _Logits(torch.autograd.Function):
    """Scores ``(M,)`` -> logits ``(M, 2)``, with the derivative written out: an attack passes here in every step.

    The cross-entropy, softplus(-lead), is made to be a sigmoid of the score with tails of 1 / |score|.
    """

    @staticmethod
    def forward(ctx: Any, score: Tensor) -> Tensor:
        tail = 0.5 / (1 + score.abs())
        cross_entropy = _HIGHEST * torch.where(score > 0, 1 - tail, tail)
        ctx.save_for_backward(2 * _HIGHEST * tail.square() / torch.expm1(-cross_entropy))
        lead = -torch.log(torch.expm1(cross_entropy))
        other = torch.ones_like(score)  # both above 0: some attacks multiply logits with masks, and take the maximum
        return torch.stack([other + lead, other], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        found: Tensor = gradient[:, 0] * slope
        return found
