"""The command ``leaderboard``, as a user types it."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from pml_adversarial import evaluate_robustness
from pml_adversarial.cli import main

KNOWN = ["--method", "M", "--data", "D", "--split", "S", "--backbone", "B", "--passes", "9", "--train-eps", "8/255"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.manual_seed(0)
    images, labels = torch.rand(100, 1, 4, 4), torch.arange(100) // 5
    found = evaluate_robustness(nn.Flatten(), (images, labels), eps=0.1, attacks=["margin"], checks=False)
    path = tmp_path_factory.mktemp("report") / "report.json"
    found.save_json(path)
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["leaderboard", *map(str, arguments)])


def test_an_entry_and_the_page(report, tmp_path):
    board, page = tmp_path / "board", tmp_path / "page.md"
    page.write_text("# Mine\n\nRules.\n\n", encoding="utf-8")
    result = run("add", report, *KNOWN, "--board", board, "--unchecked")
    assert result.exit_code == 0, result.output
    (path,) = board.glob("Linf/*.json")
    assert str(path) in result.output
    entry = json.loads(path.read_text(encoding="utf-8"))
    assert (entry["method"], entry["train_eps"], entry["queries"]) == ("M", 8 / 255, 100)
    for _ in range(2):  # a second time it replaces the tables
        assert run("page", "--board", board, "--page", page).exit_code == 0
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# Mine\n\nRules.\n\n<!-- The rest is generated")
        assert text.count("## D, Linf") == 1


def test_a_report_without_checks_is_refused_and_nothing_is_written(report, tmp_path):
    result = run("add", report, *KNOWN, "--board", tmp_path / "board")
    assert result.exit_code == 1
    assert "was made without checks" in result.output
    assert not (tmp_path / "board").exists()


def test_a_second_entry_of_that_name(report, tmp_path):
    arguments = ["add", report, *KNOWN, "--board", tmp_path, "--unchecked"]
    assert run(*arguments).exit_code == 0
    assert "--force" in run(*arguments).output
    assert run(*arguments, "--force").exit_code == 0


def test_what_is_no_radius(report, tmp_path):
    result = run("add", report, *KNOWN[:-1], "eight", "--board", tmp_path)
    assert result.exit_code == 2
    assert "--train-eps" in result.output


def test_no_entries(tmp_path):
    result = run("page", "--board", tmp_path, "--page", tmp_path / "page.md")
    assert result.exit_code == 1
    assert "holds no entries" in result.output
    assert not (tmp_path / "page.md").exists()
