"""The command line: the main job on the embedded data, and `evaluate` for a saved model and images of one's own."""

from .digits import main, table
from .evaluate import evaluate

main.add_command(evaluate)

__all__ = ["evaluate", "main", "table"]
