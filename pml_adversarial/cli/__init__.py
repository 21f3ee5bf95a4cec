"""The command line: `demo` trains on the embedded digits, `evaluate` attacks a saved model on images of your own."""

from . import digits, evaluate

main = digits.main
main.add_command(evaluate.evaluate)

__all__ = ["main"]
