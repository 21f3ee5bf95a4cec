"""How robust an embedding model is: attacks, measures, certificates and reports."""

from .attacks import GalleryAttack, QueryAttack, QueryBatch, RetrievalAttack
from .binomial import Interval
from .classifier import RetrievalClassifier
from .comparison import Comparison, Difference, compare
from .gallery import Gallery, Targets
from .images import Images
from .pair_attacks import PairAttack, PairBatch
from .pairs import Pairs, draw_pairs
from .repetition import repeat
from .report import Report
from .results import AttackResult, Check, WorstCase
from .robrank import RobRankScores, ers, robrank_scores
from .robustness import evaluate_robustness
from .roc import ROC, EqualErrorRate, PairScores, Rate
from .smoothing import Certificate, certify
from .suites import quick, standard
from .verification import evaluate_verification
from .verification_report import PairAttackResult, ThresholdResult, VerificationReport, VerificationResult

__all__ = [
    "ROC",
    "AttackResult",
    "Certificate",
    "Check",
    "Comparison",
    "Difference",
    "EqualErrorRate",
    "Gallery",
    "GalleryAttack",
    "Images",
    "Interval",
    "PairAttack",
    "PairAttackResult",
    "PairBatch",
    "PairScores",
    "Pairs",
    "QueryAttack",
    "QueryBatch",
    "Rate",
    "Report",
    "RetrievalAttack",
    "RetrievalClassifier",
    "RobRankScores",
    "Targets",
    "ThresholdResult",
    "VerificationReport",
    "VerificationResult",
    "WorstCase",
    "certify",
    "compare",
    "draw_pairs",
    "ers",
    "evaluate_robustness",
    "evaluate_verification",
    "quick",
    "repeat",
    "robrank_scores",
    "standard",
]
