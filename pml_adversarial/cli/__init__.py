"""The command line: demo, evaluate, certify, compare, repeat, leaderboard. Without a command it is the demo."""

from .commands import main

__all__ = ["main"]
