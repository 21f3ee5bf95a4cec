"""``pml-adversarial compare``: the table of a comparison, from two files."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from page_trees import Tree
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


def test_several_are_compared_with_the_first(written):
    written[0].save_json("third.json")
    found = run("one.json", "two.json", "third.json").output
    one, two = compare(written[0], written[1]), compare(written[0], written[0])
    assert found == f"a: one.json\nb: two.json\n\n{one}\na: one.json\nb: third.json\n\n{two}\n"


class TestPage:
    def names(self, path="page.html"):
        return [
            row.all("th")[0].text.strip("● ") for row in Tree(Path(path).read_text()).root.all("table")[0].all("tr")
        ][1:]

    @pytest.mark.parametrize(
        ("options", "names"), [([], ["one", "two"]), (["--names", "plain, robust <1>"], ["plain", "robust <1>"])]
    )
    def test_is_written(self, written, options, names):
        result = run("one.json", "two.json", "--page", "page.html", *options)
        assert result.output.endswith("\nWritten to page.html\n")
        assert self.names() == names
        assert "is there already; choose another file" in run("one.json", "two.json", "--page", "page.html").output
        assert run("one.json", "two.json", "--page", "page.html", "--force").exit_code == 0

    def test_names_of_folders(self, written):
        for name, report in zip("ab", written, strict=False):
            Path(name).mkdir()
            report.save_json(f"{name}/report.json")
        assert run("a/report.json", "b/report.json", "--page", "page.html").exit_code == 0
        assert self.names() == ["a", "b"]

    def test_names_that_are_alike(self, written):
        Path("b").mkdir()
        written[1].save_json("b/one.json")
        assert run("one.json", "b/one.json", "--page", "page.html").exit_code == 0
        assert self.names() == ["one.json", "b/one.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.json", "other.json"], "Error: The reports are not on the same queries. They differ in subset"),
        (["one.json", "two.json", "--eps", "0.3"], "Error: The reports have the eps"),
        (["one.json", "two.json", "--eps", "x"], "expected numbers with commas"),
        (["one.json", "nowhere.json"], "does not exist"),
        (["one.json", "broken.json"], "Error: broken.json holds no report"),
        (["one.json"], "only one.json; expected the reports of two or more models"),
        (["one.json", "one.json"], "one is given twice"),
        ([], "Missing argument 'REPORTS...'"),
        (["one.json", "two.json", "--names", "a"], "expected 2 different names with commas"),
        (["one.json", "two.json", "--names", "a,a"], "expected 2 different names with commas"),
        (["one.json", "two.json", "--names", "a,"], "expected 2 different names with commas"),
        (["one.json", "two.json", "--page", "broken.json"], "broken.json is there already"),
    ],
)
def test_what_is_refused(written, tmp_path, arguments, message):
    (tmp_path / "broken.json").write_text("{}")
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code > 0
    assert message in result.output
