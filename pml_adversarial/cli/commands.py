"""The commands as one: ``pml-adversarial``, and ``python -m pml_adversarial``."""

from __future__ import annotations

from typing import Any

import click

from .. import __version__
from . import certify, compare, demo, evaluate, leaderboard, repeat
from .options import CONTEXT, did_you_mean

_OF_ALL = ("--version", "--help", "-h")


class _Commands(click.Group):
    """What begins with an option is the demo's."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in _OF_ALL):
            args = ["demo", *args]
        return super().parse_args(context, args)

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands:
            known = ", ".join(self.commands)
            context.fail(f"There is no command {args[0]!r}.{did_you_mean(args[0], self.commands)} There are: {known}.")
        return super().resolve_command(context, args)


@click.group(cls=_Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="pml-adversarial")
def main() -> None:
    """Adversarial deep metric learning: train robust embeddings, and measure how robust one is.

    Without a command it is the demo, and takes the demo's options.
    """


main.add_command(demo.demo)
main.add_command(evaluate.evaluate)
main.add_command(certify.certify)
main.add_command(compare.compare)
main.add_command(repeat.repeat)
main.add_command(leaderboard.leaderboard)
