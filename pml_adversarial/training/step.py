"""One adversarial step: mine, perturb the chosen members while the rest of the batch stays fixed, take the loss again.

`AdversarialStep.train` is the method of the paper (arXiv 2102.07265) from top to bottom. The plugins answer what
differs from method to method; this module decides when they are asked, and in which state of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..attacks import adapter
from ..attacks.objective import Attack, Objective, Score
from ..errors import InputError
from . import distributed, monitor
from .batch import Adversarial, Batch
from .capture import CHECK_EVERY, InputCapture
from .collate import Collator
from .isolation import depends_on_mode, isolated, preserved, random_stream
from .monitor import CollapseMonitor, Losses, SearchMargin, batch_recall
from .pixels import PixelSpace
from .plan import Plan, clean_loss, take
from .schedule import EpsSchedule
from .side_effects import keep_graphs, undone, undone_with_values
from .tuples import IndicesTuple


class Questions(Protocol):
    """Who answers the five questions of a step, see `plugins.hookspecs.HookSpecs`."""

    def plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """Who is perturbed, and where the copies stand."""

    def score(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
        """What the attack raises."""

    def attack(self, objective: Objective, batch: Batch, plan: Plan) -> Attack:
        """How it is raised."""

    def own_attack(self, objective: Objective, batch: Batch, plan: Plan) -> Attack | None:
        """The attack that the user set; None where a plugin brings its own."""

    def training_loss(self, wrapped: nn.Module, batch: Batch, plan: Plan, adversarial: Adversarial) -> Tensor:
        """What training minimises."""

    def record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> list[Mapping[str, Any]]:
        """What is worth recording."""

    def state_dict(self) -> dict[str, Any]:
        """What the plugins remember."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned."""


class Perturbed(NamedTuple):
    """What an attack found for the copies of this process.

    Attributes:
        clean_inputs: ``(K, ...)`` before the attack.
        inputs: ``(K, ...)``; the same tensor as ``clean_inputs`` where the attack left them as they were, on purpose.
        zero_gradient: ``(K,)`` bool, rows whose gradient was zero in every attack step.
        seconds: that the attack took.
        score: what was raised; None where this process has no copies.
    """

    clean_inputs: Tensor
    inputs: Tensor
    zero_gradient: Tensor
    seconds: float = 0.0
    score: Score | None = None


