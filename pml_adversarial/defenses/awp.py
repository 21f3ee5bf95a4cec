"""AWP: training also withstands a change of the model's weights that raises the adversarial loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.checks import check_number
from ..errors import PluginError
from ..plugins.hookspecs import hookimpl
from ..training.batch import Adversarial, Batch
from ..training.isolation import preserved
from ..training.plan import Plan
from ..training.rerun import recomputed_in

_ASKED_BY_COMPILE = "The .grad attribute of a Tensor that is not a leaf"  # torch.compile looks at it


class AWP:
    """Adversarial weight perturbation (Wu, Xia and Wang, NeurIPS 2020, arXiv 2004.05884), with any other plugin.

    After the attack on the inputs, one step of gradient ascent is taken on the weights of the model: each weight tensor
    w of two dimensions or more becomes ``w + v`` with ``v = gamma |w| g / |g|``, where g is the gradient of the
    adversarial loss. The perturbed rows are embedded with ``w + v``, and the loss of these embeddings is what training
    minimises. The optimiser then changes w. So the loss becomes flat around w, which generalises better under attack.

    It spends one more pass of the perturbed rows, forward and backward. Clean rows, if they are kept beside the
    perturbed ones, stay embedded with w. As the attack grows in the warm-up, so does gamma. In a batch that several
    processes share, each process moves its weights by the gradient of its own rows.

    Args:
        gamma: length of v as a share of the length of w, from 0 on. The paper has 0.01 at eps 8/255.

    Raises:
        InputError: gamma is no finite number from 0 on.

    Example:
        >>> from torch import nn
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> from pml_adversarial import AdversarialLoss
        >>> loss_func = AdversarialLoss(ContrastiveLoss(), nn.Flatten(), plugins=[AWP(gamma=0.005)])
    """

    def __init__(self, gamma: float = 0.01) -> None:
        self.gamma = check_number("gamma", gamma)

    @hookimpl(wrapper=True, tryfirst=True)
    def pml_adversarial_training_loss(
        self,
        wrapped: nn.Module,
        batch: Batch,
        plan: Plan,
        adversarial: Adversarial,
        ask: Callable[[Any, Adversarial], Tensor],
    ) -> Generator[None, Tensor, Tensor]:
        """What the other plugins minimise, at the weights that are worst for it."""
        unperturbed = adversarial.inputs is adversarial.clean_inputs
        if not torch.is_grad_enabled() or unperturbed or not batch.strength * self.gamma:
            return (yield)
        weights = _weights(batch.replay.modules)
        with preserved(wrapped):  # a memory meets this batch once, below
            value = yield
            gradients = list(_gradients(value, adversarial.embeddings, weights))
        moved = _moved(weights, gradients, batch.strength * self.gamma)
        rows = batch.local(batch.own(plan.rows, plan.rows))

        @contextmanager
        def at_worst() -> Iterator[None]:
            with (
                preserved(*batch.replay.modules),  # BatchNorm has seen these rows already
                _exchanged(batch.replay.modules, weights, moved),
                recomputed_in(lambda: at_worst),
            ):
                yield

        with at_worst():
            embeddings = batch.replay.embed(adversarial.inputs, rows)
        return ask(self, replace(adversarial, embeddings=batch.gather_copies(embeddings, plan.rows)))


def _weights(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The weight tensors that are moved, each once: no biases, no scales, no frozen weights."""
    found = {id(weight): weight for module in modules for weight in module.parameters()}
    return [weight for weight in found.values() if weight.requires_grad and weight.ndim > 1]


def _gradients(value: Tensor, embeddings: Tensor, weights: Sequence[Tensor]) -> Iterable[Tensor | None]:
    """Of the loss in the weights, through the perturbed rows alone; the graph of the clean rows is kept."""
    (of_rows,) = torch.autograd.grad(value, embeddings, retain_graph=True, allow_unused=True)
    if of_rows is None or not weights:
        return [None] * len(weights)
    try:
        return torch.autograd.grad(embeddings, weights, of_rows, allow_unused=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PluginError(
            f"AWP takes the gradient of the loss in the weights by torch.autograd.grad, which raises: {error} If the "
            "model uses activation checkpoints, expected checkpoint(..., use_reentrant=False); else leave out AWP."
        ) from error


def _moved(weights: Iterable[Tensor], gradients: Iterable[Tensor | None], gamma: float) -> list[Tensor]:
    """``w + v`` for each weight w. A weight that was not used, or has no gradient, stays."""
    moved = []
    for weight, gradient in zip(weights, gradients, strict=True):
        length = None if gradient is None else gradient.norm()
        share = 0 if length is None else torch.where(length > 0, gamma * weight.detach().norm() / length, 0)
        moved.append(weight if gradient is None else weight + share * gradient)
    return moved


@contextmanager
def _exchanged(modules: Iterable[nn.Module], weights: Iterable[Tensor], others: Iterable[Tensor]) -> Iterator[None]:
    """Inside, modules compute with other weights, wherever a weight is used."""
    instead = {id(weight): other for weight, other in zip(weights, others, strict=True)}
    held: Iterable[dict[str, Any]] = {id(m): m._parameters for module in modules for m in module.modules()}.values()
    before = [(parameters, dict(parameters)) for parameters in held]
    try:
        for parameters, weights_of in before:
            parameters.update({name: instead.get(id(weight), weight) for name, weight in weights_of.items()})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _ASKED_BY_COMPILE)
            yield
    finally:
        for parameters, weights_of in before:
            parameters.update(weights_of)
