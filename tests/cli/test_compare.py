"""``pml-adversarial compare``: the table of a comparison, from two files."""

import pytest
from click.testing import CliRunner
from query_batches import images_of, network

from pml_adversarial.cli import main
from pml_adversarial.evaluation import compare, evaluate_robustness, quick


@pytest.fixture(scope="module")
def reports():
    options = {"eps": (4 / 255, 0.05), "attacks": quick(2, 1), "checks": False}
    found = [evaluate_robustness(network(seed), images_of(), **options) for seed in (5, 6)]
    return [*found, evaluate_robustness(network(), images_of(30), **options)]


@pytest.fixture
def written(reports, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, report in zip(("one.json", "two.json", "other.json"), reports, strict=True):
        report.save_json(name)
    return reports


def run(*arguments):
    return CliRunner().invoke(main, ["compare", *arguments])


def test_prints_the_comparison(written):
    result = run("one.json", "two.json")
    assert result.exit_code == 0, result.output
    assert result.output == f"a: one.json\nb: two.json\n\n{compare(*written[:2])}\n"


@pytest.mark.parametrize(("text", "eps"), [("4/255", 4 / 255), ("0.05,4/255", (0.05, 4 / 255))])
def test_at_some_eps(written, text, eps):
    assert run("one.json", "two.json", "--eps", text).output.endswith(f"{compare(*written[:2], eps=eps)}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.json", "other.json"], "Error: The reports are not on the same queries. They differ in subset"),
        (["one.json", "two.json", "--eps", "0.3"], "Error: The reports have the eps"),
        (["one.json", "two.json", "--eps", "x"], "expected numbers with commas"),
        (["one.json", "nowhere.json"], "does not exist"),
        (["one.json", "broken.json"], "Error: broken.json holds no report"),
        (["one.json"], "Missing argument 'B'"),
    ],
)
def test_what_is_refused(written, tmp_path, arguments, message):
    (tmp_path / "broken.json").write_text("{}")
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code > 0
    assert message in result.output
