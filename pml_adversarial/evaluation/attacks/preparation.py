"""Attacks that have to know which queries are evaluated before they run, and what they say about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..retrieval.task import RetrievalTask
from .kinds import Perturb, QueryAttack, RetrievalAttack


@runtime_checkable
class Prepares(Protocol):
    """A `Perturb` with one more method."""

    def prepared(self, task: RetrievalTask, rows: Tensor, radii: Sequence[float]) -> tuple[Perturb, list[str]]:
        """What runs in its place on the queries ``rows`` ``(n,)`` at all eps, and notes for the reader of the report.

        Raises:
            InputError: it cannot run on these queries.
        """


def prepared(attack: RetrievalAttack, task: RetrievalTask, rows: Tensor, radii: Sequence[float]) -> RetrievalAttack:
    """The attack, ready for the queries ``rows`` ``(n,)``. What it has to say about them joins the task's notes."""
    if not isinstance(attack, QueryAttack) or not isinstance(attack.perturb, Prepares):
        return attack
    perturb, notes = attack.perturb.prepared(task, rows, radii)
    task.notes.extend(f"{attack.name}: {note}" for note in notes)
    return replace(attack, perturb=perturb)
