"""How robust an embedding model is."""

from .report import Report
from .retrieval import Gallery
from .robustness import evaluate_robustness

__all__ = ["Gallery", "Report", "evaluate_robustness"]
