"""What is built, installed and imported; `.ci/package` does the same with nothing but what pip brings."""

import ast
import re
import sys
import tarfile
import textwrap
import zipfile
from email import message_from_string
from pathlib import Path

import mypy.api
import pytest
from fresh import Environment, run

import pml_adversarial
from pml_adversarial import PluginError
from pml_adversarial.plugins.manager import find

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "tests" / "smoke.py"
PLUGIN = ROOT / "docs" / "example_plugin"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A fresh environment with the wheel in it."""
    fresh = Environment(tmp_path_factory.mktemp("fresh"))
    fresh.install(built["wheel"])
    return fresh


@pytest.fixture(scope="module")
def with_plugin(built, tmp_path_factory):
    """A fresh environment with the wheel and docs/example_plugin in it."""
    fresh = Environment(tmp_path_factory.mktemp("with_plugin"))
    fresh.install(built["wheel"])
    fresh.install(PLUGIN)
    return fresh


class TestDistributions:
    def test_wheel_holds_the_package_alone(self, built):
        names = zipfile.ZipFile(built["wheel"]).namelist()
        files = [path for path in (ROOT / "pml_adversarial").rglob("*.*") if path.suffix != ".pyc"]
        assert {path.relative_to(ROOT).as_posix() for path in files} <= set(names)
        assert {"pml_adversarial/py.typed", "pml_adversarial/evaluation/reports/html/templates/page.html"} <= set(names)
        assert all(name.startswith(("pml_adversarial/", "pml_adversarial-")) for name in names)

    def test_sdist_holds_what_it_is_tested_with(self, built):
        with tarfile.open(built["sdist"]) as file:
            names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
        assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/smoke.py", "docs/conf.py"} <= names

    def test_metadata(self, built):
        wheel = zipfile.ZipFile(built["wheel"])
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        metadata = message_from_string(wheel.read(name).decode())
        assert (metadata["Name"], metadata["Version"]) == ("pml-adversarial", pml_adversarial.__version__)
        required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
        assert {re.match(r"[\w-]+", line)[0] for line in required} == {
            "jinja2",
            "numpy",
            "pluggy",
            "pytorch-metric-learning",
            "scipy",
            "torch",
            "torchattacks",
        }
        assert metadata["Description-Content-Type"] == "text/markdown"
        names = {line.split(", ")[0] for line in metadata.get_all("Project-URL")}
        assert names == {"Documentation", "Source", "Changelog", "Issues"}

    def test_links_of_the_description_work_outside_of_the_repository(self, built):
        wheel = zipfile.ZipFile(built["wheel"])
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        described = message_from_string(wheel.read(name).decode()).get_payload()
        links = re.findall(r"\]\(([^)]+)\)", described) + re.findall(r'src(?:set)?="([^"]+)"', described)
        assert len(links) > 10
        assert all(link.startswith("https://") for link in links), links
        (here,) = re.findall(r'^Source = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        ours = [re.sub(rf"{here}/(?:blob|raw)/main/([^#]+).*", r"\1", link) for link in links if link.startswith(here)]
        assert ours
        assert all((ROOT / path).exists() for path in ours), ours

    def test_the_citation_is_of_this_version(self):
        cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
        assert f"\nversion: {pml_adversarial.__version__}\n" in cited
        assert f"version = {{{pml_adversarial.__version__}}}" in (ROOT / "docs" / "citing.md").read_text(
            encoding="utf-8"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["wheel", "sdist"])
    def test_works_in_a_fresh_environment(self, built, kind, tmp_path):
        fresh = Environment(tmp_path)
        fresh.install(built[kind])
        where = fresh.run("-c", "import pml_adversarial; print(pml_adversarial.__file__)")
        assert where.startswith(str(tmp_path))
        assert fresh.run(SMOKE).startswith(f"works: pml_adversarial {pml_adversarial.__version__}")


USE = """
    import torch
    from embedding_shift import EmbeddingShift
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pml_adversarial import AdversarialLoss, PluginError

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    for plugin in (EmbeddingShift(), EmbeddingShift, "embedding_shift"):
        loss_func = AdversarialLoss(TripletMarginLoss(), model, plugins=[plugin], warmup=0)
        loss_func(model(torch.rand(8, 1, 4, 4)), torch.arange(8) // 2).backward()
        assert loss_func.score_gain > 0
        print(*(type(plugin).__name__ for plugin in loss_func.adversary.hooks.plugins))
    for name in ("embeding_shift", "embedding-shift", "Embedding_Shift"):
        try:
            AdversarialLoss(TripletMarginLoss(), model, plugins=[name])
        except PluginError as error:
            print(error)
"""


class TestExamplePlugin:
    @pytest.mark.slow
    def test_its_own_tests_pass(self, with_plugin):
        out = with_plugin.run("-m", "pytest", "-p", "no:cacheprovider", PLUGIN)
        assert "6 passed" in out

    def test_by_object_by_class_by_name_and_misspelt(self, with_plugin):
        lines = with_plugin.run("-c", textwrap.dedent(USE)).splitlines()
        assert lines[:3] == ["EmbeddingShift FixedContext"] * 3
        for line, name in zip(lines[3:], ["embeding_shift", "embedding-shift", "Embedding_Shift"], strict=True):
            assert line.startswith(
                f"No plugin named {name!r} is installed; found ['act', 'amd', 'awp', 'embedding_shift', "
            )
            assert "Did you mean 'embedding_shift'?" in line

    def test_is_not_there_where_it_is_not_installed(self):
        with pytest.raises(PluginError, match=r"No plugin named 'embedding_shift' is installed; found \['act', 'amd'"):
            find("embedding_shift")


class TestImport:
    def test_brings_only_what_it_needs(self, installed):
        code = """
            import sys
            import torch
            before = {name.split(".")[0] for name in sys.modules}
            import pml_adversarial
            print(*sorted({name.split(".")[0] for name in sys.modules} - before - sys.stdlib_module_names))
        """
        brought = set(installed.run("-c", textwrap.dedent(code)).split())
        assert {"pml_adversarial", "pytorch_metric_learning", "torchattacks", "pluggy", "scipy"} <= brought
        heavy = {
            "sklearn",
            "matplotlib",
            "torchvision",
            "PIL",
            "requests",
            "pandas",
            "faiss",
            "tensorboard",
            "lightning",
        }
        assert not brought & heavy

    def test_asks_for_no_connection(self, installed):
        code = """
            import socket
            def refuse(*arguments, **options):
                raise AssertionError("a connection")
            socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
            import pml_adversarial, pml_adversarial.evaluation, pml_adversarial.cli, pml_adversarial.defenses
            print("none")
        """
        assert installed.run("-c", textwrap.dedent(code)) == "none\n"

    def test_no_module_imports_what_could(self):
        could = {"requests", "urllib", "http", "ftplib", "socket", "httpx", "aiohttp"}
        for path in (ROOT / "pml_adversarial").rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            modules = plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            assert not {name.split(".")[0] for name in modules} & could, path.name


RIGHT = """
    from functools import partial

    import torch
    import torchattacks
    from torch import Tensor, nn
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    from pml_adversarial import (
        AdversarialLoss, AdversarialMiner, Batch, FixedContext, Plan, Report, attacks, evaluate_robustness, hookimpl
    )
    from pml_adversarial.defenses.hm import HM

    class Mine:
        @hookimpl
        def pml_adversarial_plan(self, batch: Batch) -> Plan | None:
            return None

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
    loss_func = AdversarialLoss(
        TripletMarginLoss(), model, attack=attacks.preset(4 / 255), plugins=["ics", HM(), Mine], warmup=10,
    )
    chosen = AdversarialLoss(
        TripletMarginLoss(), model, eps=4 / 255, steps=5, perturb=("positive", "negative"), warmup=0.5, total_steps=100
    )
    by_method = AdversarialLoss(TripletMarginLoss(), model, method=FixedContext(perturb="anchor"))
    published = AdversarialLoss.seed_paper(TripletMarginLoss(), model)
    other = AdversarialLoss(TripletMarginLoss(), attack=partial(torchattacks.PGD, eps=0.1), perturb="all")
    miner = AdversarialMiner(MultiSimilarityMiner(), [model])
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) // 2
    embeddings: Tensor = model(images)
    loss: Tensor = loss_func(embeddings, labels, miner(embeddings, labels))
    share: float = loss_func.share_score_rose
    strength: float = loss_func.records.strength
    gains: dict[str, float] = dict(loss_func.records.of_plugins)
    report: Report = evaluate_robustness(model, (images, labels), eps=[1 / 255, 8 / 255])
    worst: float = report.worst_case(8 / 255)
