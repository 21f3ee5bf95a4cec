"""How robust an embedding model is."""

from .gallery import Gallery
from .report import Report
from .robustness import evaluate_robustness

__all__ = ["Gallery", "Report", "evaluate_robustness"]
