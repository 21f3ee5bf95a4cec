"""How robust an embedding model is: attacks, measures, certificates and reports."""

from .attacks.kinds import GalleryAttack, QueryAttack, RetrievalAttack
from .attacks.rank_only import rank_only_attack
from .attacks.transfer import transfer_attack, transferred
from .attacks.universal import UniversalPerturbation, universal_attack, universal_perturbation
from .comparison import Comparison, Difference, compare, save_comparison
from .cost import Cost, estimate_cost
from .repetition import repeat
from .reports.binomial import Interval
from .reports.report import Report
from .reports.results import AttackResult, Check, WorstCase
from .retrieval.batch import QueryBatch
from .retrieval.classifier import RetrievalClassifier
from .retrieval.forms import Images
from .retrieval.gallery import Gallery, Targets
from .robrank import RobRankScores, ers, robrank_scores
from .robustness import evaluate_robustness
from .smoothing import Certificate, certify
from .suites import fast, quick, standard
from .targeted import TargetedReport, evaluate_targeted
from .verification import (
    ROC,
    EqualErrorRate,
    PairAttack,
    PairAttackResult,
    PairBatch,
    Pairs,
    PairScores,
    Rate,
    ThresholdResult,
    VerificationReport,
    VerificationResult,
    draw_pairs,
    evaluate_verification,
)

__all__ = [
    "ROC",
    "AttackResult",
    "Certificate",
    "Check",
    "Comparison",
    "Cost",
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
    "TargetedReport",
    "Targets",
    "ThresholdResult",
    "UniversalPerturbation",
    "VerificationReport",
    "VerificationResult",
    "WorstCase",
    "certify",
    "compare",
    "draw_pairs",
    "ers",
    "estimate_cost",
    "evaluate_robustness",
    "evaluate_targeted",
    "evaluate_verification",
    "fast",
    "quick",
    "rank_only_attack",
    "repeat",
    "robrank_scores",
    "save_comparison",
    "standard",
    "transfer_attack",
    "transferred",
    "universal_attack",
    "universal_perturbation",
]
