"""Makes any PML loss adversarially aware: the drop-in `AdversarialLoss`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .attacks import adapter, presets
from .attacks.objective import AttackFactory
from .errors import InputError, PlanError
from .plugins.fixed_context import FixedContext
from .plugins.manager import Hooks, find_all
from .training import records
from .training.monitor import CollapseMonitor
from .training.pixels import Normalization, PixelSpace
from .training.replay import InputCapture, Models
from .training.schedule import DEFAULT_WARMUP, EpsSchedule
from .training.step import AdversarialStep
from .training.tuples import IndicesTuple

_REMEMBERED = ("queue_idx", "has_been_filled")  # of CrossBatchMemory, which are no buffers in PML


class AdversarialLoss(ModuleWithRecords):
    """Wraps a PML loss: while training, chosen members of its tuples are perturbed against a fixed batch context.

    The method of "Adversarial Deep Metric Learning" (Panum et al., arXiv 2102.07265), open to others through
    ``plugins``. The defaults are the package's own preset: all rows are perturbed, and clean rows stay beside them. The
    paper's own way is ``attack=presets.SEED_PAPER, perturb="positive", keep_clean=False, guard=False, warmup=0``.

    It is called as the loss that it wraps, ``(embeddings, ref_emb)`` for one of two views such as
    `SelfSupervisedLoss`. In ``.eval()`` it is that loss; while training with a budget of 0 and ``keep_clean=False`` it
    equals that loss on the tuples that it keeps.

    Around PML's ``DistributedLossWrapper`` all processes perturb one batch, the union of theirs.

    Args:
        loss: any loss of pytorch-metric-learning, available as ``.loss``.
        model: what turns inputs into embeddings: a module, modules in forward order, or a PML trainer's
            ``models``. None: the chain of modules is found at the first call. It is not a submodule of the loss.
        attack: called with the objective, returns a callable ``(inputs, labels) -> inputs``, such as
            ``attacks.preset(eps=4/255)`` or ``partial(torchattacks.PGD, eps=8/255)``. It moves the whole batch and
            returns where it arrived.
        perturb: "anchor", "positive", "negative", several of them, or "all" (every row, wherever it stands).
        tuples_per_anchor: None keeps all tuples, with one copy per row and role; ``k`` keeps k random tuples
            of each anchor, each with copies of its own (1 is the seed paper's way).
        plugins: objects, classes or names of installed plugins, asked in this order and before the package's own.
        keep_clean: whether clean rows and tuples stay in the loss beside the perturbed ones, as in a batch that holds
            both; False: perturbed ones take their place.
        clean_weight: weight of the unperturbed loss, added to the adversarial one.
        warmup: training steps over which eps and alpha grow linearly from 0 to their full values; half of all steps is
            a good choice. None: `schedule.DEFAULT_WARMUP`, or 0 for an attack without ``eps``, which cannot grow.
        guard: whether eps and alpha are held back while the embedding is collapsing, see `collapse`. An attack without
            ``eps`` cannot be held back.
        normalization: ``(mean, std)`` per channel if the model takes normalised inputs; eps counts in pixels.
        seed: of the attack's random stream; None takes ``torch.initial_seed()``.

    Raises:
        AdversarialError: see `errors`; in particular `CaptureError` where the inputs of the embeddings are not known
            and `InputError` where they are no pixels.

    Example:
        >>> from pytorch_metric_learning.losses import TripletMarginLoss
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> loss_func = AdversarialLoss(TripletMarginLoss(margin=0.2), model, warmup=0)
        >>> images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) // 2
        >>> loss = loss_func(model(images), labels)
        >>> loss.backward()
        >>> bool(loss_func.loss_after > loss_func.loss_before), round(loss_func.perturbation_linf, 3)
        (True, 0.031)
    """

    def __init__(
        self,
        loss: nn.Module,
        model: Models | None = None,
        *,
        attack: AttackFactory = presets.PRESET,
        perturb: str | Iterable[str] = "all",
        tuples_per_anchor: int | None = None,
        plugins: Iterable[Any] = (),
        keep_clean: bool = True,
        clean_weight: float = 0.0,
        warmup: int | None = None,
        guard: bool = True,
        normalization: Normalization | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module) or isinstance(loss, BaseMiner):
            found = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
            raise InputError(f"loss is {found}; expected a loss of pytorch-metric-learning, such as ContrastiveLoss().")
        if any(isinstance(module, AdversarialLoss) for module in loss.modules()):
            raise InputError(
                "loss holds an AdversarialLoss already; expected a loss to be made adversarial. Perturb several roles "
                "with perturb=(...), add methods with plugins=[...], or add up several AdversarialLoss."
            )
        _check_wrappers(loss)
        joint = isinstance(loss, DistributedLossWrapper)
        own = FixedContext(attack, perturb, tuples_per_anchor, clean_weight, keep_clean)
        has_eps = "eps" in adapter.budget(attack)
        if warmup is None:
            warmup = DEFAULT_WARMUP if has_eps else 0
        elif warmup:
            adapter.check_warmup(attack)
        self.loss = loss
        parameters = signature(loss.forward).parameters
        self.takes_two_views = "ref_emb" in parameters and "labels" not in parameters
        self.adversary = AdversarialStep(
            Hooks(find_all(plugins), own),
            InputCapture(model),
            PixelSpace(normalization),
            EpsSchedule(warmup),
            CollapseMonitor(guard and has_eps),
            seed,
            joint,
        )
        records.declare(self, (*records.STANDARD, *records.OF_LOSSES))

    def watch(self, model: Models) -> None:
        """Takes the inputs of ``model`` from now on; needed when the model was exchanged."""
        self.adversary.capture.watch(model)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The adversarial loss while training, the wrapped loss in ``.eval()``.

        Args:
            embeddings: ``(N, D)`` as the model returned them: its output, outputs of several calls concatenated by
                rows, or a range of an output's columns.
            labels: ``(N,)``.
            indices_tuple: triplets or pairs from a miner; None: the loss's own.
            ref_emb: ``(R, D)`` reference embeddings, where the loss knows them.
            ref_labels: ``(R,)``.

        Returns:
            A scalar.
        """
        loss: nn.Module = self.loss
        if self.takes_two_views:
            loss, ref_emb = TwoViews(loss), labels if ref_emb is None else ref_emb
            labels, ref_labels = TwoViews.labels(embeddings, ref_emb)
        if not self.training:
            given = (indices_tuple,) if ref_emb is None else (indices_tuple, ref_emb, ref_labels)
            return loss(embeddings, labels, *given)
        _check_gradient(embeddings)
        batch = self.adversary.collate(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if isinstance(loss, DistributedLossWrapper):
            loss = loss.loss  # the batch is joint already
        value, answers = self.adversary.train(loss, batch)
        if answers:
            records.write(self, answers)
        else:
            records.clear(self, strength=batch.strength)
        self.batch_recall, self.batch_recall_attacked = (
            self.adversary.monitor.recall,
            self.adversary.monitor.recall_attacked,
        )
        return batch.num_processes * value  # as PML does it: each rank has the gradient of its rows, and DDP averages

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs beyond parameters and buffers: step, seed, and what plugins and losses remember."""
        return {**self.adversary.state_dict(), "attributes": _attributes(self.loss)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_extra_state` gave."""
        self.adversary.load_state_dict(state)
        modules = dict(self.loss.named_modules())
        for name in modules.keys() & state["attributes"]:
            for attribute, value in state["attributes"][name].items():
                setattr(modules[name], attribute, value)


class TwoViews(nn.Module):
    """A loss of two views of the same images, ``(embeddings, ref_emb)``, called as PML calls the others."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Any = None, ref_labels: Any = None
    ) -> Tensor:
        """The loss of the two views; each image is its own class, whatever the labels.

        Raises:
            PlanError: tuples were given, or are to be kept, or a plugin planned with some.
        """
        if indices_tuple is not None:
            raise PlanError(
                f"{type(self.loss).__name__} takes no tuples, it compares two views of the same images; expected "
                "indices_tuple=None and tuples_per_anchor=None, and no plugin that plans with triplets or pairs."
            )
        return self.loss(embeddings, ref_emb)

    @staticmethod
    def labels(embeddings: Tensor, ref_emb: Any) -> tuple[Tensor, Tensor]:
        """A class for each image.

        Raises:
            InputError: there is no second view, or one of other images.
        """
        if not isinstance(ref_emb, Tensor) or ref_emb.shape != embeddings.shape:
            found = tuple(ref_emb.shape) if isinstance(ref_emb, Tensor) else type(ref_emb).__name__
            raise InputError(
                f"The second view is {found}, the first {tuple(embeddings.shape)}; expected embeddings of two views of "
                "the same images in the same order, loss_func(embeddings, ref_emb)."
            )
        each = torch.arange(len(embeddings), device=embeddings.device)
        return each, each.clone()  # PML would leave out pairs (i, i) if both were one tensor


def _attributes(loss: nn.Module) -> dict[str, dict[str, Any]]:
    found = {name: {key: vars(m)[key] for key in _REMEMBERED if key in vars(m)} for name, m in loss.named_modules()}
    return {name: values for name, values in found.items() if values}


def _check_wrappers(loss: nn.Module) -> None:
    inner = [
        module for module in loss.modules() if isinstance(module, DistributedLossWrapper | DistributedDataParallel)
    ]
    if any(module is not loss or isinstance(module, DistributedDataParallel) for module in inner):
        raise InputError(
            f"loss holds {', '.join(type(module).__name__ for module in inner)} in a place where each evaluation would "
            "talk to the other ranks; expected AdversarialLoss(DistributedLossWrapper(loss), model). If the loss has "
            "parameters, put DistributedDataParallel around the AdversarialLoss."
        )
    if getattr(loss, "efficient", False) and inner:
        raise InputError(
            "DistributedLossWrapper has efficient=True: each rank then has tuples of its own, and gradients are not "
            "those of one batch. Use efficient=False, with which the ranks share one batch, or the loss without the "
            "wrapper, with which each rank has its own."
        )


def _check_gradient(embeddings: Tensor) -> None:
    if not isinstance(embeddings, Tensor):
        raise InputError(f"embeddings are {type(embeddings).__name__}; expected the tensor that the model returned.")
    if not torch.is_grad_enabled() or not embeddings.requires_grad:
        found = "embeddings without gradient" if torch.is_grad_enabled() else "a call under no_grad or inference_mode"
        raise InputError(
            f"Found {found} while the loss is in training mode; expected embeddings that a model computed with "
            "gradient. Call .eval() on the loss to evaluate, or compute embeddings and loss with gradient to train."
        )
