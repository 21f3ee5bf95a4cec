"""Attacks for training: what raises a score within a ball around clean inputs.

``attack=`` of `AdversarialLoss` takes a factory: a preset, a class of this folder, or a class of torchattacks.
"""

from .adapter import budget, unchanged
from .autocast import Autocast
from .friendly_pgd import FriendlyPGD
from .nfgsm import NFGSM
from .objective import Attack, AttackFactory, Objective, Score
from .pgd import PGD, MomentumPGD
from .presets import PRESET, SEED_PAPER, preset

__all__ = [
    "NFGSM",
    "PGD",
    "PRESET",
    "SEED_PAPER",
    "Attack",
    "AttackFactory",
    "Autocast",
    "FriendlyPGD",
    "MomentumPGD",
    "Objective",
    "Score",
    "budget",
    "preset",
    "unchanged",
]
