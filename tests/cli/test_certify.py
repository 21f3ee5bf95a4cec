"""``pml-adversarial certify``: the bounds of a saved model, as from Python, printed and written."""

import json

import numpy
import pytest
import torch
from click.testing import CliRunner
from query_batches import images_of
from torch import nn
from torch.export import Dim

from pml_adversarial.cli import main
from pml_adversarial.evaluation import certify

NEEDED = ("--model", "model.pt2", "--queries", "queries.npz", "--quiet")
FAST = ("--samples", "200", "--alpha", "0.1", "--limit", "5")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    program = torch.export.export(network, (torch.rand(2, 1, 6, 6),), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, "model.pt2")
    images, labels = images_of()
    numpy.savez("queries.npz", images=images.numpy(), labels=labels.numpy())
    return network


def run(*arguments):
    return CliRunner().invoke(main, ["certify", *NEEDED, *arguments])


def test_is_what_python_gives(workplace, tmp_path):
    result = run("--sigma", "0.1", "--radii", "0.05,0", *FAST)
    assert result.exit_code == 0, result.output
    subset = sorted(torch.randperm(24, generator=torch.Generator().manual_seed(0))[:5].tolist())
    options = {"sigma": 0.1, "radii": (0, 0.05), "samples": 200, "alpha": 0.1, "subset": subset}
    found = certify(workplace, images_of(), **options)
    assert result.output == f"{found}\n\nWritten to pml_adversarial_certificate/: certificate.json\n"
    kept = json.loads((tmp_path / "pml_adversarial_certificate" / "certificate.json").read_text())
    assert kept == json.loads(json.dumps(found.to_dict()))
    assert "certificate.json already" in run("--sigma", "0.1", "--radii", "0", *FAST).output
    assert run("--sigma", "0.1", "--radii", "0", *FAST, "--force").exit_code == 0


def test_queries_in_the_gallery(workplace, tmp_path):
    asked = ("--gallery", "queries.npz", "--sigma", "0.1", "--radii", "0", *FAST, "--force")
    kept = tmp_path / "pml_adversarial_certificate" / "certificate.json"
    subset = sorted(torch.randperm(24, generator=torch.Generator().manual_seed(0))[:5].tolist())
    options = {"sigma": 0.1, "radii": 0, "samples": 200, "alpha": 0.1, "subset": subset}
    for arguments, own in (((), None), (("--own", "same"), "same")):
        found = certify(workplace, images_of(), images_of(), own=own, **options)
        result = run(*asked, *arguments)
        assert str(found) in result.output
        assert json.loads(kept.read_text())["radius"] == found.radius.tolist()
        assert "note: " in result.output
        assert ("5 of 5 queries find their own image" in result.output) is (own is None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--radii", "0"], "Missing option '--sigma'"),
        (["--sigma", "0.1"], "Missing option '--radii'"),
        (["--sigma", "0", "--radii", "0"], "Error: sigma=0.0; expected"),
        (["--sigma", "0.1", "--radii", "-1"], "Invalid value for --radii: radii=[-1.0]; expected one or more radii"),
        (["--sigma", "0.1", "--radii", "x"], "expected numbers with commas"),
        (["--sigma", "0.1", "--radii", "0", "--samples", "5"], "Error: samples=5 certify nothing"),
        (["--sigma", "0.1", "--radii", "0", "--alpha", "1"], "Error: alpha=1.0; expected a probability"),
    ],
)
def test_what_is_refused(workplace, arguments, message):
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code > 0
    assert message in " ".join(result.output.split())
