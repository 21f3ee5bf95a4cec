"""What an attack raises: a score of embeddings, which also looks like a classifier to attacks on classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import AttackError
from .ball import per_image

if TYPE_CHECKING:
    from typing_extensions import Self

Score = Callable[[Tensor], Tensor]
"""Embeddings ``(M, D)`` of the perturbed rows -> one score per row ``(M,)``, or a scalar.

A score may have two attributes:

- ``satisfied``, a function from scores ``(M,)`` to ``(M,)`` bool: rows that need no further perturbation. `pgd.PGD`
  does not move them. A batch in which all rows are satisfied from the start is not attacked, whatever the attack is.
- ``may_be_flat``: True if an attack may leave all rows as they are where the score has no gradient.
"""

Attack = Callable[[Tensor, Tensor], Tensor]
"""Inputs ``(M, ...)`` and labels ``(M,)`` -> perturbed inputs ``(M, ...)``."""

AttackFactory = Callable[..., Attack]
"""Objective -> attack."""

_HIGHEST = 0.69  # just under log 2, the cross-entropy at which label 0 would lose the lead


class Objective(nn.Module):
    """A score that an attack raises, `score`; as a module it gives two logits per row, for attacks on classifiers.

    The cross-entropy of the logits with label 0 grows with the row's score. The logit of label 0 is always the larger
    one, so no attack takes a row for misclassified and stops early. No score is so large that the gradient vanishes.

    Args:
        embed: inputs of the attack ``(M, ...)`` -> embeddings ``(M, D)``; with a second argument ``(K,)``, inputs
            ``(K, ...)`` of some of the rows.
        score: what is raised, see `Score`.
        clean: ``(M, D)`` embeddings of the unperturbed rows. The logits depend on the difference from their score.
        modules: the modules that ``embed`` runs through. Attacks ask for their parameters and mode.
        samples: how many draws of a model that answers at random `pgd.ascent` takes the mean of.
        kept_in_mode: those among all modules that no call of ``eval`` puts into eval mode if they are in train mode.

    Attributes:
        satisfied: that of the score, see `Score`; None if it has none.
        has_gradient: ``(M,)`` bool, rows that had a gradient in some pass; None before the first gradient.
        best_inputs: see `keep_best`.
    """

    def __init__(
        self,
        embed: Callable[..., Tensor],
        score: Score,
        clean: Tensor,
        modules: Iterable[nn.Module] = (),
        samples: int = 1,
        kept_in_mode: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        self._kept = [module for module in kept_in_mode if module.training]
        self.samples = samples
        self.watched = nn.ModuleList(modules)
        self.clean = self._latest = clean
        self._embed, self._score = embed, score
        self.satisfied: Callable[[Tensor], Tensor] | None = getattr(score, "satisfied", None)
        self.has_gradient: Tensor | None = None
        self.best_inputs: Tensor | None = None
        self._shape: torch.Size | None = None
        self.training = False  # torchattacks "restores" train mode, in all submodules, where it found it

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"  # torchattacks asks for it each time, and that of a large model takes long

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the modules. Attacks call ``eval`` before they start."""
        super().train(mode)
        for module in self._kept:
            module.training = True
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """An empty parameter, by which attacks find the device of any model; then the parameters of the modules."""
        yield nn.Parameter(self.clean.new_empty(0), requires_grad=False)
        yield from super().parameters(recurse)

    @cached_property
    def clean_score(self) -> Tensor:
        """``(M,)`` the score of the unperturbed rows."""
        with torch.no_grad():
            return self._per_row(self._score(self.clean))

    @cached_property
    def is_satisfied(self) -> bool:
        """Whether all rows are satisfied without an attack. On an accelerator the host waits for the answer."""
        return self.satisfied is not None and bool(self.satisfied(self.clean_score).all())

    @property
    def may_stay(self) -> bool:
        """Whether an attack may leave all rows as they are: the score has no gradient, and says that this may be."""
        flat = getattr(self._score, "may_be_flat", False)
        return flat and (bool(self.zero_gradient.all()) or not bool(self.clean_score.any()))

    @property
    def zero_gradient(self) -> Tensor:
        """``(M,)`` bool: rows whose gradient was zero in every pass that asked for one."""
        return self._no_rows() if self.has_gradient is None else ~self.has_gradient

    @property
    def labels(self) -> Tensor:
        """``(M,)`` zeros: the label whose cross-entropy an attack raises."""
        return torch.zeros(len(self.clean), dtype=torch.long, device=self.clean.device)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(M, 2)`` of the perturbed rows.

        Raises:
            AttackError: the attack asks about other rows than all ``M`` of them.
        """
        if len(inputs) != len(self.clean):
            raise AttackError(
                f"The attack asked about {len(inputs)} of {len(self.clean)} perturbed rows; expected all of them, as a "
                "score knows rows by their places. Use an attack that moves the whole batch, such as PGD."
            )
        score = self.score(inputs if self._shape is None else inputs.reshape(self._shape))
        self._keep_better(inputs.detach(), score.detach())
        logits: Tensor = _Logits.apply(score - self.clean_score)
        return logits

    def score(self, inputs: Tensor, rows: Tensor | None = None, alone: bool = True) -> Tensor:
        """The score itself ``(K,)``, in single precision at least, for attacks that need no classifier.

        Args:
            inputs: ``(K, ...)`` perturbed inputs.
            rows: ``(K,)`` the rows that they belong to; None: all ``M`` rows in their order. The other rows have the
                embeddings that the last call with ``rows`` gave them, at first the clean ones, and cost no pass.
            alone: whether ``backward`` gives a gradient to the inputs alone, and not to what the loop made with them
                and beside them, such as weights that are no model's. ``torch.autograd.grad`` does not need this.

        Raises:
            AttackError: the score has another shape than ``(M,)`` or ``()``.
        """
        if not alone or not (inputs.requires_grad and torch.is_grad_enabled()):
            return self._scored(inputs, rows)
        leaf = inputs.detach().requires_grad_()
        score: Tensor = _OfInputsAlone.apply(inputs, [self._scored(leaf, rows), leaf])
        return score

    def _scored(self, inputs: Tensor, rows: Tensor | None) -> Tensor:
        if inputs.requires_grad:
            inputs.register_hook(partial(self._watch_gradient, rows))
        embeddings = self._embed(inputs) if rows is None else self._embed(inputs, rows)
        if rows is None:
            return self._per_row(self._score(embeddings))
        embeddings = self._latest.index_copy(0, rows, embeddings.to(self._latest.dtype))
        self._latest = embeddings.detach()
        return self._per_row(self._score(embeddings))[rows]

    @contextmanager
    def taking(self, shape: torch.Size) -> Iterator[None]:
        """Inside, the model gets what it is called with in another shape ``(M, ...)``."""
        self._shape = shape
        try:
            yield
        finally:
            self._shape = None

    def mean_score(self, inputs: Tensor) -> Tensor:
        """The mean of `score` over ``samples`` draws."""
        return torch.stack([self.score(inputs) for _ in range(self.samples)]).mean(0)

    def keep_best(self, clean_inputs: Tensor) -> None:
        """From now on, ``best_inputs`` holds for each row the inputs with the highest score of all that were passed."""
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

    def _per_row(self, score: Tensor) -> Tensor:
        count = len(self.clean)
        if not isinstance(score, Tensor) or score.shape not in ((), (count,)):
            found = f"of shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise AttackError(
                f"A score {found} was given; expected one per perturbed row, ({count},), or a scalar tensor."
            )
        if score.dtype in (torch.float16, torch.bfloat16):
            score = score.float()
        return score if score.ndim else score.expand(count)


class _OfInputsAlone(torch.autograd.Function):
    """A score, whose backward pass gives a gradient to the inputs, and to no other leaf of its graph."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, held: list[Tensor]) -> Tensor:
        ctx.held = held
        return held[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        score, leaf = ctx.held
        if not score.requires_grad:
            return None, None
        return torch.autograd.grad(score, leaf, gradient, retain_graph=_is_retained(), allow_unused=True)[0], None


def _is_retained() -> bool:
    """Whether the backward pass that is running was called with ``retain_graph=True``; True where torch cannot tell.

    Compiled models may refuse a graph that is kept without need: they reuse its memory.
    """
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # not in torch 2.4
    return asked is None or asked()


class _Logits(torch.autograd.Function):
    """Scores ``(M,)`` -> logits ``(M, 2)``. The derivative is written out, which saves operations in each attack step.

    The cross-entropy, softplus(-lead), is a sigmoid of the score, with tails that fall like 1 / |score|.
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
