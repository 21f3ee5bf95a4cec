"""How robust an embedding model is: attacks, measures, certificates and reports."""

from .attacks import GalleryAttack, QueryAttack, QueryBatch, RetrievalAttack
from .classifier import RetrievalClassifier
from .gallery import Gallery, Targets
from .images import Images
from .rank_only import rank_only_attack
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
    "Gallery",
    "GalleryAttack",
    "Images",
    "QueryAttack",
    "QueryBatch",
    "Report",
    "RetrievalAttack",
    "RetrievalClassifier",
    "RobRankScores",
    "Targets",
    "WorstCase",
    "certify",
    "ers",
    "evaluate_robustness",
    "quick",
    "rank_only_attack",
    "robrank_scores",
    "standard",
    "transfer_attack",
    "transferred",
]
