"""The package is a house: imports lead strictly downwards, from folder to folder and within one, never in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

import pml_adversarial

PACKAGE = Path(pml_adversarial.__file__).parent
FLOORS = [  # from the ground up; a folder may import those below it
    ("errors",),
    ("attacks",),
    ("training",),
    ("plugins", "evaluation"),
    ("defenses", "losses", "miners", "testers"),
    ("__init__",),
    ("cli",),
    ("__main__",),
]
EVALUATION = [("runs",), ("retrieval",), ("attacks",), ("reports",)]  # its folders, in the same way
ROOT = {"__init__", "__main__", "errors", "losses", "miners", "testers"}
LIBRARIES = {  # library -> the only places that know it
    "torchattacks": {"attacks", "evaluation", "cli"},
    "pluggy": {"plugins"},
    "pytorch_metric_learning": {"training", "losses", "miners", "testers", "evaluation", "cli"},
    "torchvision": {"cli"},
    "matplotlib": {"cli"},
    "click": {"cli"},
    "sklearn": {"cli"},
}


def modules():
    """Dotted name inside the package -> syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(name, tree):
    """Dotted names that a module of the package imports, as written from the root of each library."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ["pml_adversarial", *name.split(".")[:-1]]
            base = here[: len(here) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def edges(trees):
    """Module -> modules of the package that it imports; the package itself counts as ``__init__``."""
    graph = {}
    for name, tree in trees.items():
        graph[name] = set()
        for target in imported(name, tree):
            if target.split(".")[0] != "pml_adversarial":
                continue
            parts = target.split(".")[1:]
            while parts and ".".join(parts) not in trees and ".".join([*parts, "__init__"]) not in trees:
                parts.pop()
            whole = ".".join(parts)
            graph[name].add(whole if whole in trees else ".".join([*parts, "__init__"]))
    return graph


def floor_of(name):
    part = name.split(".")[0]
    return next(floor for floor, parts in enumerate(FLOORS) if part in parts)


def breaches(trees):
    """Imports that lead up, or sideways between places of one floor."""
    return [
        f"{name} imports {target}"
        for name, targets in edges(trees).items()
        for target in targets
        if name.split(".")[0] != target.split(".")[0] and floor_of(target) >= floor_of(name)
    ]


def circle(trees):
    try:
        graphlib.TopologicalSorter(edges(trees)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_root_holds_doors_only():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {"attacks", "cli", "defenses", "evaluation", "plugins", "training"}


def test_imports_lead_downwards():
    assert breaches(modules()) == []


def test_folders_of_the_evaluation_lead_downwards():
    floors = {f"evaluation.{part}": floor for floor, parts in enumerate(EVALUATION) for part in parts}

    def floor(name):
        return next((floor for part, floor in floors.items() if name.startswith(f"{part}.")), len(floors))

    leading_up = [
        f"{name} imports {target}"
        for name, targets in edges(modules()).items()
        for target in targets
        if name.startswith("evaluation.") and floor(target) > floor(name) and target.startswith("evaluation.")
    ]
    assert leading_up == []


def test_no_circle():
    assert circle(modules()) is None


def test_each_module_has_tests_of_its_own():
    here = Path(__file__).parent
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__"))
    assert [str(path) for path in paths if not (here / path.parent / f"test_{path.name}").exists()] == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_known_in_few_places(library):
    knowing = {
        name.split(".")[0]
        for name, tree in modules().items()
        for of in imported(name, tree)
        if of.split(".")[0] == library
    }
    assert knowing <= LIBRARIES[library]


class TestTheRules:
    """The rules themselves find what they are for."""

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("errors", "from .attacks import preset"),
            ("attacks.pgd", "from ..training.plan import Plan"),
            ("training.step", "def late():\n    from ..plugins import hookimpl"),
            ("training.step", "import pml_adversarial.losses"),
            ("plugins.manager", "from ..evaluation import Report"),
            ("defenses.hm", "from .. import AdversarialLoss"),
            ("losses", "from .cli import main"),
        ],
    )
    def test_an_import_that_leads_up(self, name, source):
        assert breaches({**modules(), name: ast.parse(source)})

    def test_a_circle_in_one_folder(self):
        trees = modules()
        trees["attacks.ball"] = ast.parse("from .pgd import *")
        assert set(circle(trees)) >= {"attacks.ball", "attacks.pgd"}
