"""One step: plan, attack with the context fixed, re-embed. The only place that asks the plugins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..attacks import adapter
from ..attacks.objective import Objective, Score
from ..errors import InputError, PluginError
from ..plugins.hookspecs import PROJECT
from ..plugins.manager import make_manager
from . import distributed
from .batch import Adversarial, Batch
from .collate import Intake
from .isolation import depends_on_mode, isolated, preserved, random_stream
from .monitor import Strength
from .pixels import PixelSpace
from .plan import Plan
from .replay import InputCapture
from .tuples import IndicesTuple

_ANSWERS: dict[str, Any] = {
    "plan": Plan,
    "score": Callable,
    "attack": Callable,
    "training_loss": Tensor,
    "record": Mapping,
}


class _Attacked(NamedTuple):
    """Perturbed inputs (None: left as they were, on purpose), rows without gradient, seconds, and what was raised."""

    inputs: Tensor | None
    zero_gradient: Tensor
    seconds: float = 0.0
    score: Score | None = None


class Adversary:
    """Perturbs batches for one wrapper, which may be a loss or a miner.

    Args:
        plugins: who answers, in the order in which they are asked; the last is the package's own.
        capture: knows the inputs of embeddings.
        pixels: knows what of them may be changed.
        strength: the share of an attack's budget that a step may spend; None: all of it.
        seed: of the attack's own random stream; None: ``torch.initial_seed()``. Each rank has a stream of its own.
        joint: whether the processes of ``torch.distributed`` share one batch and each attacks its part.
    """

    def __init__(
        self,
        plugins: Iterable[Any],
        capture: InputCapture,
        pixels: PixelSpace,
        strength: Strength | None = None,
        seed: int | None = None,
        joint: bool = False,
    ) -> None:
        if seed is not None and not isinstance(seed, int):
            raise InputError(f"seed={seed!r}; expected a whole number, or None for torch.initial_seed().")
        self.plugins = tuple(plugins)
        self.capture, self.intake = capture, Intake(capture, pixels, joint)
        self.strength = strength or Strength(guarded=False)
        self.seed = torch.initial_seed() if seed is None else seed
        self.step = 0
        self.manager = make_manager(self.plugins)

    def own_randomness(self) -> AbstractContextManager[None]:
        """Within it nobody draws the caller's random numbers; the same ones are drawn until the next step."""
        return random_stream(distributed.seed_of_rank(self.seed), self.step)

    def batch(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Batch:
        """The arguments of a PML loss, checked, as one `Batch`; nothing is spent yet.

        Where the processes share one batch, it is the union of what they hold, with the tuples of rank 0. Seed, step
        and strength are those of rank 0 from then on, as `DistributedDataParallel` does it with the weights.

        Raises:
            CaptureError: the inputs behind the embeddings are not known.
            InputError: embeddings, labels or inputs cannot be used.
            PlanError: the tuples cannot be used.
        """
        rank_0 = self.seed, self.step, self.strength.state_dict()
        batch, rank_0 = self.intake.batch(embeddings, labels, indices_tuple, ref_emb, ref_labels, rank_0)
        self.seed, self.step, strength = rank_0
        self.strength.load_state_dict(strength)
        return replace(batch, strength=self.strength.at(self.step))

    def perturb(self, wrapped: nn.Module, batch: Batch) -> tuple[Plan, Adversarial | None]:
        """Plans, attacks and re-embeds. Who calls it counts the step, once nothing can fail any more.

        Returns:
            The plan, and what became of its rows: None where it perturbs nobody.
        """
        depends = depends_on_mode(*self.capture.modules)  # asked before everything is set to eval mode
        with self.own_randomness(), isolated(wrapped, *self.capture.modules):
            seen = replace(batch, context=self.intake.embed_clean(batch)) if depends else batch
            plan = self._plan(wrapped, seen)
            attacked = self._attack_own(wrapped, seen, plan) if len(plan) else None
        if attacked is None:
            return plan, None
        inputs = attacked.inputs
        own = batch.own(plan.rows)
        rows = plan.rows[own]
        # A copy that was left as it was, on purpose, is its row: no pass is spent, and dropout draws nothing anew.
        embeddings = batch.embeddings[rows] if inputs is None else self.intake.embed_perturbed(batch, inputs)
        inputs = batch.inputs_of(rows) if inputs is None else inputs
        if any(isinstance(m, DistributedDataParallel) and m.static_graph for m in self.capture.modules):
            embeddings = embeddings + 0 * batch.embeddings.sum()  # it averages only if what it returned is walked back
        if batch.world_size > 1:
            embeddings = _gather_copies(batch, plan, embeddings)
        before, after = self._scores(wrapped, batch, plan, embeddings, None if depends else attacked.score)
        return plan, Adversarial(inputs, embeddings, before[own], after[own], attacked.zero_gradient, attacked.seconds)

    def rehearse(self, wrapped: nn.Module, batch: Batch) -> tuple[Plan, Adversarial | None]:
        """As `perturb`, for those who look and do not train: the re-embedding leaves no trace either."""
        with random_stream(distributed.seed_of_rank(self.seed), ~self.step), preserved(*self.capture.modules):
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
        return {"step": self.step, "seed": self.seed, "strength": self.strength.state_dict(), "plugins": states}

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
        self.strength.load_state_dict(state["strength"])
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
        answer = getattr(self.manager.hook, f"{PROJECT}_{question}")(**arguments)
        for one in answer if question == "record" else [answer]:
            if not isinstance(one, expected := _ANSWERS[question]):
                raise PluginError(
                    f"A plugin answered {PROJECT}_{question} with {type(one).__name__}; expected {expected.__name__}, "
                    "or None for no opinion."
                )
        return answer

    def _plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """Who is perturbed; of processes that share the batch, rank 0 says it to all."""

        def asked() -> Plan:
            plan: Plan = self._ask("plan", wrapped=wrapped, batch=batch)
            return plan

        if batch.world_size == 1:
            return asked()
        return distributed.decide(lambda: asked().to("cpu")).to(batch.embeddings.device)

    def _attack_own(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> _Attacked:
        """Attacks the copies of this process's rows. An error on one rank is one on all."""
        if batch.world_size == 1:
            return self._attack(wrapped, batch, plan)
        return distributed.agree(lambda: self._attack(wrapped, batch, plan), lambda _: None)[0]

    def _attack(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> _Attacked:
        own = batch.own(plan.rows)
        if not len(own):
            return _Attacked(None, torch.zeros_like(own, dtype=torch.bool))
        start = time.perf_counter()
        score: Score = self._ask("score", wrapped=wrapped, batch=batch, plan=plan)
        clean = batch.context[plan.rows]
        of_own = score if len(own) == len(plan) else _score_of_some(score, clean, own)
        objective = Objective(partial(self.intake.embed, batch), of_own, clean[own], self.capture.modules)
        attack = self._ask("attack", objective=objective, batch=batch, plan=plan)
        if attack is adapter.unchanged:
            return _Attacked(None, torch.zeros_like(objective.has_gradient), score=score)
        inputs = adapter.run(attack, batch.inputs_of(plan.rows[own]), objective.labels)
        if isinstance(attack, adapter.Learns):
            inputs.requires_grad_().register_hook(attack.learn)
        return _Attacked(inputs, objective.zero_gradient, time.perf_counter() - start, score)

    def _scores(
        self, wrapped: nn.Module, batch: Batch, plan: Plan, embeddings: Tensor, score: Score | None
    ) -> tuple[Tensor, Tensor]:
        """The scores of the rows and of their copies, both in the model's own mode.

        Where that makes no difference, ``score`` is what the attack raised; else, None, it is asked for anew.
        """
        with isolated(wrapped), torch.no_grad():
            if score is None:
                with self.own_randomness():
                    score = self._ask("score", wrapped=wrapped, batch=batch, plan=plan)
            with self.own_randomness():
                before = score(batch.context[plan.rows])
            with self.own_randomness():  # the same, for a score that draws
                after = score(embeddings.detach())
        return before.expand(len(plan)), after.expand(len(plan))


def _score_of_some(score: Score, clean: Tensor, some: Tensor) -> Score:
    """The score of some of the copies, while the others stay at their clean embeddings."""

    def of_some(embeddings: Tensor) -> Tensor:
        found = score(clean.index_copy(0, some, embeddings.to(clean)))
        return found[some] if found.shape == clean.shape[:1] else found

    return of_some


def _gather_copies(batch: Batch, plan: Plan, own: Tensor) -> Tensor:
    """The copies of all ranks in the order of the plan; own ones carry gradient."""
    owners = batch.owners(plan.rows)
    by_rank = distributed.gather_rows(own, torch.bincount(owners, minlength=batch.world_size).tolist())
    return by_rank[owners.argsort(stable=True).argsort()]
