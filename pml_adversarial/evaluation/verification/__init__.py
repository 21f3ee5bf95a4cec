"""Verification: whether two images show the same, as of faces and signatures, while one of them is attacked."""

from .attacks import PairAttack, PairBatch
from .pairs import Pairs, draw_pairs
from .report import PairAttackResult, ThresholdResult, VerificationReport, VerificationResult
from .roc import ROC, EqualErrorRate, PairScores, Rate
from .verify import evaluate_verification

__all__ = [
    "ROC",
    "EqualErrorRate",
    "PairAttack",
    "PairAttackResult",
    "PairBatch",
    "PairScores",
    "Pairs",
    "Rate",
    "ThresholdResult",
    "VerificationReport",
    "VerificationResult",
    "draw_pairs",
    "evaluate_verification",
]
