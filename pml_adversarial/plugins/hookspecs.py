"""The questions a plugin may answer, in the order a batch meets them.

A plugin takes only the arguments that it needs, by name. None means "no opinion". The package's own plugin,
`fixed_context.FixedContext`, is asked last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy
from torch import Tensor, nn

from ..attacks.objective import Attack, Objective, Score
from ..training.batch import Adversarial, Batch
from ..training.plan import Plan

PROJECT = "pml_adversarial"

Ask = Callable[[Any, Adversarial], Tensor]

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's answer: ``@hookimpl def pml_adversarial_score(self, wrapped, batch, plan): ...``"""


class HookSpecs:
    """Five questions about one batch."""

    @hookspec(firstresult=True)
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan | None:
        """Who is perturbed, and where do the copies stand?"""

    @hookspec(firstresult=True)
    def pml_adversarial_score(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Score | None:
        """What does the attack raise (the inner maximisation)?

        A callable on the embeddings ``(M, D)`` of the perturbed rows, giving one score per row or a scalar.
        What it holds fixed it takes from ``batch.context``.
        """

    @hookspec(firstresult=True)
    def pml_adversarial_attack(self, objective: Objective, batch: Batch, plan: Plan) -> Attack | None:
        """How is it raised?

        A callable ``(inputs, labels) -> inputs`` that maximises the cross-entropy of the objective.
        ``batch.strength`` is the share of the budget to be spent.
        """

    @hookspec(firstresult=True)
    def pml_adversarial_training_loss(
        self, wrapped: Callable[..., Tensor], batch: Batch, plan: Plan, adversarial: Adversarial, ask: Ask
    ) -> Tensor | None:
        """What is optimised (the outer minimisation)? A scalar with gradient.

        ``ask(plugin, adversarial)`` puts the same question to all other plugins than ``plugin``, for other embeddings.
        """

    @hookspec
    def pml_adversarial_record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> Mapping[str, Any] | None:
        """What is worth recording? Names and numbers; tensors of one element are read together, in one go."""
