from importlib.metadata import version

from pml_adversarial.evaluation import versions as module
from pml_adversarial.evaluation.versions import versions


def test_names_what_computes_the_numbers():
    found = versions()
    assert found["torch"] == version("torch")
    assert set(found) == {"pml-adversarial", "torch", "pytorch-metric-learning", "torchattacks", "python"}


def test_a_package_that_is_not_installed(monkeypatch):
    def missing(package):
        raise module.PackageNotFoundError(package)

    monkeypatch.setattr(module, "version", missing)
    assert versions()["torch"] == "not installed"
