import ast
from pathlib import Path

import pytest

import pml_adversarial

PACKAGE = Path(pml_adversarial.__file__).parent
FLOORS = [
    ["errors", "batch", "ball"],
    ["records", "plan", "capture", "isolation", "attacks", "pixels", "distributed"],
    ["objective", "intake"],
    ["hookspecs"],
    ["addressing"],
    ["scores"],
    ["plugins", "defaults", "collapse"],
    ["adversary"],
    ["defenses", "evaluation", "savings"],
    ["losses", "miners", "datasets", "loading", "testers"],
    ["__init__"],
    ["demo", "figures"],
    ["cli"],
    ["__main__"],
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
AT_THE_EDGE = {"evaluation", "cli", "demo"}
MAY_IMPORT = {
    "torchattacks": {"attacks"} | AT_THE_EDGE,
    "pytorch_metric_learning": {"addressing", "scores", "records", "losses", "miners", "testers"} | AT_THE_EDGE,
}
PUBLIC = [
    "Adversarial",
    "AdversarialError",
    "AdversarialLoss",
    "AdversarialMiner",
    "AdversarialTester",
    "AttackError",
    "Batch",
    "CaptureError",
    "InputError",
    "Plan",
    "PlanError",
    "PluginError",
    "Report",
    "evaluate_robustness",
    "hookimpl",
]


def part_of(path):
    """The module, or the package inside the package, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def absolute(node, path):
    """The dotted names that an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = node.module.split(".") if node.module else []
    if node.level:
        here = [PACKAGE.name, *path.relative_to(PACKAGE).parent.parts]
        module = [*here[: len(here) - node.level + 1], *module]
    return [".".join([*module, alias.name]) for alias in node.names]


def imports(tree, path):
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [name.split(".") for node in nodes for name in absolute(node, path)]


def own_imports(tree, path):
    """Parts of this package that a file imports; a name of the package itself is one of `__init__`."""
    names = [name[1:] for name in imports(tree, path) if name[0] == PACKAGE.name]
    return [name[0] if name and (name[0] in FLOOR_OF or is_module(name[0])) else "__init__" for name in names]


def is_module(name):
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def breaches(source, path):
    """Imports that do not lead strictly downwards; within a package of the package they are free."""
    own = part_of(path)
    parts = own_imports(ast.parse(source), path)
    return [
        part for part in parts if FLOOR_OF.get(part, 99) >= FLOOR_OF.get(own, -1) and not (part == own != "__init__")
    ]


SOURCES = sorted(PACKAGE.rglob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])


@each_source
class TestEachModule:
    def test_has_a_floor(self, path):
        assert part_of(path) in FLOOR_OF

    def test_imports_strictly_downwards(self, path):
        assert breaches(path.read_text(), path) == []

    def test_knows_only_the_libraries_of_its_place(self, path):
        known = {name[0] for name in imports(ast.parse(path.read_text()), path)}
        assert [library for library in known & set(MAY_IMPORT) if part_of(path) not in MAY_IMPORT[library]] == []

    def test_asserts_nothing(self, path):
        assert [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)] == []

    def test_prints_nothing(self, path):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert printed == [] or part_of(path) == "cli"

    def test_opens_with_a_docstring(self, path):
        assert ast.get_docstring(ast.parse(path.read_text()))


class TestTheTestItself:
    @pytest.mark.parametrize(
        ("file", "source", "found"),
        [
            ("plan.py", "from .batch import IndicesTuple", []),
            ("plan.py", "from .capture import InputCapture", ["capture"]),
            ("plan.py", "from .objective import Objective", ["objective"]),
            ("plan.py", "from . import attacks, errors", ["attacks"]),
            ("plan.py", "import pml_adversarial.losses", ["losses"]),
            ("plan.py", "from pml_adversarial import Plan", ["__init__"]),
            ("plan.py", "import torch\nfrom torch import nn", []),
            ("plan.py", "def late():\n    from .losses import AdversarialLoss", ["losses"]),
            ("evaluation/suites.py", "from .. import attacks\nfrom ..objective import Objective", []),
            ("evaluation/suites.py", "from .retrieval import Gallery\nfrom . import scores", []),
            ("evaluation/suites.py", "from ..losses import AdversarialLoss", ["losses"]),
            ("evaluation/suites.py", "from .. import AdversarialLoss", ["__init__"]),
            ("evaluation/suites.py", "from ..defenses.act import ACT", ["defenses"]),
            ("cli.py", "from . import __version__\nfrom .evaluation import Gallery", []),
            ("cli/digits.py", "from .options import radii\nfrom ..demo import run", []),
            ("loading.py", "from .datasets import images_from", ["datasets"]),
            ("__init__.py", "from .losses import AdversarialLoss", []),
            ("__init__.py", "from .cli import main", ["cli"]),
        ],
    )
    def test_finds_breaches(self, file, source, found):
        assert breaches(source, PACKAGE / file) == found

    def test_every_module_is_looked_at(self):
        assert {part_of(path) for path in SOURCES} >= {"__init__", "attacks", "losses", "plan"}

    def test_each_part_has_one_floor(self):
        assert len(FLOOR_OF) == sum(map(len, FLOORS))


class TestPublicNames:
    def test_are_these(self):
        assert pml_adversarial.__all__ == PUBLIC

    @pytest.mark.parametrize("name", PUBLIC)
    def test_is_there_and_documented(self, name):
        value = getattr(pml_adversarial, name)
        assert value.__doc__

    def test_errors_are_of_one_family(self):
        errors = [getattr(pml_adversarial, name) for name in PUBLIC if name.endswith("Error")]
        assert all(issubclass(error, pml_adversarial.AdversarialError) for error in errors)
        builtins = {
            error: (RuntimeError, ValueError) for error in errors if error is not pml_adversarial.AdversarialError
        }
        assert all(issubclass(error, families) for error, families in builtins.items())

    def test_version(self):
        assert all(part.isdigit() for part in pml_adversarial.__version__.split("."))
