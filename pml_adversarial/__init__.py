"""Adversarial deep metric learning: makes any loss and miner of pytorch-metric-learning adversarially aware.

Two lines in a working script::

    from pml_adversarial import AdversarialLoss
    loss_func = AdversarialLoss(loss_func, model)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import attacks, plugins
from .errors import AdversarialError, AttackError, CaptureError, InputError, PlanError, PluginError, ReplayError
from .losses import AdversarialLoss
from .miners import AdversarialMiner
from .plugins import FixedContext, hookimpl
from .training.batch import Adversarial, Batch
from .training.plan import Plan

if TYPE_CHECKING:
    from . import defenses, evaluation
    from .evaluation import Report, evaluate_robustness
    from .testers import AdversarialTester

__version__ = "0.2.0"

__all__ = [
    "Adversarial",
    "AdversarialError",
    "AdversarialLoss",
    "AdversarialMiner",
    "AdversarialTester",
    "AttackError",
    "Batch",
    "CaptureError",
    "FixedContext",
    "InputError",
    "Plan",
    "PlanError",
    "PluginError",
    "ReplayError",
    "Report",
    "attacks",
    "defenses",
    "evaluate_robustness",
    "evaluation",
    "hookimpl",
    "plugins",
]

_IMPORTED_LATE = {"AdversarialTester": "testers", "Report": "evaluation", "evaluate_robustness": "evaluation"}
"""Name -> module. Training needs no evaluation, which takes long to import."""


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_LATE:
        return getattr(import_module(f"{__name__}.{_IMPORTED_LATE[name]}"), name)
    if name in ("defenses", "evaluation"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
