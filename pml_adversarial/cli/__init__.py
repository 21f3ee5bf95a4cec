"""The command line. Without a command it runs the demo on handwritten digits.

`evaluate` attacks a saved model, `repeat` does so again from the report, and `compare` compares two reports.
"""

from . import compare, demo, evaluate, repeat

main = demo.main
main.add_command(evaluate.evaluate)
main.add_command(repeat.repeat)
main.add_command(compare.compare)

__all__ = ["main"]
