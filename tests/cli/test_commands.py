"""The commands as one: which runs, and what the whole says of itself."""

from click.testing import CliRunner

from pml_adversarial import __version__
from pml_adversarial.cli import main


def test_options_of_the_demo_are_not_lost_in_silence():
    result = CliRunner().invoke(main, ["--seeds", "3", "evaluate", "--model", "m"])
    assert result.exit_code == 2
    assert result.output.startswith("Usage: main demo")
    assert "No such option" in result.output


def test_unknown_command():
    result = CliRunner().invoke(main, ["evalute"])
    assert result.exit_code == 2
    assert "There is no command 'evalute'. Did you mean evaluate? There are: demo, evaluate," in result.output


def test_help_of_both():
    both, one = (CliRunner().invoke(main, [*words, "--help"]).output for words in ([], ["evaluate"]))
    assert "--version" in both
    commands = ("demo", "evaluate", "certify", "compare", "repeat", "leaderboard")
    assert all(f"  {command} " in both for command in commands)
    assert not any(line.endswith("...") for line in both.partition("Commands:")[2].splitlines())  # none is cut off
    for option in ("model", "network", "queries", "gallery", "eps", "norm", "attacks", "normalization", "size"):
        assert f"--{option} " in one
    for option in (
        "grayscale",
        "limit",
        "nmi",
        "no-checks",
        "seed",
        "batch-size",
        "device",
        "output",
        "resume",
        "threads",
    ):
        assert f"--{option} " in one
    assert "  pml-adversarial evaluate --model model.pt2" in one  # examples are not wrapped


def test_the_demo_has_a_name_too():
    found = [CliRunner().invoke(main, [*name, "--quiet", "--eps", "2"]).output for name in (["demo"], [])]
    assert found[0] == found[1]
    assert "expected 1 at most in Linf" in found[0]


def test_version():
    assert CliRunner().invoke(main, ["--version"]).output == f"pml-adversarial, version {__version__}\n"
