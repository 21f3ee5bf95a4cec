"""The questions that a plugin may answer, who is asked, and the package's own answers."""

from .fixed_context import FixedContext
from .hookspecs import HookSpecs, hookimpl

__all__ = ["FixedContext", "HookSpecs", "hookimpl"]
