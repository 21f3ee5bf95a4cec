"""How robust an embedding model is: attacks, measures, certificates and reports."""

from .attacks import GalleryAttack, QueryAttack, QueryBatch, RetrievalAttack
from .classifier import RetrievalClassifier
from .cost import Cost, estimate_cost
from .gallery import Gallery, Targets
from .images import Images
from .report import Report
from .results import AttackResult, Check, WorstCase
from .robrank import RobRankScores, ers, robrank_scores
from .robustness import evaluate_robustness
from .smoothing import Certificate, certify
from .suites import fast, quick, standard

__all__ = [
    "AttackResult",
    "Certificate",
    "Check",
    "Cost",
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
    "estimate_cost",
    "evaluate_robustness",
    "fast",
    "quick",
    "robrank_scores",
    "standard",
]
