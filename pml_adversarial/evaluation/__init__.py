"""How robust an embedding model is."""

from .gallery import Gallery
from .report import Report
from .robustness import evaluate_robustness
from .smoothing import certify

__all__ = ["Gallery", "Report", "certify", "evaluate_robustness"]
