"""What the commands that evaluate share: their options are of one kind, and errors are one line."""

import click
import numpy
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from pml_adversarial import InputError
from pml_adversarial.cli.inputs import errors_shown, input_options, load

GIVEN = {"network": None, "gallery": None, "size": None, "grayscale": False}


def test_options_are_taken_together_and_come_first():
    taken = []

    @click.command()
    @input_options
    @click.option("--other")
    def command(inputs, other):
        """What it does."""
        taken.append((inputs, other))

    result = CliRunner().invoke(command, ["--model", "m", "--other", "o", "--queries", "q", "--grayscale"])
    assert result.exit_code == 0, result.output
    ((inputs, other),) = taken
    assert {name: value and str(value) for name, value in inputs.items()} == {
        **dict.fromkeys(("network", "gallery", "size")),
        "model": "m",
        "queries": "q",
        "grayscale": "True",
    }
    assert other == "o"
    shown = CliRunner().invoke(command, ["--help"]).output
    order = ("model", "network", "queries", "gallery", "size", "grayscale", "other")
    places = [shown.index(f"--{name}") for name in order]
    assert places == sorted(places)
    assert "What it does." in shown
    assert "Missing option '--queries'" in CliRunner().invoke(command, ["--model", "m"]).output


def test_a_model_that_does_not_take_as_many_images_as_a_batch_has(tmp_path):
    images = torch.rand(6, 1, 4, 4)
    batch = {0: torch.export.Dim("batch", max=4)}
    program = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), (images[:2],), dynamic_shapes=(batch,))
    torch.export.save(program, tmp_path / "model.pt2")
    numpy.savez(tmp_path / "queries.npz", images=images.numpy(), labels=numpy.arange(6) % 2)
    inputs = {"model": tmp_path / "model.pt2", "queries": tmp_path / "queries.npz", **GIVEN}
    found = load(inputs, "cpu", batch_size=4)
    assert found.model(images[:4]).shape == (4, 3)
    assert len(found.queries) == 6
    assert found.gallery is None
    with pytest.raises(InputError, match=r"does not take 5 image\(s\)"):
        load(inputs, "cpu", batch_size=5)


def test_files_that_are_left_out_are_said(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / "test" / name / f"{number}.png")
    (tmp_path / "test" / "b" / "2.doc").write_bytes(b"")
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    program = torch.export.export(network, (torch.rand(2, 3, 4, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    load({**GIVEN, "model": tmp_path / "model.pt2", "queries": tmp_path / "test"}, "cpu")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"note: {tmp_path}/test: 1 files are no images that can be read, and are left out: 1 .doc\n"


@pytest.mark.parametrize(
    ("error", "shown"),
    [(InputError("No, because."), "No, because."), (torch.cuda.OutOfMemoryError("a page"), "too much")],
)
def test_errors_are_shown(error, shown):
    with pytest.raises(click.ClickException, match=f"^{shown}$"), errors_shown("too much"):
        raise error


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError), errors_shown("too much"):
        raise ZeroDivisionError
