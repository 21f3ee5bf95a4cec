"""Results as one HTML page that needs nothing else: no network and no scripts; pictures and curves are part of it."""

from .page import render, render_short
from .several import render_several

__all__ = ["render", "render_several", "render_short"]
