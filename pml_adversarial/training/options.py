"""What users may wrap, and what they may ask for; everything else is refused with the way out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..attacks.checks import check_whole
from ..errors import InputError

_LOSSES = (
    losses.BaseMetricLossFunction,
    losses.CrossBatchMemory,
    losses.MultipleLosses,
    losses.SelfSupervisedLoss,
    DistributedLossWrapper,
)
_MINERS = (miners.BaseMiner, DistributedMinerWrapper)
_INSTEAD = {  # criterion of torch.nn -> loss of PML
    "CrossEntropyLoss": "NormalizedSoftmaxLoss(num_classes=10, embedding_size=128)",
    "NLLLoss": "NormalizedSoftmaxLoss(num_classes=10, embedding_size=128)",
    "TripletMarginLoss": "TripletMarginLoss()",
    "TripletMarginWithDistanceLoss": "TripletMarginLoss()",
}


def warmup_steps(warmup: float | None, total_steps: int | None, default: int) -> int:
    """Over how many steps the attack grows to its full budget.

    Args:
        warmup: a number of steps (int), or a share of ``total_steps`` (float) up to 1; None: the default.
        total_steps: of the whole training.
        default: number of steps.

    Raises:
        InputError: ``warmup`` is neither, or one of the two is missing, or would change nothing.
    """
    if total_steps is not None and (type(total_steps) is not int or total_steps < 1):
        raise InputError(f"total_steps={total_steps!r}; expected a whole number of training steps, from 1 on.")
    if total_steps is not None and not isinstance(warmup, float):
        raise InputError(
            f"total_steps={total_steps} was given with warmup={warmup!r}, and would change nothing; expected warmup as "
            "a share of it, such as warmup=0.5. To count in steps, leave out total_steps."
        )
    if warmup is None:
        return default
    highest = 1 if isinstance(warmup, float) else math.inf
    if isinstance(warmup, bool) or not isinstance(warmup, int | float) or not 0 <= warmup <= highest:
        raise InputError(
            f"warmup={warmup!r}; expected a whole number of training steps, 0 for none, or a share of total_steps, up "
            "to 1, such as warmup=0.5, total_steps=10_000."
        )
    if not isinstance(warmup, float):
        return warmup
    if total_steps is None:
        raise InputError(
            f"warmup={warmup!r} is a share of all training steps, whose number is not known. Add total_steps=epochs * "
            "len(loader), or give warmup as a whole number of steps."
        )
    return math.ceil(warmup * total_steps)


def check_loss(loss: Any, model: Any) -> None:
    """Refuses what is not a metric loss, or is given in the wrong place.

    Raises:
        InputError: ``loss`` is not a metric loss, ``model`` is one, or the loss returns no scalar.
    """
    name = type(loss).__name__
    _check_places("loss", loss, model, "AdversarialLoss", _LOSSES)
    if isinstance(loss, _MINERS):
        raise InputError(
            f"loss is the miner {name}; expected a loss. Wrap a miner in AdversarialMiner(miner, model), or give its "
            "tuples to the loss: loss_func(embeddings, labels, miner(embeddings, labels))."
        )
    if not isinstance(loss, nn.Module):
        raise InputError(
            f"loss is an object of {name}; expected a loss of pytorch-metric-learning, such as ContrastiveLoss(), or a "
            "torch.nn.Module of your own with forward(embeddings, labels)."
        )
    if getattr(type(loss).forward, "__module__", "") == "torch.nn.modules.loss":
        raise InputError(
            f"{name} of torch.nn is no metric loss: it is not called with embeddings and their labels. Use one of "
            f"pytorch-metric-learning, such as AdversarialLoss({_INSTEAD.get(name, 'ContrastiveLoss()')}, model)."
        )
    if not _takes_two(loss):
        raise InputError(
            f"loss is an object of {name}, whose forward takes {positional(loss)}; expected a loss with "
            "forward(embeddings, labels), such as ContrastiveLoss(), in AdversarialLoss(loss, model)."
        )
    for place, module in loss.named_modules():
        if isinstance(module, reducers.DoNothingReducer):
            raise InputError(
                f"{name} has a DoNothingReducer at .{place}, so it returns a dict and no scalar; expected a reducer "
                "that returns a scalar, such as reducer=MeanReducer()."
            )


def check_miner(miner: Any, model: Any) -> None:
    """Refuses what is not a tuple miner, or is given in the wrong place.

    Raises:
        InputError: ``miner`` is not a miner, ``model`` is one, or each process mines for itself.
    """
    name = type(miner).__name__
    _check_places("miner", miner, model, "AdversarialMiner", _MINERS)
    if isinstance(miner, _LOSSES):
        raise InputError(
            f"miner is the loss {name}; expected a tuple miner. Wrap a loss in AdversarialLoss(loss, model)."
        )
    if not callable(miner) or (isinstance(miner, nn.Module) and not _takes_two(miner)):
        raise InputError(
            f"miner is an object of {name}; expected a tuple miner of pytorch-metric-learning, as BatchHardMiner()."
        )
    if isinstance(miner, DistributedMinerWrapper) and miner.efficient:
        raise InputError(
            "DistributedMinerWrapper has efficient=True: each process then mines for its own rows only. Use "
            "efficient=False, with which the processes share one batch."
        )


def check_processes(loss: nn.Module) -> None:
    """Refuses wrappers for several processes in places where they would not do what they are for.

    Raises:
        InputError: there is such a wrapper in the loss.
    """
    inner = [m for m in loss.modules() if isinstance(m, DistributedLossWrapper | DistributedDataParallel)]
    if any(module is not loss or isinstance(module, DistributedDataParallel) for module in inner):
        raise InputError(
            f"loss holds {', '.join(type(m).__name__ for m in inner)} in a place where each evaluation would talk to "
            "the other processes; expected AdversarialLoss(DistributedLossWrapper(loss), model). If the loss has "
            "parameters, put DistributedDataParallel around the AdversarialLoss."
        )
    if getattr(loss, "efficient", False) and inner:
        raise InputError(
            "DistributedLossWrapper has efficient=True: each process then has tuples of its own, and gradients are not "
            "those of one batch. Use efficient=False to share one batch, or leave out the wrapper to have a batch in "
            "each process."
        )


def check_inputs(perturb_input: Any, at: Any, bounds: Any, chunk: Any) -> None:
    """Refuses what cannot say which inputs are perturbed.

    Raises:
        InputError: an option has the wrong type, or two of them exclude each other.
    """
    if perturb_input is not None and not isinstance(perturb_input, str):
        raise InputError(
            f"perturb_input={perturb_input!r}; expected the name of an argument of the model's forward(), such as "
            "perturb_input='pixel_values'."
        )
    if at is not None and not isinstance(at, nn.Module):
        raise InputError(
            f"at={at!r}; expected the module of the model whose output is perturbed, such as at=model.embedding."
        )
    if at is not None and perturb_input is not None:
        raise InputError(
            "at=... and perturb_input=... were both given; expected one of them: the output of a module inside of the "
            "model, or an argument of the model."
        )
    if at is not None and bounds is None:
        raise InputError(
            "at=... was given without bounds; expected the range of what the module gives, of which eps is a share: "
            "bounds=(low, high), such as bounds=(-5, 5)."
        )
    if chunk is not None:
        check_whole("chunk", chunk, hint=", as the number of rows that are embedded at a time")


def positional(module: nn.Module) -> list[str]:
    """Names of the arguments that ``forward`` takes by position. ``*`` stands before one that takes any number."""
    parameters = inspect.signature(module.forward).parameters.values()
    by_position = [p for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    return [f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name for p in by_position]


def shown(options: Mapping[str, Any], plugins: Iterable[Any] = (), **others: Any) -> str:
    """Options as they are shown in a ``repr``, without those that are None: ``eps=8/255, steps=3, plugins=[HM]``."""
    text = [f"{name}={value}" for name, value in {**options, **others}.items() if value is not None]
    named = ", ".join(getattr(plugin, "__name__", type(plugin).__name__) for plugin in plugins)
    return ", ".join([*text, f"plugins=[{named}]"] if named else text)


def _check_places(of: str, given: Any, model: Any, wrapper: str, kinds: tuple[type, ...]) -> None:
    """Refuses classes, arguments in the wrong order, and a loss or a miner as the model."""
    if isinstance(given, type):
        parameters = inspect.signature(given).parameters.values()
        needed = [f"{p.name}=..." for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        raise InputError(
            f"{of} is the class {given.__name__}; expected an object. Write "
            f"{wrapper}({given.__name__}({', '.join(needed)}), model)."
        )
    name = type(model).__name__
    if isinstance(model, kinds) and not isinstance(given, kinds):
        raise InputError(
            f"The arguments are in the wrong order: {of} is {type(given).__name__}, model is {name}. Write "
            f"{wrapper}({name}(...), model)."
        )
    if isinstance(model, type):
        raise InputError(f"model is the class {model.__name__}; expected an object, such as {model.__name__}(...).")
    if isinstance(model, (*_LOSSES, *_MINERS)):
        raise InputError(
            f"model is {name}; expected the module that turns images into embeddings, {wrapper}({of}, model), or None."
        )


def _takes_two(module: nn.Module) -> bool:
    names = positional(module)
    return len(names) >= 2 or any(name.startswith("*") for name in names)
