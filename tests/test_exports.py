"""What users import: everything public comes from the package and its folders, and nothing else is shown there."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pml_adversarial

PACKAGE = Path(pml_adversarial.__file__).parent
PUBLIC = [
    "attacks",
    "cli",
    "defenses",
    "evaluation",
    "evaluation.attacks",
    "evaluation.reports.html",
    "plugins",
    "training",
]
DOORS = ["errors", "losses", "miners", "testers"]


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_all_is_there_right_after_the_import_of_the_package():
    names = ["Report", "evaluation.certify", "defenses.HM", "attacks.NFGSM", "plugins.FixedContext"]
    shown = ", ".join(f"pa.{name}.__name__" for name in names)
    assert python(f"import pml_adversarial as pa; print({shown})").split() == [name.split(".")[-1] for name in names]


@pytest.mark.parametrize("name", [None, *PUBLIC, *DOORS])
def test_all_names_what_there_is(name):
    module = pml_adversarial if name is None else importlib.import_module(f"pml_adversarial.{name}")
    assert module.__all__ == sorted(set(module.__all__), key=lambda n: (not n.isupper(), n[0].islower(), n))
    assert all(hasattr(module, exported) for exported in module.__all__)


@pytest.mark.parametrize("name", [None, *PUBLIC])
def test_dir_shows_no_helpers(name):
    module = pml_adversarial if name is None else importlib.import_module(f"pml_adversarial.{name}")
    folder = Path(module.__file__).parent
    own = {path.stem for path in folder.iterdir()} | set(module.__all__)
    assert {shown for shown in dir(module) if not shown.startswith("__")} <= own
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("name", DOORS)
def test_a_door_exports_what_it_defines(name):
    module = importlib.import_module(f"pml_adversarial.{name}")
    defined = {n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    assert set(module.__all__) == {n for n in defined if not n.startswith("_")}


def test_each_defense_is_exported():
    """Each entry point names a class that the folder exports too."""
    from importlib.metadata import entry_points

    classes = {entry.load() for entry in entry_points(group="pml_adversarial")}
    assert {getattr(pml_adversarial.defenses, kind.__name__) for kind in classes} == classes


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'pml_adversarial' has no attribute 'defences'"):
        pml_adversarial.defences  # noqa: B018


def test_training_imports_no_evaluation():
    loaded = python("import sys, pml_adversarial; print(*(m for m in sys.modules if m.startswith('pml_adversarial.')))")
    assert "pml_adversarial.training.step" in loaded.split()
    assert not {m for m in loaded.split() if m.split(".")[1] in ("evaluation", "testers", "cli", "defenses")}
