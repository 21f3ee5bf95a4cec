"""Results as one HTML page that needs nothing else: no network and no scripts; pictures and curves are part of it."""

from .page import render

__all__ = ["render"]
