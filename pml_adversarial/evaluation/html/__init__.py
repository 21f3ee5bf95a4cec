"""A report as one HTML page that needs nothing else: no network, no scripts, images and curves inside."""

from .sections import render

__all__ = ["render"]
