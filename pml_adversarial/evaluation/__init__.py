"""How robust an embedding model is: attacked queries against a clean gallery."""

from .retrieval import Gallery
from .suites import RobustRecall, robust_recall

__all__ = ["Gallery", "RobustRecall", "robust_recall"]
