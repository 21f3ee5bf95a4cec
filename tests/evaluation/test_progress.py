"""Progress bars that are shown, are not shown, or cannot be."""

import sys

import pytest

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.progress import progress_bar


def test_a_shown_bar_counts_under_its_title(capsys):
    with progress_bar(True, 3, "gallery") as bar:
        bar.update(2)
        assert bar.n == 2
        bar.update()
    shown = capsys.readouterr().err
    assert "gallery: 100%" in shown
    assert "3/3" in shown


def test_a_bar_that_is_not_shown_takes_the_same_calls(capsys):
    with progress_bar(False, 3, "gallery") as bar:
        bar.update(2)
        bar.update()
        assert bar.n == 0
    assert capsys.readouterr() == ("", "")


def test_only_a_shown_bar_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    progress_bar(False, 3, "gallery")
    with pytest.raises(InputError, match="progress=True needs tqdm; install it with `pip install tqdm`"):
        progress_bar(True, 3, "gallery")
