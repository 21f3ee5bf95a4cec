"""The default method, that of arXiv 2102.07265, as the package's own plugin: it answers all five questions.

The chosen members of the tuples get copies, and the copies are perturbed while the rest of the batch stays fixed. The
attack raises a score of distances without a margin, since a satisfied hinge has no gradient. Then the wrapped loss is
taken on tuples that are re-pointed to the copies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ..attacks import adapter, presets
from ..attacks.ball import radius_text
from ..attacks.checks import check_number, check_whole
from ..attacks.objective import Attack, AttackFactory, Objective, Score
from ..errors import PlanError
from ..training.batch import Adversarial, Batch, CallSignature
from ..training.isolation import random_stream
from ..training.loss_calls import Enqueuing, check_scalar, name_of
from ..training.loss_support import Copies, LossSupport, support_of
from ..training.loss_trials import LossTrials, with_copies
from ..training.loss_tuples import own_tuples, rows_in_own_tuples, tuples_to_give, with_own_triplets
from ..training.objectives import OwnLoss, ViolationScore, distance_of, partners_of, unreduced
from ..training.options import shown
from ..training.plan import Plan, attackable_rows, clean_loss, plan_rows, replace_rows
from ..training.records import nobody_perturbed
from ..training.tuples import ROLES, IndicesTuple, Role, keep_tuples, parse_roles
from .hookspecs import hookimpl

logger = logging.getLogger("pml_adversarial")


_COUNT_IN = {
    "plan": ("perturb", "tuples_per_anchor", "keep_clean", "copies"),
    "attack": ("eps", "steps", "attack"),
    "training_loss": ("keep_clean", "clean_weight"),
}
"""Question -> options that count where `FixedContext` answers it."""


class FixedContext:
    """The package's own method: chosen rows are perturbed while the rest of the batch is held fixed.

    Every option left out has its default. To set some of them: ``AdversarialLoss(loss, model,
    method=FixedContext(perturb="anchor"))``, or ``AdversarialLoss(loss, model, perturb="anchor")``.

    Args:
        eps: radius of the attack, in pixels of [0, 1]; default 8/255, or that of ``attack``.
        steps: attack steps; default 3, or those of ``attack``.
        attack: an attack factory, see `attacks`; default `attacks.preset`.
        perturb: "anchor", "positive", "negative", several of them, or "all", the default.
        tuples_per_anchor: how many tuples of each anchor are kept, each with copies of its own. By default all are
            kept, with one copy per row and role.
        keep_clean: whether training sees the clean rows beside the perturbed ones; default True, for a miner False.
        clean_weight: weight of the unperturbed loss that is added; default 0.
        copies: how copies may stand in a loss of your own, see `loss_support.Copies`. By default the loss is asked.
        for_miner: whether a miner is wrapped. It names rows by place, so copies then replace rows in their places.

    Attributes:
        given: question -> names of the options that were set for it.

    Raises:
        AttackError: eps, steps or attack cannot be used.
        PlanError: perturb, tuples_per_anchor or copies cannot be used.
        InputError: clean_weight cannot be used.
    """

    def __init__(
        self,
        *,
        eps: float | None = None,
        steps: int | None = None,
        attack: AttackFactory | None = None,
        perturb: Role | Iterable[Role] | None = None,
        tuples_per_anchor: int | None = None,
        keep_clean: bool | None = None,
        clean_weight: float | None = None,
        copies: Copies | None = None,
        for_miner: bool = False,
    ) -> None:
        if tuples_per_anchor is not None:
            check_whole("tuples_per_anchor", tuples_per_anchor, hint=", or None to keep all tuples", error=PlanError)
        self.clean_weight = 0.0 if clean_weight is None else check_number("clean_weight", clean_weight)
        self.attack = presets.attack_of(attack, eps, steps)
        self.roles = parse_roles("all" if perturb is None else perturb)
        self.given = _given(
            eps=eps,
            steps=steps,
            attack=attack,
            perturb=perturb,
            tuples_per_anchor=tuples_per_anchor,
            keep_clean=keep_clean,
            clean_weight=clean_weight,
            copies=copies,
        )
        self.tuples_per_anchor = tuples_per_anchor
        self.keep_clean = not for_miner if keep_clean is None else keep_clean
        self.for_miner = for_miner
        self.in_place = for_miner or (self.roles == ROLES and tuples_per_anchor is None)
        self.copies = self._checked_copies(copies)
        self._supports: dict[CallSignature, LossSupport] = {}
        self._accepted: set[CallSignature] = set()
        self._said: set[str] = set()

    def __repr__(self) -> str:
        return f"FixedContext({shown(self.shown_options())})"

    def shown_options(self) -> dict[str, Any]:
        """The options in force, by name, for a ``repr``."""
        of_attack = presets.shown_options(self.attack)
        if isinstance(of_attack.get("eps"), float):
            of_attack["eps"] = radius_text(of_attack["eps"])
        return {
            **of_attack,
            "perturb": "all" if self.roles == ROLES else " and ".join(self.roles),
            "tuples_per_anchor": self.tuples_per_anchor,
            "keep_clean": None if self.for_miner else self.keep_clean,
            "clean_weight": self.clean_weight or None,
            "copies": self.copies,
        }

    @hookimpl(trylast=True)
    def pml_adversarial_plan(self, wrapped: nn.Module, batch: Batch) -> Plan:
        """Which rows play the chosen roles, and where their copies stand, as finely as the loss tells roles apart."""
        self._check_call(wrapped, batch)
        rows = rows_in_own_tuples(wrapped, batch) if self.in_place and self.roles == ROLES else None
        if rows is not None:
            if _meets_weights_alone(wrapped, batch):
                rows = attackable_rows(batch)
            if isinstance(wrapped, Enqueuing):
                rows = rows[rows < batch.num_queries]  # the others join the memory as they are
            self._check_inputs_known(rows, batch)
            plan = replace_rows(rows, batch.num_rows, None).split(batch.num_queries)
        elif (tuples := own_tuples(wrapped, batch)) is None:
            plan = self._plan_without_tuples(batch)
        else:
            if self.tuples_per_anchor is not None:
                tuples = keep_tuples(tuples, self.tuples_per_anchor)
            plan = self._plan_of_tuples(wrapped, batch, tuples)
        if batch.num_attackable < batch.num_rows and not (known := batch.can_be_perturbed(plan.rows)).all():
            plan = plan.keep(known.nonzero().flatten(), batch.num_rows)
        return replace(plan, keeps_clean=self.keep_clean)

    @hookimpl(trylast=True)
    def pml_adversarial_score(self, wrapped: nn.Module, batch: Batch, plan: Plan) -> Score:
        """The distance of a copy to its furthest positive partner, minus the distance to its nearest negative one.

        The loss itself is raised where there are no partners: in a loss that is a sum over rows (classification,
        proxies), and without labels and tuples.
        """
        if not self.for_miner and (
            _meets_weights_alone(wrapped, batch) or self._support_of(wrapped, batch).is_row_separable
        ):
            return OwnLoss(unreduced(wrapped), batch, plan)
        if batch.labels is None and batch.indices_tuple is None:
            return OwnLoss(wrapped, batch, plan)
        return ViolationScore(distance_of(wrapped), batch.context, *partners_of(plan, wrapped, batch))

    @hookimpl(trylast=True)
    def pml_adversarial_attack(self, objective: Objective, batch: Batch) -> Attack:
        """The attack that was asked for, at the strength of the step."""
        return adapter.build(self.attack, objective, batch.strength)

    @hookimpl(trylast=True)
    def pml_adversarial_training_loss(
        self, wrapped: nn.Module, batch: Batch, plan: Plan, adversarial: Adversarial
    ) -> Tensor:
        """The wrapped loss of the plan's rows, plus the weighted loss of the clean batch.

        Where clean rows are kept, it is the loss of one batch that holds rows and copies. It is the mean of two losses,
        of the clean batch and of the plan, where one batch cannot hold both: copies stand for single roles; without
        labels a row and its copy would count as different; or the loss does not take them, `LossSupport.beside_clean`.
        """
        trained = self._trained_on(plan, wrapped, batch)
        loss: Tensor = trained.evaluate(wrapped, batch, adversarial.embeddings)
        apart = plan.keeps_clean and trained is plan
        if not (apart or self.clean_weight):
            return loss
        clean = clean_loss(wrapped, batch)
        return ((loss + clean) / 2 if apart else loss) + self.clean_weight * clean

    @hookimpl(trylast=True)
    def pml_adversarial_record(self, batch: Batch, plan: Plan, adversarial: Adversarial) -> Mapping[str, Any]:
        """How far inputs, embeddings and scores of this process's own copies moved."""
        rows = batch.own(plan.rows, plan.rows)
        if not len(rows):
            return nobody_perturbed(batch.strength)
        change = (adversarial.inputs - adversarial.clean_inputs).reshape(len(rows), -1).float()
        shift = batch.own(adversarial.embeddings - plan.rows_of(batch.embeddings), plan.rows).float()
        return {
            "strength": batch.strength,
            "num_perturbed": len(rows),
            "perturbation_linf": torch.linalg.vector_norm(change, torch.inf),
            "perturbation_l2": change.norm(dim=1).mean(),
            "embedding_shift": shift.norm(dim=1).mean(),
            "share_score_rose": (adversarial.score_after > adversarial.score_before).mean(dtype=torch.float32),
            "share_zero_gradient": adversarial.zero_gradient.mean(dtype=torch.float32),
            "attack_seconds": adversarial.seconds,
        }

    def _plan_without_tuples(self, batch: Batch) -> Plan:
        if not self.in_place and self.roles != ROLES:
            self._warn_once(
                f"perturb={self.roles}: without labels and tuples there are no roles, so all rows are perturbed."
            )
        return replace_rows(attackable_rows(batch), batch.num_rows, None).split(batch.num_queries)

    def _plan_of_tuples(self, wrapped: nn.Module, batch: Batch, tuples: IndicesTuple) -> Plan:
        """The plan with copies for the chosen roles; where the loss does not take it, the one that replaces rows."""
        replaced = plan_rows(tuples, self.roles, batch.num_rows)
        self._check_inputs_known(replaced.rows, batch)
        given = tuples_to_give(wrapped, batch, tuples, self.tuples_per_anchor is not None)
        replaced = Plan(replaced.rows, replaced.pool_indices, given).split(batch.num_queries)
        if self.in_place or not len(replaced):
            return replaced
        name, several = name_of(wrapped), (self.tuples_per_anchor or 1) > 1
        support = self._support_of(wrapped, batch)
        copies = support.copies_for(self.roles, batch.num_queries < batch.num_rows)
        logger.debug("%s: copies=%r", name, copies)
        plans = with_copies(batch, tuples, self.roles, self.tuples_per_anchor)
        if copies == "replace":
            self._check_replaced(name, plans["append"], replaced)
            return replaced
        plan = plans.get(copies)
        if plan is None or (several and not support.may_copy_per_tuple(self.roles, len(tuples))):
            raise PlanError(self._another_loss(name))
        return plan

    def _check_replaced(self, name: str, appended: Plan, replaced: Plan) -> None:
        if self.tuples_per_anchor and len(appended) > len(replaced):
            raise PlanError(self._another_loss(name))
        if self.roles != ROLES and self.copies != "replace":
            self._warn_once(
                f"perturb={self.roles}: {name} does not take copies of single members of its tuples. Each row that "
                "plays one of these roles is perturbed in all of its tuples, whatever else it is. To say that this is "
                "meant, use copies='replace'; to perturb single roles, use a loss of pairs or triplets."
            )

    def _another_loss(self, name: str) -> str:
        return (
            f"{name} does not keep its value when the members of its tuples are copied, so "
            f"tuples_per_anchor={self.tuples_per_anchor} with perturb={self.roles} would train another loss. Use "
            "tuples_per_anchor=None; or, with a loss of pairs or triplets, tuples_per_anchor=1."
        )

    def _support_of(self, wrapped: nn.Module, batch: Batch) -> LossSupport:
        """What the loss can take: from the table; if that does not know it, from the user; else the loss is asked."""
        if batch.call_signature not in self._supports:
            self._supports[batch.call_signature] = self._found_support(wrapped, batch)
        return self._supports[batch.call_signature]

    def _found_support(self, wrapped: nn.Module, batch: Batch) -> LossSupport:
        name, known = name_of(wrapped), support_of(wrapped)
        if known is None:
            return self._ask(name, wrapped, batch)
        if self.copies is None or self.copies == known.copies:
            return known
        if self.copies != "replace":
            raise PlanError(
                f"copies={self.copies!r}, but {name} takes copies={known.copies!r}. Leave copies out: it is for losses "
                "that pytorch-metric-learning does not have."
            )
        return replace(known, copies="replace")

    def _ask(self, name: str, wrapped: nn.Module, batch: Batch) -> LossSupport:
        trials = LossTrials(wrapped, batch)
        copies = self.copies
        if copies is None:
            copies = "replace" if self.in_place else trials.copies(self.roles, self.tuples_per_anchor)
            if copies is None:
                raise PlanError(
                    f"{name} is not in the table of losses, and has no value on trial batches of 8 to {len(batch)} "
                    f"random embeddings ({trials.error!r}), so it is not known how copies may stand for "
                    f"perturb={self.roles}. Say it: AdversarialLoss(..., copies='append') if the loss looks only at "
                    "rows that its tuples name, copies='replace' if it looks at others."
                )
            if not self.in_place:
                self._warn_once(
                    f"{name} is not in the table of losses. It was asked on {len(cast(Batch, trials.batch))} random "
                    f"embeddings, and takes copies={copies!r}. If that is right, say so: "
                    f"AdversarialLoss(..., copies={copies!r})."
                )
        if trials.batch is None:
            self._warn_once(
                f"{name} is not in the table of losses, and has no value on trial batches of 8 to {len(batch)} random "
                f"embeddings ({trials.error!r}). The attack raises a score of distances, and clean and perturbed rows "
                "are trained on in two batches."
            )
        return LossSupport(
            copies=copies,
            takes_tuples=trials.takes_tuples(),
            is_row_separable=trials.is_row_separable(),
            beside_clean=trials.takes_copies_beside_clean(),
        )

    def _check_call(self, wrapped: nn.Module, batch: Batch) -> None:
        """What the loss refuses, it refuses before anything is spent; with its own error."""
        signature = batch.call_signature
        if self.for_miner or signature in self._accepted:
            return
        with torch.no_grad(), random_stream(0, 0):  # a resumed run comes here again, and has to draw the same numbers
            check_scalar(wrapped, clean_loss(wrapped, batch))
        takes_tuples = self.tuples_per_anchor is None or self._support_of(wrapped, batch).takes_tuples
        if batch.labels is not None and not takes_tuples:
            raise PlanError(
                f"{name_of(wrapped)} takes no tuples, so tuples_per_anchor={self.tuples_per_anchor} has none to "
                "choose from. Use tuples_per_anchor=None."
            )
        self._accepted.add(signature)

    def _trained_on(self, plan: Plan, wrapped: nn.Module, batch: Batch) -> Plan:
        """The plan of which training takes the loss: with clean rows beside their copies, where they are kept."""
        if not (plan.keeps_clean and plan.replaces(batch.num_rows)) or batch.labels is None:
            return plan
        if _tells_images_apart(batch) and not isinstance(wrapped, Enqueuing):
            return plan
        support = self._support_of(wrapped, batch)
        if not (support.beside_clean and support.holds(2 * batch.num_queries)):
            return plan
        return with_own_triplets(plan.beside_clean(batch.num_rows), wrapped, batch)

    def _checked_copies(self, copies: Copies | None) -> Copies | None:
        if copies is not None and copies not in get_args(Copies):
            raise PlanError(f"copies={copies!r}; expected one of {', '.join(map(repr, get_args(Copies)))}, or None.")
        if copies not in (None, "replace") and self.in_place:
            raise PlanError(
                f"copies={copies!r} has no effect where every row is perturbed: copies then replace the rows. Leave it "
                "out, or choose roles, as in perturb='positive'."
            )
        return copies

    def _warn_once(self, message: str, key: str | None = None) -> None:
        if (key or message) not in self._said:
            self._said.add(key or message)
            logger.warning(message)

    def _check_inputs_known(self, rows: Tensor, batch: Batch) -> None:
        queries = torch.arange(batch.num_queries, device=rows.device)
        if batch.num_attackable == batch.num_rows or batch.can_be_perturbed(rows).all():
            return
        if not batch.can_be_perturbed(queries).all():
            self._warn_once(
                f"The inputs of {batch.num_rows - batch.num_attackable} of {batch.num_rows} rows are not known, such "
                "as features of a cache or of a model under no_grad. These rows stay as they are.",
                "rows",
            )
        elif "perturb" not in self.given.get("plan", ()):
            self._warn_once(
                "The inputs of rows in ref_emb are not known, such as those of a memory, of a model under no_grad, or "
                "means of embeddings. These rows stay as they are. perturb='anchor' says that this is meant.",
                "reference",
            )
        else:
            raise PlanError(
                f"perturb={self.roles} names members that stand in ref_emb, whose inputs are not known: no watched "
                "model gave them with gradient, or several inputs make one row. Use perturb='anchor', or compute "
                "ref_emb with the watched model."
            )


def _given(**options: Any) -> dict[str, tuple[str, ...]]:
    """Question -> options that the user set and that count in it."""
    found = {q: tuple(name for name in names if options.get(name) is not None) for q, names in _COUNT_IN.items()}
    return {question: names for question, names in found.items() if names}


def _meets_weights_alone(wrapped: nn.Module, batch: Batch) -> bool:
    """Whether there is one row, and it is compared with what the loss learns, such as proxies."""
    return batch.num_rows == 1 and next(wrapped.parameters(), None) is not None


def _tells_images_apart(batch: Batch) -> bool:
    """Whether queries have positives in the reference alone, as two views of images have; a copy would be a third."""
    queries = cast(Tensor, batch.labels)[: batch.num_queries]
    return batch.num_queries < batch.num_rows and (batch.shared_labels or len(queries.unique()) == len(queries))
