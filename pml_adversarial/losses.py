"""Makes any PML loss adversarially aware: the drop-in `AdversarialLoss`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor, nn

from . import attacks, records
from .adversary import Adversary
from .attacks import AttackFactory
from .batch import Batch, IndicesTuple
from .capture import InputCapture, Models
from .defaults import FixedContext, clean_loss
from .errors import InputError
from .isolation import isolated
from .pixels import Normalization, PixelSpace
from .plan import Plan
from .plugins import find_all


class AdversarialLoss(ModuleWithRecords):
    """Wraps a PML loss: while training, chosen members of its tuples are perturbed against a fixed batch context.

    The method of "Adversarial Deep Metric Learning" (Panum et al., arXiv 2102.07265), open to others through
    ``plugins``. It is called as the loss that it wraps. In ``.eval()`` it is that loss; while training with a
    budget of 0 it equals that loss on the tuples that it keeps.

    Args:
        loss: any loss of pytorch-metric-learning, available as ``.loss``.
        model: what turns inputs into embeddings: a module, modules in forward order, or a PML trainer's
            ``models``. None: the chain of modules is found at the first call. It is not a submodule of the loss.
        attack: called with the objective, returns a callable ``(inputs, labels) -> inputs``, such as
            ``partial(torchattacks.PGD, eps=8/255)``. It moves the whole batch and returns where it arrived.
        perturb: "anchor", "positive", "negative", several of them, or "all" (every row, wherever it stands).
        tuples_per_anchor: None keeps all tuples, with one copy per row and role; ``k`` keeps k random tuples
            of each anchor, each with copies of its own (1 is the seed paper's way).
        plugins: objects, classes or names of installed plugins, asked in this order and before the package's own.
        clean_weight: weight of the unperturbed loss, added to the adversarial one.
        warmup: training steps over which eps and alpha grow linearly from 0 to their full values.
        normalization: ``(mean, std)`` per channel if the model takes normalised inputs; eps counts in pixels.
        seed: of the attack's random stream; None takes ``torch.initial_seed()``.

    Raises:
        AdversarialError: see `errors`; in particular `CaptureError` where the inputs of the embeddings are not known
            and `InputError` where they are no pixels.

    Example:
        >>> from pytorch_metric_learning.losses import TripletMarginLoss
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> loss_func = AdversarialLoss(TripletMarginLoss(margin=0.2), model)
        >>> images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) // 2
        >>> loss = loss_func(model(images), labels)
        >>> loss.backward()
        >>> bool(loss_func.loss_after > loss_func.loss_before), round(loss_func.perturbation_linf, 3)
        (True, 0.01)
    """

    def __init__(
        self,
        loss: nn.Module,
        model: Models | None = None,
        *,
        attack: AttackFactory = attacks.SEED_PAPER,
        perturb: str | Iterable[str] = "positive",
        tuples_per_anchor: int | None = None,
        plugins: Iterable[Any] = (),
        clean_weight: float = 0.0,
        warmup: int = 0,
        normalization: Normalization | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module) or isinstance(loss, BaseMiner):
            found = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
            raise InputError(f"loss is {found}; expected a loss of pytorch-metric-learning, such as ContrastiveLoss().")
        if any(isinstance(module, AdversarialLoss) for module in loss.modules()):
            raise InputError(
                "loss holds an AdversarialLoss already; expected a loss to be made adversarial. Perturb several roles "
                "with perturb=(...), add methods with plugins=[...], or add up several AdversarialLoss."
            )
        own = FixedContext(attack, perturb, tuples_per_anchor, clean_weight)
        if warmup:
            attacks.check_warmup(attack)
        self.loss = loss
        self.adversary = Adversary(
            [*find_all(plugins), own], InputCapture(model), PixelSpace(normalization), warmup, seed
        )
        records.declare(self, (*records.STANDARD, *records.OF_LOSSES))

    def watch(self, model: Models) -> None:
        """Takes the inputs of ``model`` from now on; needed when the model was exchanged."""
        self.adversary.capture.watch(model)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The adversarial loss while training, the wrapped loss in ``.eval()``.

        Args:
            embeddings: ``(N, D)`` as the model returned them: its output, outputs of several calls concatenated by
                rows, or a range of an output's columns.
            labels: ``(N,)``.
            indices_tuple: triplets or pairs from a miner; None: the loss's own.
            ref_emb: ``(R, D)`` reference embeddings, where the loss knows them.
            ref_labels: ``(R,)``.

        Returns:
            A scalar.
        """
        if not self.training:
            given = (indices_tuple,) if ref_emb is None else (indices_tuple, ref_emb, ref_labels)
            return self.loss(embeddings, labels, *given)
        _check_gradient(embeddings)
        batch = self.adversary.batch(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        plan, adversarial = self.adversary.perturb(self.loss, batch)
        if adversarial is None:
            records.clear(self, strength=batch.strength)
            return clean_loss(self.loss, batch)
        change = self._loss_change(batch, plan, adversarial.embeddings)
        loss = self.adversary.training_loss(self.loss, batch, plan, adversarial)
        records.write(self, [*self.adversary.records(batch, plan, adversarial), change])
        return loss

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs beyond the wrapped loss: step, seed, the plugins' states."""
        return self.adversary.state_dict()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_extra_state` gave."""
        self.adversary.load_state_dict(state)

    def _loss_change(self, batch: Batch, plan: Plan, adversarial: Tensor) -> dict[str, Tensor]:
        """The wrapped loss on the plan's tuples, with clean copies and with adversarial ones."""
        values = {}
        for name, copies in (("loss_before", batch.embeddings[plan.rows]), ("loss_after", adversarial)):
            with isolated(self.loss), torch.no_grad():
                values[name] = torch.as_tensor(plan.evaluate(self.loss, batch, copies))
        return values


def _check_gradient(embeddings: Tensor) -> None:
    if not isinstance(embeddings, Tensor):
        raise InputError(f"embeddings are {type(embeddings).__name__}; expected the tensor that the model returned.")
    if not torch.is_grad_enabled() or not embeddings.requires_grad:
        found = "embeddings without gradient" if torch.is_grad_enabled() else "a call under no_grad or inference_mode"
        raise InputError(
            f"Found {found} while the loss is in training mode; expected embeddings that a model computed with "
            "gradient. Call .eval() on the loss to evaluate, or compute embeddings and loss with gradient to train."
        )
