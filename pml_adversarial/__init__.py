"""Adversarial deep metric learning: makes any loss and miner of pytorch-metric-learning adversarially aware.

Two lines in a working script::

    from pml_adversarial import AdversarialLoss
    loss_func = AdversarialLoss(loss_func, model)
"""

from .errors import AdversarialError, AttackError, CaptureError, InputError, PlanError, PluginError
from .evaluation import Report, evaluate_robustness
from .losses import AdversarialLoss
from .miners import AdversarialMiner
from .plugins.hookspecs import hookimpl
from .testers import AdversarialTester
from .training.batch import Adversarial, Batch
from .training.plan import Plan

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
    "InputError",
    "Plan",
    "PlanError",
    "PluginError",
    "Report",
    "evaluate_robustness",
    "hookimpl",
]
