"""Makes any loss of pytorch-metric-learning (PML) adversarially aware: the drop-in `AdversarialLoss`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor, nn

from .attacks import adapter
from .attacks.objective import AttackFactory
from .attacks.presets import seed_paper_attack
from .errors import InputError
from .plugins.fixed_context import FixedContext
from .plugins.manager import Hooks, find_all
from .training import loss_calls, options, records
from .training.capture import InputCapture, Models
from .training.loss_support import Copies
from .training.monitor import CollapseMonitor
from .training.pixels import Bounds, Normalization, PixelSpace
from .training.plan import call
from .training.progress import ProgressLog
from .training.records import LossRecords
from .training.schedule import DEFAULT_WARMUP, EpsSchedule
from .training.sources import Choice
from .training.step import AdversarialStep
from .training.tracing import paused, plain, ref_of
from .training.tuples import IndicesTuple, Role
from .training.wrapper import Wrapper

__all__ = ["AdversarialLoss"]


class AdversarialLoss(Wrapper, ModuleWithRecords):
    """Wraps a PML loss. While training, it perturbs chosen rows of the batch and returns the loss of the result.

    It is called as the loss that it wraps, also with ``(embeddings, ref_emb)`` for a loss of two views such as
    `SelfSupervisedLoss`. In ``.eval()`` it is the wrapped loss. While training with a budget of 0 and
    ``keep_clean=False``, it equals the wrapped loss on the tuples that it keeps.

    The method is that of "Adversarial Deep Metric Learning" (Panum et al., arXiv 2102.07265), with options of the
    package's own as defaults: all rows are perturbed, and clean rows stay beside them. `seed_paper` is the published
    method. Other methods come as ``plugins``.

    Attributes and methods of the wrapped loss, such as ``get_logits`` or ``W``, are found on the wrapper too. An
    attribute that only the wrapped loss has is set there.

    With PML's ``DistributedLossWrapper`` inside, all processes perturb one batch, the union of their batches.

    Args:
        loss: a loss of PML, or a module of your own with ``forward(embeddings, labels)``. It is available as ``.loss``.
        model: the module that turns inputs into embeddings, or modules in forward order, or the ``models`` of a PML
            trainer, or any function of inputs. None: whatever module gave the embeddings. The model is not a submodule
            of the loss.
        eps: radius of the attack, in pixels of [0, 1]; default 8/255.
        steps: attack steps; default 3.
        attack: a factory that is called with the objective and returns a callable ``(inputs, labels) -> inputs``, such
            as ``attacks.preset(eps=4/255)`` or ``torchattacks.PGD``. ``eps`` and ``steps`` are passed on to it; its
            other options, such as ``alpha``, stay as they are.
        perturb: "anchor", "positive", "negative", several of them, or "all", the default: every row, in all its roles.
        plugins: objects, classes or names of installed plugins. They are asked in this order, before the package's own
            method.
        method: ``FixedContext(...)``, the package's own method, with the options from ``eps`` to ``copies`` set on it
            in place of here.
        keep_clean: whether clean rows and tuples stay in the loss beside the perturbed ones, as in a batch that holds
            both; the default. False: perturbed rows take their places.
        tuples_per_anchor: number of random tuples that are kept for each anchor, each with copies of its own. By
            default all tuples are kept, with one copy per row and role.
        clean_weight: weight of the unperturbed loss, which is added to the adversarial one; default 0.
        copies: how copies may stand in a loss that is not PML's: "append", "reference" or "replace". By default the
            loss is asked.
        warmup: over how many steps eps and alpha grow linearly from 0 to their full values: a number of steps (int), or
            a share of ``total_steps`` (float). Half of all steps is a good choice. Default: `schedule.DEFAULT_WARMUP`
            steps, or 0 for an attack without ``eps``, which cannot grow.
        total_steps: number of steps of the whole training, where ``warmup`` is a share of it.
        guard: whether eps and alpha are reduced while the embedding is collapsing, see `monitor`. An attack without
            ``eps`` cannot be reduced.
        normalization: ``(mean, std)`` per channel if the model takes normalised inputs. eps still counts in pixels.
        bounds: ``(low, high)`` of inputs that are no pixels in [0, 1]: two numbers, or one pair per channel as two
            lists. eps then counts as a share of the range: with bounds=(-1, 1), eps=0.1 allows a change of 0.2.
        channel_dim: the dimension that holds the channels, where ``normalization`` or ``bounds`` have several and it
            cannot be told from the shape, such as -3 for clips ``(N, T, C, H, W)``.
        perturb_input: name of the argument of the model that is perturbed, such as "pixel_values", or a key of a dict
            that it takes. By default it is the first one that holds floating point.
        at: a module inside of the model whose output is perturbed in place of inputs, such as the ``nn.Embedding`` of a
            text model. It needs ``bounds``.
        chunk: how many rows are embedded at a time, where a batch does not fit into memory. Each chunk is embedded once
            more in the backward pass.
        seed: of the attack's random numbers; None: ``torch.initial_seed()``.
        log_every: log one line in so many steps: the loss before and after the attack, the share of eps, and R@1 within
            the batch, clean and attacked; None: no lines.

    Raises:
        AdversarialError: see `errors`. In particular `InputError` and `AttackError` where an option cannot be used,
            and in a step `CaptureError` where the inputs of the embeddings are not known.

    Example:
        >>> from pytorch_metric_learning.losses import TripletMarginLoss
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> loss_func = AdversarialLoss(TripletMarginLoss(margin=0.2), model, eps=8 / 255, warmup=0)
        >>> images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) // 2
        >>> loss = loss_func(model(images), labels)
        >>> loss.backward()
        >>> now = loss_func.records
        >>> now.loss_after > now.loss_before, round(now.perturbation_linf, 3)
        (True, 0.031)
    """

    def __init__(
        self,
        loss: nn.Module,
        model: Models | None = None,
        *,
        eps: float | None = None,
        steps: int | None = None,
        attack: AttackFactory | None = None,
        perturb: Role | Iterable[Role] | None = None,
        plugins: Iterable[Any] = (),
        method: FixedContext | None = None,
        keep_clean: bool | None = None,
        tuples_per_anchor: int | None = None,
        clean_weight: float | None = None,
        copies: Copies | None = None,
        warmup: float | None = None,
        total_steps: int | None = None,
        guard: bool = True,
        normalization: Normalization | None = None,
        bounds: Bounds | None = None,
        channel_dim: int | None = None,
        perturb_input: str | None = None,
        at: nn.Module | None = None,
        chunk: int | None = None,
        seed: int | None = None,
        log_every: int | None = None,
    ) -> None:
        super().__init__()
        options.check_loss(loss, model)
        options.check_inputs(perturb_input, at, bounds, chunk)
        _check_not_adversarial(loss)
        options.check_processes(loss)
        own = _method(
            method,
            eps=eps,
            steps=steps,
            attack=attack,
            perturb=perturb,
            keep_clean=keep_clean,
            tuples_per_anchor=tuples_per_anchor,
            clean_weight=clean_weight,
            copies=copies,
        )
        has_eps = "eps" in adapter.budget(own.attack)
        warmup = options.warmup_steps(warmup, total_steps, DEFAULT_WARMUP if has_eps else 0)
        if warmup:
            adapter.check_warmup(own.attack)
        plugins = find_all(plugins)
        self._shown = options.shown(
            own.shown_options(), plugins, bounds=bounds, warmup=f"{warmup} steps", guard=guard and has_eps
        )
        self.loss = loss
        self.takes_two_views = loss_calls.takes_two_views(loss)
        self.adversary = AdversarialStep(
            Hooks(plugins, own),
            InputCapture(model, Choice(perturb_input, at), chunk),
            PixelSpace(normalization, bounds, channel_dim),
            EpsSchedule(warmup),
            CollapseMonitor(guard and has_eps),
            seed,
            joint=isinstance(loss, DistributedLossWrapper),
        )
        records.declare(self, LossRecords.names())
        self._log = None if log_every is None else ProgressLog(log_every)

    @classmethod
    def seed_paper(
        cls,
        loss: nn.Module,
        model: Models | None = None,
        *,
        eps: float | None = None,
        steps: int | None = None,
        **others: Any,
    ) -> AdversarialLoss:
        """The method of arXiv 2102.07265, without what this package adds to it.

        Positives are perturbed, one tuple is kept for each anchor, and clean rows do not stay. The attack is l-inf PGD
        from a random start, with steps of ``alpha = 2 eps / steps``. There is no warm-up and no guard.

        Args:
            loss: as in `AdversarialLoss`.
            model: as in `AdversarialLoss`.
            eps: radius, in pixels of [0, 1]; default 0.01.
            steps: attack steps; default 5.
            others: other options of `AdversarialLoss`.

        Example:
            >>> from pytorch_metric_learning.losses import TripletMarginLoss
            >>> AdversarialLoss.seed_paper(TripletMarginLoss(), nn.Flatten()).adversary.schedule.warmup
            0
        """
        published: dict[str, Any] = {"perturb": "positive", "tuples_per_anchor": 1, "keep_clean": False}
        published |= {"guard": False, "warmup": 0}
        if "attack" in others:
            published |= {"eps": eps, "steps": steps}
        else:
            published["attack"] = seed_paper_attack(eps, steps)
        return cls(loss, model, **{**published, **others})

    @property
    def records(self) -> LossRecords:
        """What the last step did. Numbers that no step has measured yet are NaN."""
        return records.read(self, LossRecords)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """The adversarial loss while training, the wrapped loss in ``.eval()``.

        Args:
            embeddings: ``(N, D)``, whatever was done to the model's outputs before, as long as each row comes from one
                input.
            labels: ``(N,)``.
            indices_tuple: triplets or pairs from a miner; None: the loss's own.
            ref_emb: ``(R, D)`` reference embeddings, where the loss knows them.
            ref_labels: ``(R,)``.
            enqueue_mask: ``(N,)`` bool, of a `CrossBatchMemory`: the rows that join the memory, which are never
                perturbed; the others are the queries. As in PML, it may also be the fourth argument.
            inputs: ``(N, ...)`` the inputs of the embeddings, where they shall not be found. They are embedded by the
                ``model`` that was given, which may be any function of inputs.

        Returns:
            A scalar.
        """
        loss: nn.Module = self.loss
        if self.takes_two_views:
            loss, ref_emb = loss_calls.TwoViews(loss), labels if ref_emb is None else ref_emb
            labels, ref_labels = loss_calls.TwoViews.labels(embeddings, ref_emb)
        elif isinstance(loss, CrossBatchMemory) and ref_emb is not None and enqueue_mask is None:
            ref_emb, enqueue_mask = None, ref_emb
        if not self.training:
            if enqueue_mask is not None:
                return loss(embeddings, labels, indices_tuple, enqueue_mask=enqueue_mask)
            given = (indices_tuple,) if ref_emb is None else (indices_tuple, ref_emb, ref_labels)
            return call(loss, embeddings, labels, *given)
        _check_gradient(embeddings, ref_emb, self.loss)
        if enqueue_mask is not None:
            loss_calls.check_mask(enqueue_mask, loss, embeddings, indices_tuple)
            loss = loss_calls.Enqueuing(loss)
        with plain((embeddings, ref_emb)), paused():
            batch = self.adversary.collate(embeddings, labels, indices_tuple, ref_emb, ref_labels, enqueue_mask, inputs)
            if isinstance(loss, DistributedLossWrapper):
                loss = loss.loss  # the batch is joint already
            value, answers = self.adversary.train(loss, batch)
        loss_calls.check_scalar(loss, value)
        if answers:
            records.write(self, answers)
        else:
            records.clear(self, strength=batch.strength)
        seen = self.adversary.monitor
        self.batch_recall, self.batch_recall_attacked = seen.recall, seen.recall_attacked
        self.batch_recall_searched = seen.recall_searched
        if self._log is not None:
            self._log(self.adversary.step, self.records)
        return batch.num_processes * value  # as PML does it: each rank has the gradient of its rows, and DDP averages


def _method(method: FixedContext | None, **keywords: Any) -> FixedContext:
    """The package's own method, with the options that were set.

    Raises:
        InputError: ``method`` is something else, or stands beside keywords that are set on it.
    """
    if method is None:
        return FixedContext(**keywords)
    if not isinstance(method, FixedContext):
        raise InputError(
            f"method={method!r}; expected FixedContext(...), the package's own method with its options. Give other "
            "methods as plugins=[...]."
        )
    doubled = [name for name, value in keywords.items() if value is not None]
    if doubled:
        raise InputError(
            f"method=FixedContext(...) and {', '.join(doubled)} were both given. Set {', '.join(doubled)} on the "
            f"method: method=FixedContext({', '.join(f'{name}=...' for name in doubled)})."
        )
    return copy.deepcopy(method)  # it remembers what the loss can take, so that each loss needs its own


def _check_not_adversarial(loss: nn.Module) -> None:
    inside = [module for module in loss.modules() if isinstance(module, Wrapper)]
    if not all(isinstance(module, AdversarialLoss) for module in inside):
        raise InputError(
            "loss holds an AdversarialMiner, which cannot perturb what an AdversarialLoss has perturbed already; "
            "expected plain miners inside of the loss. Mine in the loop, before the loss: loss_func(embeddings, "
            "labels, miner(embeddings, labels))."
        )
    if inside:
        raise InputError(
            "loss holds an AdversarialLoss already; expected a loss to be made adversarial. Perturb several roles "
            "with perturb=(...), add methods with plugins=[...], or add up several AdversarialLoss."
        )


def _check_gradient(embeddings: Tensor, reference: Tensor | None, loss: nn.Module) -> None:
    if not isinstance(embeddings, Tensor):
        raise InputError(f"embeddings are {type(embeddings).__name__}; expected the tensor that the model returned.")
    learns = any(p.requires_grad for p in loss.parameters()) or getattr(reference, "requires_grad", False)
    if torch.is_grad_enabled() and ref_of(embeddings) and learns:
        return  # their model is frozen, and the loss or the model of the reference learns
    if not torch.is_grad_enabled() or not embeddings.requires_grad:
        found = "embeddings without gradient" if torch.is_grad_enabled() else "a call under no_grad or inference_mode"
        raise InputError(
            f"Found {found} while the loss is in training mode; expected embeddings that a model computed with "
            "gradient. Call .eval() on the loss to evaluate, or compute embeddings and loss with gradient to train."
        )
