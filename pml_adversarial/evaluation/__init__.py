"""How robust an embedding model is: attacks, measures, certificates and reports."""

from .attacks import GalleryAttack, QueryAttack, QueryBatch, RetrievalAttack
from .binomial import Interval
from .classifier import RetrievalClassifier
from .comparison import Comparison, Difference, compare
from .gallery import Gallery, Targets
from .images import Images
from .rank_only import rank_only_attack
from .repetition import repeat
from .report import Report
from .results import AttackResult, Check, WorstCase
from .robrank import RobRankScores, ers, robrank_scores
from .robustness import evaluate_robustness
from .smoothing import Certificate, certify
from .suites import quick, standard
from .transfer import transfer_attack, transferred

__all__ = [
    "AttackResult",
    "Certificate",
    "Check",
    "Comparison",
    "Difference",
    "Gallery",
    "GalleryAttack",
    "Images",
    "Interval",
    "QueryAttack",
    "QueryBatch",
    "Report",
    "RetrievalAttack",
    "RetrievalClassifier",
    "RobRankScores",
    "Targets",
    "WorstCase",
    "certify",
    "compare",
    "ers",
    "evaluate_robustness",
    "quick",
    "rank_only_attack",
    "repeat",
    "robrank_scores",
    "standard",
    "transfer_attack",
    "transferred",
]
