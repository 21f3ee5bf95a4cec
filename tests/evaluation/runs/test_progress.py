"""Progress bars that are shown, are not shown, or cannot be; what an evaluation says of its cost."""

import logging
import re
import sys
from types import SimpleNamespace

import pytest
from notes import Notes
from query_batches import images_of, network

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.attacks.kinds import QueryAttack
from pml_adversarial.evaluation.checks import CHECKS
from pml_adversarial.evaluation.runs import progress
from pml_adversarial.evaluation.runs.progress import Progress, progress_bar
from pml_adversarial.evaluation.runs.sharing import Ranks
from pml_adversarial.evaluation.suites import quick


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


class Bar:
    """Stands for a bar of tqdm, and notes what it shows."""

    def __init__(self, total, desc, **options):
        self.n, self.total, self.said, self.totals = 0, total, [desc], []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, steps):
        self.n += steps

    def set_description_str(self, text):
        self.said.append(text)

    def refresh(self):
        self.totals.append((self.n, self.total))


@pytest.fixture
def bars(monkeypatch):
    made = []

    def tqdm(**options):
        made.append(Bar(**options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=tqdm))
    return made


def counted():
    """A network, and the images that it embeds, call by call; gradients are not seen."""
    model, seen = network(), Notes()
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return model, seen


def evaluated(model=None, **options):
    options = {"eps": (0.02, 0.05), "attacks": quick(3, 2), "batch_size": 10, "checks": False, **options}
    return evaluate_robustness(model or network(), images_of(24), **options)


class TestOfAnEvaluation:
    def test_one_bar_names_all_that_runs_in_order(self, bars):
        evaluated(progress=True, checks=True)
        (bar,) = bars
        attacks = [f"{name}, eps {eps}" for eps in (0.02, 0.05) for name in ("margin", "shift")]
        assert bar.said == ["custom", *(f"custom: {task}" for task in ("queries", *3 * attacks, *CHECKS))]

    def test_a_gallery_is_named_too(self, bars):
        evaluate_robustness(
            network(), images_of(6), images_of(9, seed=1), eps=0.02, attacks=quick(1, 1), checks=False, progress=True
        )
        assert bars[0].said[1:3] == ["custom: gallery", "custom: queries"]

    def test_counts_all_passes_and_ends_full(self, bars):
        model, seen = counted()
        report = evaluated(model, progress=True)
        (bar,) = bars
        embedded, probes, examples = 24, 3 + 2 * 16, 8
        attacks = sum(result.forward_passes + result.backward_passes for result in report.attacks)
        assert bar.n == embedded + attacks + examples
        assert bar.n == sum(seen) - probes + sum(result.backward_passes for result in report.attacks)
        assert bar.totals[-1] == (bar.n, bar.n)

    def test_expects_the_bound_first_and_then_what_was_measured(self, bars):
        report = evaluated(progress=True)
        queries, bound, after_one, after_two, after_all, *_ = bars[0].totals
        assert queries == (0, 24)
        most = 24 * 2 * 2 * 2 * (2 * 3 + 4)  # queries, eps, attacks, restarts, passes of a run
        assert bound == (24, 24 + most)
        assert sum(result.forward_passes + result.backward_passes for result in report.attacks) < most
        for (done, total), queries in ((after_one, 10), (after_two, 20), (after_all, 24)):
            assert total == done + round((done - 24) / queries * (24 - queries))

    def test_attacks_of_unknown_cost_have_no_bound(self, bars):
        noise = QueryAttack("noise", lambda batch, eps, restart: batch.images)
        evaluated(attacks=(noise,), progress=True)
        assert bars[0].totals[1] == (24, None)
        assert bars[0].totals[2] == (24 + 20 + 8, 24 + 20 + 8 + round(28 / 10 * 14))

    def test_the_cost_is_logged_after_the_first_batch(self, bars, caplog):
        caplog.set_level(logging.INFO, "pml_adversarial")
        report = evaluated(progress=True, checks=True)
        (line,) = caplog.messages
        cost = r"([\d,]+) passes and [\d.]+ s"
        taken = r"10 of 24 queries took ([\d,]+) image passes and .* s\."
        words = rf"{taken} Expected for all: {cost}; for the checks: {cost}\."
        numbers = re.fullmatch(words, line).groups()
        first, everything, checks = (int(number.replace(",", "")) for number in numbers)
        assert everything == pytest.approx(2.4 * first, abs=1)
        taken = bars[0].n - bars[0].totals[5][0]
        assert 0.65 * checks < taken < checks  # not all 24 are right without attack
        assert 0.8 < everything / sum(r.forward_passes + r.backward_passes for r in report.attacks) < 1.2

    def test_a_long_one_is_logged_without_a_bar(self, caplog, monkeypatch):
        caplog.set_level(logging.INFO, "pml_adversarial")
        evaluated()
        assert caplog.messages == []
        monkeypatch.setattr(progress, "LONG", 0.0)
        evaluated()
        (line,) = caplog.messages
        assert "checks" not in line  # there are none

    def test_what_a_folder_holds_is_not_expected(self, bars, caplog, tmp_path):
        caplog.set_level(logging.INFO, "pml_adversarial")
        evaluated(resume=tmp_path)
        (tmp_path / "batch_00001.pt").unlink()
        evaluated(resume=tmp_path, progress=True)
        assert caplog.messages[-1].startswith("10 of 10 queries took")
        assert bars[0].said[:3] == ["custom", "custom: margin, eps 0.02", "custom: shift, eps 0.02"]
        assert len(bars[0].said) == 5
        assert bars[0].totals[0] == (0, 10 * 80)

    @pytest.mark.parametrize("number", [0, 1])
    def test_the_first_of_several_processes_says_it(self, number, caplog, monkeypatch):
        caplog.set_level(logging.INFO, "pml_adversarial")
        monkeypatch.setattr(progress, "LONG", 0.0)
        ranks = Ranks()
        ranks.number, ranks.count = number, 4
        shared = Progress(Bar(None, "x"), "x", False, ranks)
        with next(shared.batches([5, 5], 100)):
            shared.add(10)
        assert len(caplog.messages) == 1 - number
        assert all(line.endswith("; in each of 4 processes.") for line in caplog.messages)
