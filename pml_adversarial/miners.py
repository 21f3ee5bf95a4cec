"""Makes any PML miner adversarially aware: `AdversarialMiner` mines, perturbs, and mines again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor

from . import attacks, records
from .adversary import Adversary
from .attacks import AttackFactory
from .batch import IndicesTuple
from .capture import InputCapture, Models
from .defaults import FixedContext
from .errors import InputError
from .pixels import Normalization, PixelSpace
from .plugins import find_all


class AdversarialMiner(BaseMiner):
    """Wraps a PML miner: it mines, perturbs rows that play the chosen roles, and mines again on the attacked batch.

    The indices are those of the caller's batch, so they serve any loss. In ``.eval()`` it is the wrapped miner. The
    model is left as it was found: mining updates no running statistics and draws none of the caller's random numbers.

    Args:
        miner: any tuple miner of pytorch-metric-learning, available as ``.miner``.
        model: as in `AdversarialLoss`.
        attack: as in `AdversarialLoss`.
        perturb: rows that play one of these roles in a mined tuple are perturbed wherever they stand; "all" by default.
        plugins: as in `AdversarialLoss`; ``training_loss`` is not asked.
        warmup: as in `AdversarialLoss`.
        normalization: as in `AdversarialLoss`.
        seed: as in `AdversarialLoss`.

    Example:
        >>> from pytorch_metric_learning.miners import BatchHardMiner
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
        >>> miner = AdversarialMiner(BatchHardMiner(), model)
        >>> images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) // 2
        >>> anchors, positives, negatives = miner(model(images), labels)
        >>> anchors.tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(
        self,
        miner: BaseMiner,
        model: Models | None = None,
        *,
        attack: AttackFactory = attacks.SEED_PAPER,
        perturb: str | Iterable[str] = "all",
        plugins: Iterable[Any] = (),
        warmup: int = 0,
        normalization: Normalization | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(miner) or isinstance(miner, type | BaseMetricLossFunction | AdversarialMiner):
            found = f"the class {miner.__name__}" if isinstance(miner, type) else type(miner).__name__
            raise InputError(f"miner is {found}; expected a tuple miner of pytorch-metric-learning.")
        own = FixedContext(attack, perturb, in_place=True)
        if warmup:
            attacks.check_warmup(attack)
        self.miner = miner
        self.adversary = Adversary(
            [*find_all(plugins), own], InputCapture(model), PixelSpace(normalization), warmup, seed
        )
        records.declare(self, records.STANDARD)

    def watch(self, model: Models) -> None:
        """Takes the inputs of ``model`` from now on; needed when the model was exchanged."""
        self.adversary.capture.watch(model)

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> IndicesTuple:
        """Indices of tuples among the attacked embeddings.

        Args:
            embeddings: ``(N, D)`` as the model returned them, see `AdversarialLoss`.
            labels: ``(N,)``.
            ref_emb: ``(R, D)``, or ``embeddings`` itself where there is no reference.
            ref_labels: ``(R,)``.
        """
        reference = () if ref_emb is embeddings else (ref_emb, ref_labels)
        indices_tuple: IndicesTuple = self.miner(embeddings, labels, *reference)
        if not self.training:
            return indices_tuple
        batch = self.adversary.batch(embeddings, labels, indices_tuple, *reference)
        plan, adversarial = self.adversary.rehearse(self.miner, batch)
        if adversarial is None:
            records.clear(self, strength=batch.strength)
            return indices_tuple
        records.write(self, self.adversary.records(batch, plan, adversarial))
        attacked = torch.cat([batch.embeddings, adversarial.embeddings])
        queries = attacked[plan.layout]
        if plan.ref_layout is None:
            return self.miner(queries, labels)
        return self.miner(queries, labels, attacked[plan.ref_layout], ref_labels)

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs: step, seed, the plugins' states."""
        return self.adversary.state_dict()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_extra_state` gave."""
        self.adversary.load_state_dict(state)
