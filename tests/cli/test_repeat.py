"""``pml-adversarial repeat``: the same numbers from the report, the model and the images."""

import json

import numpy
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from pml_adversarial.cli import main

NETWORK = "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))\n"
INPUTS = ["--model", "weights.pt", "--network", "repeated_nets:make", "--queries", "queries.npz"]
REPORT = "pml_adversarial_evaluation/report.json"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with weights, images, and the report of an evaluation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "repeated_nets.py").write_text(NETWORK)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).state_dict(), "weights.pt")
    images = numpy.random.default_rng(0).random((12, 6, 6))
    numpy.savez("queries.npz", images=images, labels=numpy.arange(12) % 2)
    options = [
        "--eps",
        "0.02,0.2",
        "--attacks",
        "shift",
        "--limit",
        "9",
        "--no-checks",
        "--seed",
        "3",
        "--batch-size",
        "4",
    ]
    result = run("evaluate", *INPUTS, *options)
    assert result.exit_code == 0, result.output
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, [*arguments, "--quiet"])


def numbers(path):
    found = json.loads(path.read_text())
    for attack in found["attacks"]:
        del attack["seconds"]
    del found["provenance"]["time"]
    return found


class TestRepeats:
    def test_all_numbers(self, workplace):
        result = run("repeat", REPORT, *INPUTS)
        assert result.exit_code == 0, result.output
        assert result.output.endswith(f"report.json, report.html\nThe numbers are those of {REPORT}.\n")
        again = workplace / "pml_adversarial_repetition" / "report.json"
        assert numbers(again) == numbers(workplace / REPORT)
        assert again.with_suffix(".html").exists()

    def test_numbers_that_differ_are_named(self, workplace):
        found = json.loads((workplace / REPORT).read_text())
        found["clean_flags"] = found["clean_flags"][1:] + found["clean_flags"][:1]  # as many are right, but others
        (workplace / "other.json").write_text(json.dumps(found))
        result = run("repeat", "other.json", *INPUTS, "--output", "again")
        assert result.output.endswith("clean_flags differ from other.json.\n")

    def test_with_as_many_threads(self, workplace, monkeypatch):
        taken = []
        monkeypatch.setattr(torch, "set_num_threads", taken.append)
        found = json.loads((workplace / REPORT).read_text())
        found["provenance"]["threads"] = 7
        (workplace / REPORT).write_text(json.dumps(found))
        assert run("repeat", REPORT, *INPUTS).exit_code == 0
        assert run("repeat", REPORT, *INPUTS, "--threads", "2", "--force").exit_code == 0
        assert taken == [7, 2]


class TestRefusals:
    def test_other_images(self, workplace):
        images = numpy.random.default_rng(1).random((12, 6, 6))
        numpy.savez("queries.npz", images=images, labels=numpy.arange(12) % 2)
        result = run("repeat", REPORT, *INPUTS)
        assert result.exit_code == 1
        assert result.output.startswith("Error: This is not what the report measured: queries: found ")

    def test_another_model(self, workplace):
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).state_dict(), "weights.pt")
        assert "measured: model: found" in run("repeat", REPORT, *INPUTS).output

    @pytest.mark.parametrize(("content", "message"), [("{}", "holds no report"), (None, "does not exist")])
    def test_no_report(self, workplace, content, message):
        if content is not None:
            (workplace / "nothing.json").write_text(content)
        result = run("repeat", "nothing.json", *INPUTS)
        assert result.exit_code > 0
        assert message in result.output

    def test_memory_that_does_not_suffice(self, workplace, monkeypatch):
        def fill(*arguments, **options):
            raise torch.cuda.OutOfMemoryError("a page of numbers")

        monkeypatch.setattr("pml_adversarial.evaluation.repeat", fill)
        expected = "Error: cpu has not enough memory for the report's batches of 4; use another --device.\n"
        assert run("repeat", REPORT, *INPUTS).output == expected