class AdversarialStep:
    """The steps of one wrapper, which may be a loss or a miner.

    Args:
        hooks: who answers the five questions.
        capture: knows the inputs of embeddings, and embeds others in the same way.
        pixels: knows what of the inputs may be changed.
        schedule: how eps grows.
        monitor: watches R@1 within the batch, and holds the attack back while it falls.
        seed: of the attack's own random numbers; None: ``torch.initial_seed()``. Each process has numbers of its own.
        joint: whether the processes of ``torch.distributed`` share one batch, and each attacks its own rows.

    Attributes:
        step: number of the coming step.
    """

    def __init__(
        self,
        hooks: Questions,
        capture: InputCapture,
        pixels: PixelSpace,
        schedule: EpsSchedule,
        monitor: CollapseMonitor,
        seed: int | None = None,
        joint: bool = False,
    ) -> None:
        if seed is not None and not isinstance(seed, int):
            raise InputError(f"seed={seed!r}; expected a whole number, or None for torch.initial_seed().")
        self.hooks, self.capture, self.pixels = hooks, capture, pixels
        self.schedule, self.monitor = schedule, monitor
        self.seed = torch.initial_seed() if seed is None else seed
        self.step = 0
        self._seed_of_rank = self.seed
        self._collator = Collator(capture, pixels, joint)

    def collate(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Batch:
        """The arguments of a PML loss, checked, as one batch, see `Collator.collate`.

        Processes that share a batch take seed, step and monitor from the first of them.
        """
        given = embeddings, labels, indices_tuple, ref_emb, ref_labels
        own_state = lambda: (self.seed, self.step, self.monitor.state_dict())  # noqa: E731
        batch, state = self._collator.collate(*given, own_state, enqueue_mask, inputs)
        if state is not None:
            self.seed, self.step, monitored = state
            self.monitor.load_state_dict(monitored)
        self._seed_of_rank = distributed.seed_of_rank(self.seed)
        return replace(batch, strength=self.schedule.at(self.step) * self.monitor.share)

    def train(self, wrapped: nn.Module, batch: Batch) -> tuple[Tensor, list[Mapping[str, Any]]]:
        """One step of adversarial training.

        Args:
            wrapped: the loss.
            batch: what `collate` returned.

        Returns:
            What training minimises: a scalar with gradient. And the records of the step, none where no row was
            perturbed.
        """
        plan, adversarial = self.perturb(wrapped, batch, trains=True)
        if adversarial is None:
            value, answers = clean_loss(wrapped, batch), []
        else:
            value = self.hooks.training_loss(wrapped, batch, plan, adversarial)
            change = {"loss_before": adversarial.loss_before, "loss_after": value}
            answers = [*self.record(batch, plan, adversarial), change]
        if self.step % monitor.EVERY == 0:
            self._monitor(wrapped, batch, plan, adversarial, value)
        self.step += 1  # here, so that a step that failed is taken again
        return value, answers

    def perturb(self, wrapped: nn.Module, batch: Batch, trains: bool = False) -> tuple[Plan, Adversarial | None]:
        """Plans and attacks while the context is fixed, then embeds the perturbed inputs again, with gradient.

        Args:
            wrapped: the loss, or the miner.
            batch: what `collate` returned.
            trains: whether the loss of the unperturbed copies is measured as well.

        Returns:
            The plan, and what became of its rows; None where it perturbs no row.
        """
        modules = batch.replay.modules
        learning = self._learning(wrapped, *modules)
        depends_on = depends_on_mode(*modules)  # asked before everything is set to eval mode
        with learning, isolated(wrapped, *modules, but=batch.replay.kept_in_mode), self.random_numbers():
            seen = replace(batch, context=self._embed_clean(batch)) if depends_on else batch
            plan = batch.decide(partial(self.hooks.plan, wrapped, seen))
            perturbed = batch.agree(partial(self._attack, wrapped, seen, plan)) if len(plan) else None
        if perturbed is None:
            return plan, None
        adversarial = self._embed_again(batch, plan, perturbed)
        return plan, self._measured(wrapped, batch, plan, adversarial, None if depends_on else perturbed.score, trains)

    def perturb_only(self, wrapped: nn.Module, batch: Batch) -> tuple[Plan, Adversarial | None]:
        """As `perturb`, without training: embedding the perturbed inputs leaves no trace in the model either."""
        with random_stream(self._seed_of_rank, ~self.step), preserved(*batch.replay.modules):
            return self.perturb(wrapped, batch)

    def record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> list[Mapping[str, Any]]:
        """What the plugins find worth recording."""
        with torch.no_grad():
            return self.hooks.record(batch, plan, adversarial)

    def random_numbers(self) -> AbstractContextManager[Callable[[], None]]:
        """Inside, random numbers come from the attack's own stream, the same numbers each time until the next step.

        It gives a function that starts the stream again.
        """
        return random_stream(self._seed_of_rank, self.step)

    def state_dict(self) -> dict[str, Any]:
        """Step, seed, monitor, and what the plugins remember, in types that load with ``weights_only``."""
        return {
            "step": self.step,
            "seed": self.seed,
            "monitor": self.monitor.state_dict(),
            "plugins": self.hooks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned.

        Raises:
            PluginError: the state is that of other plugins.
        """
        self.hooks.load_state_dict(state["plugins"])
        self.step, self.seed = state["step"], state["seed"]
        self.monitor.load_state_dict(state["monitor"])

    def _learning(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """Finds out now and then what passes change in place, see `side_effects.undone_with_values`."""
        if self.step % CHECK_EVERY:
            return nullcontext()
        return undone_with_values([inside for module in modules for inside in module.modules()], learns=True)

    def _attack(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Perturbed:
        """Perturbs this process's own copies."""
        rows = batch.own(plan.rows, plan.rows)
        inputs = take(batch.inputs, batch.places_of(rows))  # no copy of them where all rows are perturbed
        if not len(rows):
            return Perturbed(inputs, inputs, torch.zeros_like(rows, dtype=torch.bool))
        start = time.perf_counter()
        score = self.hooks.score(wrapped, batch, plan)
        clean = plan.rows_of(batch.context)
        of_own: Score = score
        if len(rows) < len(plan):
            own = batch.own(torch.arange(len(plan), device=rows.device), plan.rows)
            of_own, clean = _ScoreOfSome(score, clean, own), clean[own]
        objective = _objective(batch, rows, of_own, clean)
        attack = self.hooks.attack(objective, batch, plan)
        found = adapter.run(attack, inputs, objective.labels, objective)
        if isinstance(attack, adapter.Learns) and found is not inputs:
            found.requires_grad_().register_hook(attack.learn)
        seconds = 0.0 if attack is adapter.unchanged else time.perf_counter() - start
        return Perturbed(inputs, found, objective.zero_gradient, seconds, score)

    def _embed_clean(self, batch: Batch) -> Tensor:
        """The context ``(N, D)`` of the model in its present mode. Rows without known inputs stay as they are."""
        with torch.no_grad():
            known = batch.gather_rows(batch.replay.embed(batch.inputs))
        if batch.known_rows is not None:
            return batch.context.index_copy(0, batch.known_rows, known.to(batch.context.dtype))
        return torch.cat([known, batch.context[len(known) :]])

    def _embed_again(self, batch: Batch, plan: Plan, perturbed: Perturbed) -> Adversarial:
        """The perturbed copies, embedded with gradient by the model in its own mode."""
        if perturbed.inputs is perturbed.clean_inputs:  # copies are their rows: no pass is spent, dropout draws nothing
            embeddings = batch.embeddings[batch.own(plan.rows, plan.rows)]
        else:
            inside = [m for module in batch.replay.modules for m in module.modules()]
            keep_graphs(inside)  # of the clean rows
            with undone(inside):
                rows = batch.local(batch.own(plan.rows, plan.rows))
                embeddings = self._embed_in_own_mode(batch, perturbed.inputs, rows)
        if any(isinstance(m, DistributedDataParallel) and m.static_graph for m in batch.replay.modules):
            embeddings = embeddings + 0 * batch.embeddings.sum()  # it averages only where its own output goes backward
        copies = batch.gather_copies(embeddings, plan.rows)
        return Adversarial(perturbed.inputs, perturbed.clean_inputs, copies, perturbed.zero_gradient, perturbed.seconds)

    def _embed_in_own_mode(self, batch: Batch, inputs: Tensor, rows: Tensor) -> Tensor:
        try:
            return batch.replay.embed(inputs, rows)
        except ValueError as error:
            if len(inputs) != 1:
                raise
            raise InputError(
                f"One copy was perturbed, and the model cannot embed a single row: {error}. BatchNorm in train mode "
                "takes its statistics from the rows. Set it to eval mode (freeze it), or let a step perturb more rows."
            ) from error

    def _measured(
        self, wrapped: nn.Module, batch: Batch, plan: Plan, adversarial: Adversarial, score: Score | None, trains: bool
    ) -> Adversarial:
        """The same with what the attack changed: scores, and what training would minimise without it.

        Where the model depends on its mode, the score is asked for again (``score`` is None): rows and copies are
        compared in the model's own mode.
        """
        with self._learning(wrapped), isolated(wrapped), self.random_numbers() as restart, torch.no_grad():
            if score is None:
                score = self.hooks.score(wrapped, batch, plan)
                restart()
            before = batch.own(_per_row(score(plan.rows_of(batch.context)), plan), plan.rows)
            restart()
            after = batch.own(_per_row(score(adversarial.embeddings), plan), plan.rows)
            adversarial = replace(adversarial, score_before=before, score_after=after)
            if not trains:
                return adversarial
            unperturbed = replace(
                adversarial,
                inputs=adversarial.clean_inputs,
                embeddings=plan.rows_of(batch.embeddings),
                score_after=before,
            )
            return replace(adversarial, loss_before=self.hooks.training_loss(wrapped, batch, plan, unperturbed))

    def _monitor(
        self, wrapped: nn.Module, batch: Batch, plan: Plan, adversarial: Adversarial | None, value: Tensor
    ) -> None:
        """Tells the monitor how well the batch is retrieved, and what the attack did to the loss ``value``."""
        if batch.labels is None or not batch.num_rows:
            return
        copies = batch.embeddings[:0] if adversarial is None else adversarial.embeddings
        with torch.no_grad():
            recall, attacked = batch_recall(wrapped, batch, plan, copies).tolist()
        at_full_strength = batch.strength == 1.0 and attacked == attacked
        if at_full_strength and self.step and self.step % monitor.SEARCHED_EVERY == 0:
            searched = self._search_attacked(wrapped, batch, plan)
            if searched == searched:
                self.monitor.measure_searched(searched)
        if recall == recall:
            losses = _losses(adversarial, value) if at_full_strength else None
            self.monitor.measure(self.step, recall, attacked if at_full_strength else None, losses)

    def _search_attacked(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> float:
        """R@1 within the batch under the user's attack, where it raises the margin of the search; NaN without one."""
        modules = batch.replay.modules
        depends_on = depends_on_mode(*modules)
        with isolated(wrapped, *modules, but=batch.replay.kept_in_mode), self.random_numbers():
            seen = replace(batch, context=self._embed_clean(batch)) if depends_on else batch
            rows = batch.own(plan.rows, plan.rows).unique()
            if not len(rows):
                return math.nan
            score = SearchMargin(wrapped, seen, rows)
            objective = _objective(batch, rows, score, seen.context[rows])
            attack = self.hooks.own_attack(objective, batch, plan)
            if attack is None or attack is adapter.unchanged:
                return math.nan
            found = adapter.run(attack, take(batch.inputs, batch.places_of(rows)), objective.labels, objective)
            with torch.no_grad():
                return score.recall(batch.replay.embed(found, batch.local(rows))).item()


def _losses(adversarial: Adversarial | None, value: Tensor) -> Losses | None:
    """The loss before and after the attack; None if it is not one number, which is refused elsewhere."""
    if adversarial is None or adversarial.loss_before is None or value.numel() != 1:
        return None
    before, after = torch.stack([part.detach().reshape(()) for part in (adversarial.loss_before, value)]).tolist()
    return before, after


def _objective(batch: Batch, rows: Tensor, score: Score, clean: Tensor) -> Objective:
    """A score of this process's own rows ``(K,)``, with clean embeddings ``(K, D)``, as what an attack raises."""
    of_replay, replay = batch.local(rows), batch.replay
    embed = lambda x, some=None: replay.embed(x, of_replay if some is None else of_replay[some])  # noqa: E731
    return Objective(embed, score, clean, replay.modules, kept_in_mode=replay.kept_in_mode)


def _per_row(score: Tensor, plan: Plan) -> Tensor:
    return score if score.ndim else score.expand(len(plan.rows))


class _ScoreOfSome:
    """The score of some of the copies, while the others stay at their clean embeddings."""

    def __init__(self, score: Score, clean: Tensor, some: Tensor) -> None:
        self._score, self._clean, self._some = score, clean, some

    def __call__(self, embeddings: Tensor) -> Tensor:
        found = self._score(self._clean.index_copy(0, self._some, embeddings.to(self._clean)))
        return found[self._some] if found.shape == self._clean.shape[:1] else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._score, name)
