"""Makes any PML miner adversarially aware: `AdversarialMiner` mines, perturbs, and mines again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.utils.distributed import DistributedMinerWrapper
from torch import Tensor, nn

from .attacks import adapter
from .attacks.objective import AttackFactory
from .errors import InputError, PlanError, PluginError
from .plugins.fixed_context import FixedContext
from .plugins.manager import Hooks, find_all
from .training import distributed, options, records
from .training.batch import Batch
from .training.capture import InputCapture, Models
from .training.distributed import JointBatch
from .training.monitor import CollapseMonitor
from .training.pixels import Bounds, Normalization, PixelSpace
from .training.plan import Plan, untouched
from .training.records import Records
from .training.schedule import EpsSchedule
from .training.sources import Choice
from .training.step import AdversarialStep
from .training.tracing import paused, plain
from .training.tuples import IndicesTuple, Role, checked_tuples, map_members, shift_partners
from .training.wrapper import Wrapper

__all__ = ["AdversarialMiner"]


class AdversarialMiner(Wrapper, BaseMiner):
    """Wraps a PML miner: it mines, perturbs rows that play the chosen roles, and mines again on the attacked batch.

    The indices are those of the caller's batch, so they fit any loss. In ``.eval()`` it is the wrapped miner. The model
    is left as it was: mining updates no running statistics and draws none of the caller's random numbers.

    Around PML's ``DistributedMinerWrapper`` the batch is the union of what the processes hold, and indices count as PML
    counts there: own rows first, then those of the other ranks in rank order.

    Attributes and methods of the wrapped miner are found, and set, on the wrapper too.

    Args:
        miner: a tuple miner of PML, available as ``.miner``.
        perturb: rows that play one of these roles in a mined tuple are perturbed in all of their tuples; default "all".
        plugins: as in `AdversarialLoss`, but ``training_loss`` is not asked.
        warmup: as in `AdversarialLoss`; default 0, as nothing is trained here.
        model, eps, steps, attack, total_steps, normalization, bounds, channel_dim, perturb_input, at: as in
            `AdversarialLoss`.
        chunk, seed: as in `AdversarialLoss`.

    Raises:
        AdversarialError: see `errors`.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.miners import BatchHardMiner
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
        >>> miner = AdversarialMiner(BatchHardMiner(), model, eps=8 / 255)
        >>> images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) // 2
        >>> anchors, positives, negatives = miner(model(images), labels)
        >>> anchors.tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    _wraps = "miner"

    def __init__(
        self,
        miner: BaseMiner,
        model: Models | None = None,
        *,
        eps: float | None = None,
        steps: int | None = None,
        attack: AttackFactory | None = None,
        perturb: Role | Iterable[Role] | None = None,
        plugins: Iterable[Any] = (),
        warmup: float | None = None,
        total_steps: int | None = None,
        normalization: Normalization | None = None,
        bounds: Bounds | None = None,
        channel_dim: int | None = None,
        perturb_input: str | None = None,
        at: nn.Module | None = None,
        chunk: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        options.check_miner(miner, model)
        options.check_inputs(perturb_input, at, bounds, chunk)
        if isinstance(miner, AdversarialMiner):
            raise InputError(
                "miner is an AdversarialMiner already; expected a miner to be made adversarial. Perturb several roles "
                "with perturb=(...), or add methods with plugins=[...]."
            )
        own = FixedContext(eps=eps, steps=steps, attack=attack, perturb=perturb, for_miner=True)
        warmup = options.warmup_steps(warmup, total_steps, default=0)
        if warmup:
            adapter.check_warmup(own.attack)
        hooks = Hooks(find_all(plugins), own)
        _check_asked(hooks)
        self._shown = options.shown(own.shown_options(), hooks.named, bounds=bounds, warmup=f"{warmup} steps")
        self.miner = miner
        self._inputs: Tensor | None = None
        self.adversary = AdversarialStep(
            hooks,
            InputCapture(model, Choice(perturb_input, at), chunk),
            PixelSpace(normalization, bounds, channel_dim),
            EpsSchedule(warmup),
            CollapseMonitor(guarded=False),
            seed,
            joint=isinstance(miner, DistributedMinerWrapper),
        )
        records.declare(self, Records.names())

    @property
    def records(self) -> Records:
        """What the last step did. Numbers that no step has measured yet are NaN."""
        return records.read(self, Records)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
    ) -> IndicesTuple:
        """Indices of tuples among the attacked embeddings, see `mine`.

        Args:
            embeddings: ``(N, D)``.
            labels: ``(N,)``.
            ref_emb: ``(R, D)``, or None.
            ref_labels: ``(R,)``, or None.
            inputs: as in `AdversarialLoss.forward`.
        """
        self._inputs = inputs
        try:
            found: IndicesTuple = super().forward(embeddings, labels, ref_emb, ref_labels)
        finally:
            self._inputs = None
        return found

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> IndicesTuple:
        """Indices of tuples among the attacked embeddings.

        Args:
            embeddings: ``(N, D)`` as the model returned them, see `AdversarialLoss`.
            labels: ``(N,)``.
            ref_emb: ``(R, D)``, or ``embeddings`` itself where there is no reference.
            ref_labels: ``(R,)``.
        """
        with plain((embeddings, ref_emb)), paused():
            return self._mined(embeddings, labels, ref_emb, ref_labels)

    def _mined(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> IndicesTuple:
        reference = () if ref_emb is embeddings and ref_labels is labels else (ref_emb, ref_labels)
        if not self.training:
            return self.miner(embeddings, labels, *reference)
        ref, of_ref = reference or (None, None)
        batch = self.adversary.collate(embeddings, labels, None, ref, of_ref, None, self._inputs)
        with self.adversary.random_numbers():  # the caller's numbers are for the tuples that are returned
            found = self._mine(untouched(batch, None), batch, batch.embeddings[:0])
        batch = replace(batch, indices_tuple=_in_batch_rows(found, batch))
        plan, adversarial = self.adversary.perturb_only(self._of_the_batch, batch)
        if adversarial is None:
            records.clear(self, strength=batch.strength)
        else:
            _check_places(plan, batch)
            found = self._mine(plan, batch, adversarial.embeddings)
            records.write(self, self.adversary.record(batch, plan, adversarial))
        self.adversary.step += 1  # here, so that a step that failed is taken again
        return _own_first(found, batch) if isinstance(batch, JointBatch) else found

    @property
    def _of_the_batch(self) -> BaseMiner:
        """The miner of a batch that needs no gathering any more."""
        return self.miner.miner if isinstance(self.miner, DistributedMinerWrapper) else self.miner

    def _mine(self, plan: Plan, batch: Batch, copies: Tensor) -> IndicesTuple:
        mined: IndicesTuple = plan.evaluate(
            lambda queries, labels, _, *reference: self._of_the_batch(queries, labels, *reference), batch, copies
        )
        return mined


def _check_asked(hooks: Hooks) -> None:
    idle = [type(plugin).__name__ for plugin in hooks.named if hooks.questions_of(plugin) == {"training_loss"}]
    if idle:
        raise PluginError(
            f"{', '.join(idle)} answers nothing but training_loss, which a miner does not ask; expected plugins that "
            "change what is perturbed. Give it to AdversarialLoss(loss, model, plugins=[...])."
        )


def _check_places(plan: Plan, batch: Batch) -> None:
    row = torch.cat([torch.arange(len(batch), device=plan.rows.device), plan.rows])
    seen = plan.pool_indices if plan.ref_pool_indices is None else torch.cat([plan.pool_indices, plan.ref_pool_indices])
    if len(plan.pool_indices) != batch.num_queries or not torch.equal(row[seen], row[: len(batch)]):
        raise PlanError(
            f"A plugin planned to show the miner {len(seen)} rows in places of their own, and what is mined there "
            f"would not name rows of the caller's {len(batch)}; expected a plan that replaces rows in place. Give the "
            "plugin to AdversarialLoss(loss, model, plugins=[...])."
        )


def _in_batch_rows(mined: IndicesTuple, batch: Batch) -> IndicesTuple:
    in_reference = len(batch) - batch.num_queries
    mined = checked_tuples(mined, batch.num_queries, in_reference or batch.num_queries)
    return shift_partners(mined, batch.num_queries) if in_reference else mined


def _own_first(mined: IndicesTuple, batch: JointBatch) -> IndicesTuple:
    """As PML numbers the rows of all ranks, so that the tuples fit its ``DistributedLossWrapper``."""
    queries, reference = batch.own_sizes
    per_rank = {"anchor": queries, "positive": reference or queries, "negative": reference or queries}
    return map_members(mined, lambda role, rows: distributed.own_first(rows, per_rank[role]))
