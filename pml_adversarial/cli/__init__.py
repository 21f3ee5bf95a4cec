"""The command line. Without a command it runs the demo on handwritten digits; `evaluate` attacks a saved model."""

from . import demo, evaluate

main = demo.main
main.add_command(evaluate.evaluate)

__all__ = ["main"]
