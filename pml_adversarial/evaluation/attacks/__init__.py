"""Attacks on retrieval: on queries and on the gallery, with gradients, by search, or with images made elsewhere."""

from .gradients import (
    classifier_attack,
    demotion,
    gradient_attack,
    margin_score,
    nearest_right,
    nearest_wrong,
    promotion,
    shift_score,
    targeted_score,
)
from .kinds import AttackOutcome, GalleryAttack, Perturb, QueryAttack, RetrievalAttack
from .rank_only import rank_only_attack
from .square import square_attack
from .transfer import transfer_attack, transferred
from .universal import UniversalPerturbation, universal_attack, universal_perturbation

__all__ = [
    "AttackOutcome",
    "GalleryAttack",
    "Perturb",
    "QueryAttack",
    "RetrievalAttack",
    "UniversalPerturbation",
    "classifier_attack",
    "demotion",
    "gradient_attack",
    "margin_score",
    "nearest_right",
    "nearest_wrong",
    "promotion",
    "rank_only_attack",
    "shift_score",
    "square_attack",
    "targeted_score",
    "transfer_attack",
    "transferred",
    "universal_attack",
    "universal_perturbation",
]
