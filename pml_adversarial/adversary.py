"""One step: plan, attack with the context fixed, re-embed. The only place that asks the plugins."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import attacks
from .batch import Adversarial, Batch, IndicesTuple
from .capture import InputCapture
from .errors import InputError, PluginError
from .hookspecs import PROJECT
from .isolation import depends_on_mode, isolated, preserved, random_stream
from .objective import Objective, Score
from .pixels import PixelSpace
from .plan import Plan, checked_tuples, shift_partners
from .plugins import make_manager


class Adversary:
    """Perturbs batches for one wrapper, which may be a loss or a miner.

    Args:
        plugins: who answers, in the order in which they are asked; the last is the package's own.
        capture: knows the inputs of embeddings.
        pixels: knows what of them may be changed.
        warmup: steps over which the strength grows linearly from 0 to 1.
        seed: of the attack's own random stream; None: ``torch.initial_seed()``.
    """

    def __init__(
        self,
        plugins: Iterable[Any],
        capture: InputCapture,
        pixels: PixelSpace,
        warmup: int = 0,
        seed: int | None = None,
    ) -> None:
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise InputError(f"warmup={warmup!r}; expected a whole number of training steps, 0 for none.")
        if seed is not None and not isinstance(seed, int):
            raise InputError(f"seed={seed!r}; expected a whole number, or None for torch.initial_seed().")
        self.plugins = tuple(plugins)
        self.capture, self.pixels, self.warmup = capture, pixels, warmup
        self.seed = torch.initial_seed() if seed is None else seed
        self.step = 0
        self.manager = make_manager(self.plugins)

    @property
    def strength(self) -> float:
        """Share of the attack's budget to be spent in the coming step."""
        return min(1.0, self.step / self.warmup) if self.warmup else 1.0

    def batch(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Batch:
        """The arguments of a PML loss, checked, as one `Batch`; nothing is spent yet.

        Raises:
            CaptureError: the inputs behind the embeddings are not known.
            InputError: labels or inputs cannot be used.
            PlanError: the tuples cannot be used.
        """
        _check_labels("labels", labels, "embeddings", embeddings)
        _check_labels("ref_labels", ref_labels, "ref_emb", ref_emb)
        if indices_tuple is not None:
            partners = embeddings if ref_emb is None else ref_emb
            indices_tuple = checked_tuples(indices_tuple, len(embeddings), len(partners))
        inputs, columns = self.capture.source_of(embeddings)
        if len(inputs) != len(embeddings):
            raise InputError(
                f"{len(inputs)} inputs gave {len(embeddings)} embeddings; expected a model that gives one per input."
            )
        num_queries, shared_labels = len(embeddings), False
        labels = None if labels is None else labels.to(embeddings.device)
        if ref_emb is not None and ref_emb is not embeddings:
            if self.capture.knows(ref_emb, columns):
                inputs = torch.cat([inputs, self.capture.inputs_of(ref_emb)])
            embeddings = torch.cat([embeddings, ref_emb])
            shared_labels = labels is not None and ref_labels is labels
            labels = None if labels is None or ref_labels is None else torch.cat([labels, ref_labels.to(labels)])
            indices_tuple = None if indices_tuple is None else shift_partners(indices_tuple, num_queries)
        pixels = self.pixels.to_pixels(inputs)
        context = embeddings.detach()
        return Batch(
            pixels, embeddings, context, labels, indices_tuple, num_queries, self.strength, shared_labels, columns
        )

    def perturb(self, wrapped: nn.Module, batch: Batch) -> tuple[Plan, Adversarial | None]:
        """Plans, attacks and re-embeds; the step counts as taken.

        Returns:
            The plan, and what became of its rows: None where it perturbs nobody.
        """
        depends = depends_on_mode(*self.capture.modules)  # asked before everything is set to eval mode
        with random_stream(self.seed, self.step), isolated(wrapped, *self.capture.modules):
            seen = replace(batch, context=self._embed_clean(batch)) if depends else batch
            plan: Plan = self._ask("plan", wrapped=wrapped, batch=seen)
            attacked = self._attack(wrapped, seen, plan) if len(plan) else None
        self.step += 1
        if attacked is None:
            return plan, None
        inputs, zero_gradient, seconds = attacked
        # A copy that was left as it was, on purpose, is its row: no pass is spent, and dropout draws nothing anew.
        embeddings = batch.embeddings[plan.rows] if inputs is None else self._embed(batch, inputs)
        inputs = batch.inputs[plan.rows] if inputs is None else inputs
        before, after = self._scores(wrapped, batch, plan, embeddings)
        return plan, Adversarial(inputs, embeddings, before, after, zero_gradient, seconds)

    def rehearse(self, wrapped: nn.Module, batch: Batch) -> tuple[Plan, Adversarial | None]:
        """As `perturb`, for those who look and do not train: the re-embedding leaves no trace either."""
        with random_stream(self.seed, ~self.step), preserved(*self.capture.modules):
            return self.perturb(wrapped, batch)

    def training_loss(self, wrapped: nn.Module, batch: Batch, plan: Plan, adversarial: Adversarial) -> Tensor:
        """What is optimised in place of the wrapped loss."""
        loss: Tensor = self._ask("training_loss", wrapped=wrapped, batch=batch, plan=plan, adversarial=adversarial)
        return loss

    def records(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> list[Mapping[str, Any]]:
        """What the plugins found worth recording."""
        with torch.no_grad():
            answers: list[Mapping[str, Any]] = self._ask("record", batch=batch, plan=plan, adversarial=adversarial)
        return answers

    def state_dict(self) -> dict[str, Any]:
        """Step, seed and what the plugins remember, in types that load with ``weights_only``."""
        states = {name: plugin.state_dict() for name, plugin in self._stateful().items()}
        return {"step": self.step, "seed": self.seed, "plugins": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            PluginError: the state is of other plugins.
        """
        stateful = self._stateful()
        if set(state["plugins"]) != set(stateful):
            raise PluginError(
                f"The saved state is of the plugins {sorted(state['plugins'])}, this wrapper has {sorted(stateful)}; "
                "build it with the same plugins in the same order."
            )
        self.step, self.seed = state["step"], state["seed"]
        for name, plugin in stateful.items():
            plugin.load_state_dict(state["plugins"][name])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "manager"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.manager = make_manager(self.plugins)

    def _stateful(self) -> dict[str, Any]:
        both = ("state_dict", "load_state_dict")
        return {
            f"{i}_{type(plugin).__name__}": plugin
            for i, plugin in enumerate(self.plugins)
            if all(hasattr(plugin, method) for method in both)
        }

    def _ask(self, question: str, **arguments: Any) -> Any:
        return getattr(self.manager.hook, f"{PROJECT}_{question}")(**arguments)

    def _embed(self, batch: Batch, pixels: Tensor) -> Tensor:
        return self.capture.embed(self.pixels.to_inputs(pixels))[..., batch.columns]

    def _embed_clean(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            known = self._embed(batch, batch.inputs)
        return torch.cat([known, batch.context[len(known) :]])

    def _attack(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> tuple[Tensor | None, Tensor, float]:
        """Perturbed inputs (None: left as they were, on purpose), rows without gradient, seconds."""
        start = time.perf_counter()
        score: Score = self._ask("score", wrapped=wrapped, batch=batch, plan=plan)
        objective = Objective(partial(self._embed, batch), score, batch.context[plan.rows], self.capture.modules)
        attack = self._ask("attack", objective=objective, batch=batch, plan=plan)
        if attack is attacks.unchanged:
            return None, torch.zeros_like(objective.has_gradient), 0.0
        inputs = attacks.run(attack, batch.inputs[plan.rows], objective.labels)
        return inputs, objective.zero_gradient, time.perf_counter() - start

    def _scores(self, wrapped: nn.Module, batch: Batch, plan: Plan, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of the rows and of their copies, both in the model's own mode."""
        with isolated(wrapped), torch.no_grad():
            score: Score = self._ask("score", wrapped=wrapped, batch=batch, plan=plan)
            before, after = score(batch.context[plan.rows]), score(embeddings.detach())
        return before.expand(len(plan)), after.expand(len(plan))


def _check_labels(name: str, labels: Tensor | None, of: str, embeddings: Tensor | None) -> None:
    if labels is None or embeddings is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != embeddings.shape[:1]:
        found = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"are {type(labels).__name__}"
        raise InputError(
            f"{name} {found} for {of} of shape {tuple(embeddings.shape)}; expected a tensor of one label per row, "
            f"({len(embeddings)},)."
        )
