"""The command line. Without a command it runs the demo on handwritten digits.

`evaluate` attacks a saved model, `repeat` does so again from the report, `compare` compares two reports, and
`leaderboard` keeps the results of many models.
"""

from . import compare, demo, evaluate, leaderboard, repeat

main = demo.main
main.add_command(evaluate.evaluate)
main.add_command(repeat.repeat)
main.add_command(compare.compare)
main.add_command(leaderboard.leaderboard)

__all__ = ["main"]
