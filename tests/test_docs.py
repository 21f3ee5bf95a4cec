import html
import inspect
import json
import logging
import re
import runpy
from pathlib import Path

import pytest

from pml_adversarial.plugins.hookspecs import PROJECT, HookSpecs
from pml_adversarial.training import records

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("api/*.md")])
HOOKS = {name: hook for name, hook in vars(HookSpecs).items() if name.startswith(f"{PROJECT}_")}
TESTED = [*DOCS.glob("examples/*.py"), *DOCS.glob("example_plugin/*.*")]
HELD = [
    "robustness.md",
    "experiments.md",
    "evaluation.md",
    "performance.md",
]  # whose tables are compared with committed files
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(page):
    """Source of each block, moved down to its line in the page, so that tracebacks point there."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in PYTHON_BLOCK.finditer(text)]


def signature(name):
    return f"{name}({', '.join(inspect.signature(HOOKS[name]).parameters)})"


@pytest.mark.parametrize("name", HOOKS)
def test_signature_of_the_hook_is_documented(name):
    assert f"`{signature(name)}`" in (DOCS / "hooks.md").read_text(encoding="utf-8")


def test_no_other_signature_is_documented():
    documented = re.findall(rf"^## `({PROJECT}_\w+\(.*\))`$", (DOCS / "hooks.md").read_text(encoding="utf-8"), re.M)
    assert documented == [signature(name) for name in HOOKS]  # in the order in which a batch meets them


@pytest.mark.parametrize("name", HOOKS)
def test_hook_has_a_test(name):
    others = [path for path in (ROOT / "tests").glob("**/*.py") if path != Path(__file__)]
    assert any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in others)


def test_figures_are_those_of_the_committed_run():
    runs = json.loads((ROOT / "benchmarks" / "digits.json").read_text(encoding="utf-8"))["runs"]
    evaluation = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    for run in runs:
        plain, adversarial = (in_percent(run["models"][kind]) for kind in ("plain", "adversarial"))
        cells = [f"{before} → {after}" for before, after in zip(plain, adversarial, strict=True)][:4]
        classes = run["train_classes"]
        assert f"| {classes[0]}-{classes[-1]} | {run['loss']} | {' | '.join(cells)} |" in evaluation


def test_figures_of_omniglot_are_those_of_the_committed_run():
    found = json.loads((ROOT / "benchmarks" / "omniglot.json").read_text(encoding="utf-8"))
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    plain, adversarial = (rows_of(found[name]) for name in ("plain", "adversarial"))
    for line, value in plain.items():
        assert f"| {line} | {value:.1f} | {adversarial[line]:.1f} |" in page
    for model in found.values():
        assert all(check["passed"] for check in model["report"]["checks"])
        ours = model["worst_case"]
        for peer in model["peers"].values():
            assert all(ours <= left for left in peer["recall_at_1_under"].values())
            assert not any(peer["broken_by_it_alone"].values())


def test_figures_of_all_uses_are_those_of_the_committed_run():
    found = json.loads((ROOT / "benchmarks" / "results" / "uses.json").read_text(encoding="utf-8"))
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    rows = dict.fromkeys(row for uses in found.values() for use in uses.values() for row in use)
    assert len(rows) == 16
    for row in rows:
        cells = [next(use[row] for use in uses.values() if row in use) for uses in found.values()]
        shown = " | ".join(f"{100 * v:.1f} [{100 * low:.0f}, {100 * high:.0f}]" for v, (low, high) in cells)
        assert f"| {row} | {shown} |" in page


def test_figures_of_fast_suites_are_those_of_the_committed_run():
    found = json.loads((ROOT / "benchmarks" / "results" / "fast_suite.json").read_text(encoding="utf-8"))
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    assert len(found) == 3
    for suites in found.values():
        standard, fast = suites["standard"], suites["fast"]
        cells = [list(suite["worst"]["query"].values())[1:] for suite in (standard, fast)]
        assert all(0 <= less - more <= 0.02 + 1e-9 for more, less in zip(*cells, strict=True))
        shown = [", ".join(f"{100 * value:.1f}" for value in values) for values in cells]
        share = 100 * fast["passes"]["query"] / standard["passes"]["query"]
        assert f"| {fast['queries']} | {' | '.join(shown)} | {share:.1f} |" in page


def rows_of(model):
    report, published, corrected = model["report"], model["peers"]["published"], model["peers"]["corrected"]
    low, high = sorted({attack["eps"] for attack in report["attacks"]})
    worst = {worst["eps"]: worst["measures"]["recall_at_1"] for worst in report["worst"] if worst["target"] == "query"}
    rows = {"without attack": report["clean"]["recall_at_1"]}
    rows |= {f"**worst case per query**, {255 * eps:.0f}/255": worst[eps] for eps in (low, high)}
    for attack in report["attacks"]:
        if attack["target"] == "query" and attack["eps"] == high:
            rows[f"`{attack['attack']}`, 26/255"] = attack["measures"]["recall_at_1"]
    rows["ES:R as published, 26/255"] = published["recall_at_1_under"]["ES:R"]
    for name, peer in (("as published", published), ("corrected", corrected)):
        rows |= {f"{score} {name}": peer["recall_at_1_under"][score] for score in ("LTM", "GTM")}
    rows = {line: 100 * value for line, value in rows.items()}
    return {**rows, "(ERS as published, a score out of 100)": published["ers"], "(ERS corrected)": corrected["ers"]}


def in_percent(model):
    return [f"{100 * value:.1f}" for value in (model["recall_at_1"], model["map_at_r"], *model["worst_case"].values())]


@pytest.mark.parametrize("name", [*records.STANDARD, *records.OF_LOSSES])
def test_record_is_documented(name):
    assert f"| `{name}` |" in (DOCS / "records.md").read_text(encoding="utf-8")


@pytest.fixture
def same_log_level():
    logger = logging.getLogger(PROJECT)
    before = logger.level
    yield
    logger.setLevel(before)


WITH_CODE = [page for page in [ROOT / "README.md", *PAGES] if python_blocks(page)]
LONG = {"evaluation.md"}


@pytest.mark.usefixtures("same_log_level")
@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.name, marks=[pytest.mark.slow] * (p.name in LONG)) for p in WITH_CODE]
)
def test_code_of_the_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": f"docs_{page.stem}"}
    monkeypatch.syspath_prepend(DOCS / "example_plugin")
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", [DOCS / "evaluation.md", ROOT / "README.md"], ids=lambda page: page.name)
def test_the_report_that_is_shown_is_what_is_printed(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks(page)[0], page, "exec"), {"__name__": "docs_report"})
    (shown,) = re.findall(r"^```text\n(attack .*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    printed = [without_numbers(line) for line in capsys.readouterr().out.splitlines()]
    expected = [without_numbers(line) for line in shown.splitlines()]
    if shown.endswith("\n...\n"):  # the rest is left out
        expected.pop()
        printed = [*printed[:6], *(line for line in printed if isinstance(line, str))][: len(expected)]
    assert printed == expected


def test_the_readme_says_what_it_is_for_in_a_minute():
    opening = (ROOT / "README.md").read_text(encoding="utf-8").partition("## How it works")[0]
    words = re.sub(r'alt="[^"]*"', "", opening).split()
    assert len(words) <= 350


def without_numbers(line):
    """What a line says, apart from what another version of PyTorch may change."""
    return line.split(": ")[0] if line.startswith("[") else re.sub(r"[\d.,]+|-{9,}", "", line).split()


def test_every_block_says_what_it_is():
    fences = re.compile(r"^```([^\n`]*)$", re.MULTILINE)
    known = {"python", "text", "console", "toml", "{eval-rst}", "{include} ../CHANGELOG.md", "{toctree}"}
    shown = {"{literalinclude} " + path.relative_to(DOCS).as_posix() for path in TESTED}
    for page in PAGES:
        opening = fences.findall(page.read_text(encoding="utf-8"))[::2]
        assert set(opening) <= known | shown, page.name


def test_every_example_is_shown():
    page = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("examples.md", "distributed.md"))
    for path in DOCS.glob("examples/*.*"):
        assert f"`{path.name}`" in page
        assert path.suffix == ".ipynb" or f"{{literalinclude}} examples/{path.name}\n" in page


def test_rows_that_are_quoted_are_those_of_a_table_that_is_held_to_its_files():
    held = {line for page in HELD for line in (DOCS / page).read_text(encoding="utf-8").splitlines()}
    rows = re.findall(r"^ *(\|.*(?:±|→).*\|)$", (DOCS / "choosing.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) == 6
    assert set(rows) <= held


def test_the_cost_of_an_installation_is_that_of_the_committed_file():
    found = json.loads((ROOT / "benchmarks" / "results" / "installation.json").read_text(encoding="utf-8"))
    page = (DOCS / "installing.md").read_text(encoding="utf-8")
    seconds, installed = found["import_seconds"], found["distributions"]
    assert f"| distributions | {len(installed)} |" in page
    assert f"included | {sum(one['megabytes'] for one in installed.values()):,.0f} |" in page
    assert f"| `import torch`, seconds | {seconds['torch']:.2f} |" in page
    both = seconds["torch, pytorch-metric-learning, torchattacks"]
    assert f"| and pytorch-metric-learning and torchattacks | {both:.2f} |" in page
    assert f"| `import pml_adversarial`, which imports these | {seconds['pml_adversarial']:.2f} |" in page


def test_paths_of_commands_are_there():
    blocks = re.compile(r"^```(?:console|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    commands = "".join(
        block for page in [ROOT / "README.md", *PAGES] for block in blocks.findall(page.read_text("utf-8"))
    )
    named = set(re.findall(r"(?<=[ \n])(?:\.ci|docs|tests|benchmarks)/[\w./]+", commands))
    assert {".ci/develop", "docs/example_plugin"} <= named
    assert all((ROOT / path).exists() for path in named - {"docs/_build"}), named


def test_every_file_of_the_package_is_on_the_page_of_the_architecture():
    package = ROOT / "pml_adversarial"
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (At the root|`[\w/]+/`)\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL))
    folders = {path.parent for path in package.rglob("__init__.py")} - {package / "evaluation" / "reports" / "html"}
    for folder in folders:
        section = sections["At the root" if folder == package else f"`{folder.relative_to(package)}/`"]
        files = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
        assert set(re.findall(r"`(\w+\.py)`", section)) == files, folder


def test_every_page_is_in_a_table_of_contents():
    lists = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("index.md", "api.md"))
    listed = {line for block in re.findall(r"```{toctree}\n(.*?)```", lists, re.DOTALL) for line in block.split("\n")}
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"} <= listed


@pytest.mark.parametrize("name", ["recall_light.svg", "recall_dark.svg"])
def test_the_picture_of_the_readme_shows_the_committed_runs(name):
    drawn = (DOCS / "pictures" / name).read_text(encoding="utf-8")
    (about,) = re.findall(r"<dc:description>(.*?)</dc:description>", drawn)
    recall = runpy.run_path(str(DOCS / "pictures" / "recall.py"), run_name="pictures")
    shown = {title: recall["curves"](*panel) for title, panel in recall["PANELS"].items()}
    assert json.loads(html.unescape(about)) == json.loads(json.dumps(shown))
