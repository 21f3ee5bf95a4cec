import json
import runpy
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pml_adversarial.attacks import adapter
from pml_adversarial.cli import demo, main
from pml_adversarial.cli.demo import table

QUICK = ["--epochs", "1", "--attack-steps", "2", "--restarts", "1", "--eps", "0.05,0.1"]


def run(*arguments, output="out"):
    return CliRunner().invoke(main, [*QUICK, "--output", str(output), *arguments])


class TestRun:
    def test_prints_a_table_and_writes_what_it_says(self, tmp_path):
        result = run("--seeds", "2", output=tmp_path / "new" / "folder")
        assert result.exit_code == 0, result.output
        assert "train adversarial, seed 1" in result.output
        report = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
        assert [run["kind"] for run in report["runs"]] == ["plain", "adversarial"] * 2
        assert report["settings"]["seeds"] == [0, 1]
        for name in ("report.html", "comparison.html"):
            assert (tmp_path / "new" / "folder" / name).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        again = run("--seeds", "2", output=tmp_path / "new" / "folder")
        assert again.exit_code == 2
        assert "holds results.json, report.html, comparison.html, recall_against_eps.png, queries.png" in again.output
        for name in ("recall_against_eps.png", "queries.png"):
            assert (tmp_path / "new" / "folder" / name).read_bytes().startswith(b"\x89PNG")
        assert table(report) in result.output
        plain = report["models"]["plain"]
        row = next(line for line in result.output.splitlines() if line.split()[:1] == ["plain"])
        worst = [f"{100 * value:.1f}" for value in plain["worst_case"].values()]
        assert row.split()[1:] == [f"{100 * plain['recall_at_1']:.1f}", f"{100 * plain['map_at_r']:.1f}", *worst]
        mean = sum(run["recall_at_1"] for run in report["runs"] if run["kind"] == "plain") / 2
        assert plain["recall_at_1"] == pytest.approx(mean)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "arguments",
        [
            [
                "--loss",
                "TripletMarginLoss:margin=0.2",
                "--perturb",
                "positive,negative",
                "--train-classes",
                "5,6,7,8,9",
            ],
            ["--loss", "ProxyAnchorLoss", "--miner", "MultiSimilarityMiner:epsilon=0.2", "--clean-weight", "1"],
            ["--loss", "ContrastiveLoss", "--attack", "PGDL2:steps=2,eps=1.0", "--quiet"],
            ["--loss", "ArcFaceLoss", "--train-classes", "3,5,9"],
            ["--loss", "NTXentLoss", "--miner", "BatchEasyHardMiner:pos_strategy=easy", "--shift", "0"],
        ],
    )
    def test_other_losses_miners_and_attacks(self, arguments, tmp_path):
        result = run(*arguments, output=tmp_path)
        assert result.exit_code == 0, result.output

    @pytest.mark.slow
    def test_same_seed_same_numbers(self, tmp_path):
        found = []
        for name in ("a", "b"):
            assert run("--quiet", output=tmp_path / name).exit_code == 0
            report = json.loads((tmp_path / name / "results.json").read_text())
            found.append(report["models"])
        assert found[0] == found[1]

    def test_help_names_every_option(self):
        output = CliRunner().invoke(main, ["demo", "--help"]).output
        for option in (
            "loss",
            "miner",
            "attack",
            "eps",
            "perturb",
            "epochs",
            "output",
            "device",
            "seed",
            "train-classes",
        ):
            assert f"--{option}" in output


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--loss", "TripletLoss"], "Did you mean"),
            (["--loss", "TripletMarginLoss:margn=1"], "margn"),
            (["--loss", "TripletMarginLoss:margin"], "cannot be read"),
            (["--loss", "BaseMetricLossFunction"], "no loss named"),
            (["--attack", "PDG"], "Did you mean PGD"),
            (["--attack", "PGD:foo=1"], "PGD takes no foo"),
            (["--attack", "DeepFool"], "has no option eps"),
            (["--miner", "Miner"], "no miner named"),
            (["--perturb", "anchors"], "expected one or several of"),
            (["--eps", "a"], "expected numbers"),
            (["--eps", "2"], "expected 1 at most in Linf"),
            (["--device", "gpu"], "--device"),
            (["--train-classes", "1"], "at least two"),
            (["--train-classes", "1,x"], "expected digits with commas"),
            (["--train-classes", "0,1,11"], "no images of the classes [11]"),
            (["--loss", "VICRegLoss"], "not supported for this loss"),
            (["--miner", "BatchEasyHardMiner:pos_strategy=wrong"], "--miner"),
            (["--output", "/dev/null/folder"], "--output"),
            (["--train-classes", "0,1", "--batch-size", "800"], "at least one"),
            (["--epochs", "0"], "--epochs"),
            (["--attack", "TPGD"], "TPGD cannot be used in training"),
        ],
    )
    def test_say_what_is_wrong(self, arguments, message, tmp_path):
        result = run("--quiet", "--output", str(tmp_path), *arguments)
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit)
        assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("PGD", {"eps": 0.1, "alpha": 0.025}),  # of ten steps by default
        ("PGD:steps=5", {"eps": 0.1, "alpha": 0.05}),
        ("PGD:eps=0.2", {"eps": 0.2, "alpha": 0.05}),
        ("PGD:eps=0.2,alpha=0.01", {"eps": 0.2, "alpha": 0.01}),
    ],
)
def test_options_that_are_written_with_the_attack_count(text, budget):
    assert adapter.budget(demo._training_attack(text, 0.1)) == pytest.approx(budget)


def test_module_says_what_to_install_without_click(monkeypatch):
    monkeypatch.setitem(sys.modules, "click", None)
    for name in [name for name in sys.modules if name.startswith("pml_adversarial.cli")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"needs click.*pml-adversarial\[cli\]"):
        runpy.run_module("pml_adversarial", run_name="__main__")


def test_import_brings_neither_click_nor_matplotlib():
    heavy = ("click", "matplotlib", "record_keeper", "sklearn", "faiss")
    code = f"import sys, pml_adversarial; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
