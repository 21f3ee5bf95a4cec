"""What a loss or a miner was called with becomes one checked `Batch`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CaptureError, InputError
from . import distributed
from .batch import Batch
from .capture import InputCapture
from .distributed import JointBatch
from .isolation import depends_on_mode
from .pixels import PixelSpace
from .replay import Replay
from .tuples import IndicesTuple, checked_tuples, shift_partners

T = TypeVar("T")


class Collator:
    """Makes the batches of one wrapper.

    Args:
        capture: knows the inputs of embeddings.
        pixels: knows what of the inputs may be changed.
        joint: whether the processes of ``torch.distributed`` share one batch.
    """

    def __init__(self, capture: InputCapture, pixels: PixelSpace, joint: bool) -> None:
        self.capture, self.pixels, self.joint = capture, pixels, joint

    def collate(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        state: Callable[[], T],
        enqueue_mask: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> tuple[Batch, T | None]:
        """The arguments of a PML loss as one batch, and the state of the first of the processes that share it.

        Args:
            embeddings: ``(N, D)`` as the model returned them.
            labels: ``(N,)``, or None.
            indices_tuple: the caller's tuples, or None.
            ref_emb: ``(R, D)`` reference embeddings, or None.
            ref_labels: ``(R,)``, or None.
            state: gives the state of this process, as an object that can be pickled.
            enqueue_mask: ``(N,)`` bool, of a batch without a reference: these rows become the reference, of which no
                inputs are known. None: no such rows.

            inputs: ``(N, ...)`` the inputs of the embeddings; None: they are found.

        Returns:
            The batch, and the state of the first process; None where this process has the batch for itself.

        Raises:
            CaptureError: the inputs of the embeddings are not known.
            InputError: embeddings, labels or inputs cannot be used.
            PlanError: the tuples cannot be used.
        """
        given = embeddings, labels, indices_tuple, ref_emb, ref_labels
        world_size = distributed.world_size() if self.joint else 1
        if world_size == 1:
            return self._local(*given, world_size, enqueue_mask, inputs), None
        local, told = distributed.agree(
            lambda: self._local(*given, world_size, inputs=inputs), lambda batch: (self._form_of(batch), state())
        )
        _check_forms([form for form, _ in told])
        return _joined(local), told[0][1]

    def _local(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        world_size: int,
        enqueue_mask: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Batch:
        """What this process was given. Tuples name rows of all processes."""
        _check_rows("embeddings", embeddings, "labels", labels)
        _check_rows("ref_emb", ref_emb, "ref_labels", ref_labels)
        if indices_tuple is not None:
            partners = embeddings if ref_emb is None else ref_emb
            indices_tuple = checked_tuples(indices_tuple, world_size * len(embeddings), world_size * len(partners))
        queries = None if enqueue_mask is None else ~enqueue_mask.to(embeddings.device)
        num_queries, shared_labels = len(embeddings) if queries is None else int(queries.sum()), False
        order = None if queries is None else (~queries).long().argsort(stable=True)
        if ref_emb is embeddings and (ref_labels is None or ref_labels is labels):
            ref_emb = None  # with labels of its own it is a reference: for PML, a row is then a partner of itself
        replay = self._replay(embeddings, ref_emb, order, inputs, None if queries is None else num_queries)
        labels = None if labels is None else labels.to(embeddings.device)
        if order is not None:
            embeddings, labels = embeddings[order], None if labels is None else labels[order]
        if ref_emb is not None:
            embeddings = torch.cat([embeddings, ref_emb])
            shared_labels = labels is not None and ref_labels is labels
            labels = None if labels is None or ref_labels is None else torch.cat([labels, ref_labels.to(labels.device)])
            indices_tuple = None if indices_tuple is None else shift_partners(indices_tuple, world_size * num_queries)
        return Batch(
            inputs=replay.inputs,
            embeddings=embeddings,
            context=embeddings.detach(),
            labels=labels,
            indices_tuple=indices_tuple,
            num_queries=num_queries,
            shared_labels=shared_labels,
            replay=replay,
            known_rows=replay.known_rows,
        )

    def _replay(self, *given: Any) -> Replay:
        try:
            replay = self.capture.replay(self.pixels, *given)
            if self.joint or distributed.world_size() == 1 or replay.knows_first(len(given[0])):
                return replay
            raise CaptureError("The inputs of some of the embeddings are not known.")
        except CaptureError as error:
            if self.joint or distributed.world_size() == 1:
                raise
            raise CaptureError(
                f"{error} Among several processes, PML's wrapper hands over rows of all ranks: put it inside, as in "
                "AdversarialMiner(DistributedMinerWrapper(miner), model)."
            ) from error

    def _form_of(self, batch: Batch) -> dict[str, Any]:
        """What has to be the same in all processes."""
        return {
            "embeddings": tuple(batch.embeddings.shape),
            "type": batch.embeddings.dtype,
            "labels": None if batch.labels is None else batch.labels.dtype,
            "queries": batch.num_queries,
            "known inputs": len(batch.inputs),
            "inputs of the first rows are known": batch.known_rows is None,
            "one tensor of labels": batch.shared_labels,
            "model depends on its mode": depends_on_mode(*batch.replay.modules),
        }


def _joined(local: Batch) -> JointBatch:
    """The batches of all processes as one. Own rows carry gradient, and the tuples are those of the first process."""
    if local.known_rows is not None:
        raise InputError(
            "Rows without known inputs stand before others that have them; expected them behind, where several "
            "processes share a batch. Change the order: torch.cat([model(x), features])."
        )
    world_size, sizes = distributed.world_size(), (local.num_queries, len(local) - local.num_queries)
    embeddings = distributed.gather_parts(local.embeddings, sizes)
    labels = None if local.labels is None else distributed.gather_parts(local.labels, sizes)
    tuples = distributed.decide(lambda: _on("cpu", local.indices_tuple))
    own = {field.name: getattr(local, field.name) for field in fields(local) if field.init}
    return replace(
        JointBatch(**own, world_size=world_size, rank=distributed.rank()),
        embeddings=embeddings,
        context=embeddings.detach(),
        labels=labels,
        indices_tuple=_on(embeddings.device, tuples),
        num_queries=world_size * local.num_queries,
    )


def _on(device: torch.device | str, indices_tuple: IndicesTuple | None) -> IndicesTuple | None:
    return None if indices_tuple is None else tuple(member.to(device) for member in indices_tuple)


def _check_forms(forms: list[dict[str, Any]]) -> None:
    for rank, form in enumerate(forms):
        different = [name for name in form if form[name] != forms[0][name]]
        if different:
            first, other = (", ".join(f"{name}: {f[name]}" for name in different) for f in (forms[0], form))
            raise InputError(
                f"Rank 0 holds a batch with {first}, rank {rank} one with {other}; expected the same on all ranks. "
                "Draw batches of one size, as with drop_last=True, and put the models into one mode."
            )


def _check_rows(of: str, embeddings: Tensor | None, name: str, labels: Tensor | None) -> None:
    if embeddings is None:
        return
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
        raise InputError(f"{of} {_form(embeddings)}; expected a tensor of one row per input, (N, D).")
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != embeddings.shape[:1]):
        views = " A loss of two views is recognised by its names: forward(embeddings, ref_emb)."
        is_view = isinstance(labels, Tensor) and labels.shape == embeddings.shape
        raise InputError(
            f"{name} {_form(labels)} for {of} of shape {tuple(embeddings.shape)}; expected a tensor of one label per "
            f"row, ({len(embeddings)},).{views if is_view else ''}"
        )


def _form(found: Any) -> str:
    return f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"are {type(found).__name__}"
