"""What options of the command line say: classes with options, radii, devices."""

import click
import pytest

from pml_adversarial.cli.options import parse_call, try_option


def test_options_are_literals_not_code():
    assert parse_call("A:x=1.5,y=(2, 'b'),z=word,t=True") == ("A", {"x": 1.5, "y": (2, "b"), "z": "word", "t": True})
    with pytest.raises(Exception, match="cannot be read"):
        parse_call("A:x=__import__('os').getcwd()")


def test_of_an_error_of_many_lines_the_first_is_shown():
    def fail():
        raise RuntimeError("no such device\nCUDA kernel errors might be ...")

    with pytest.raises(click.BadParameter) as refused:
        try_option(fail, "--device")
    assert refused.value.format_message() == "Invalid value for --device: no such device"