"""
WRONG = {
    "AdversarialLoss(TripletMarginLoss(), model, warmup='long')": "arg-type",
    "AdversarialLoss(TripletMarginLoss(), model, epsilon=0.1)": "call-arg",
    "AdversarialLoss(TripletMarginLoss(), model, perturb='positives')": "arg-type",
    "AdversarialMiner(MultiSimilarityMiner(), model, perturb=('anchor', 'positives'))": "arg-type",
    "FixedContext(perturb='positives')": "arg-type",
    "loss_func.records.strengh": "attr-defined",
    "miner.records.loss_after": "attr-defined",
    "published.records.strengh": "attr-defined",
    "AdversarialMiner(MultiSimilarityMiner(), model, seed='x')": "arg-type",
    "evaluate_robustness(model, (images, labels), eps='8/255')": "arg-type",
    "attacks.preset('large')": "arg-type",
    "report.worst_case()": "call-arg",
    "report.nothing": "attr-defined",
}


@pytest.mark.slow
class TestTypes:
    def check(self, source, folder, fresh):
        script = folder / "script.py"
        script.write_text(source, encoding="utf-8")
        options = ["--strict", "--python-executable", fresh.python, "--config-file="]
        options += [
            "--disable-error-code=import-untyped",
            "--allow-untyped-calls",
            "--cache-dir",
            str(folder / "cache"),
        ]
        return mypy.api.run([*options, str(script)])

    def test_a_users_script(self, installed, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # not where the sources lie: what is installed is what counts
        right = textwrap.dedent(RIGHT)
        out, err, code = self.check(right, tmp_path, installed)
        assert (out, err, code) == ("Success: no issues found in 1 source file\n", "", 0)
        out, _, code = self.check(right + "\n".join(WRONG) + "\n", tmp_path, installed)
        assert code == 1
        first = right.count("\n") + 1
        found = {int(line.split(":")[1]): line for line in out.splitlines() if " error: " in line}
        assert sorted(found) == list(range(first, first + len(WRONG)))
        for line, (statement, kind) in enumerate(WRONG.items(), first):
            assert f"[{kind}]" in found[line], statement
