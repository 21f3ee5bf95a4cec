"""Entries of the leaderboard are what the report says, and a report that is flagged or was changed is refused."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from pml_adversarial import InputError, evaluate_robustness
from pml_adversarial.evaluation.reports import leaderboard
from pml_adversarial.evaluation.reports.leaderboard import Model, add, entries, entry_of, tables
from pml_adversarial.evaluation.reports.results import Check

MODEL = Model("A & B", "Digits, 8x8", "0 to 4; 5 to 9", "a CNN", 1234, 8 / 255, paper="arXiv 1", seed=3)
EPS = [4 / 255, 16 / 255]


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    images, labels = torch.rand(120, 1, 4, 4), torch.arange(120) // 6
    images = (images * 0.3 + torch.rand(20, 1, 4, 4).repeat_interleave(6, 0) * 0.7).clamp(0, 1)
    model = nn.Flatten()
    found = evaluate_robustness(model, (images, labels), eps=EPS, attacks=["margin", "shift"], checks=False)
    return replace(found, checks=(Check("gradients", True, "fine"), Check("square", None, "not asked")))


def saved(report, tmp_path, **changes):
    path = tmp_path / "report.json"
    replace(report, **changes).save_json(path)
    return path


class TestEntry:
    def test_holds_what_was_measured(self, report, tmp_path):
        path = saved(report, tmp_path)
        entry = entry_of(path, MODEL)
        assert (entry["method"], entry["passes"], entry["seed"], entry["threat_model"]) == ("A & B", 1234, 3, "Linf")
        assert (entry["queries"], entry["gallery"], entry["suite"]) == (120, 120, "custom")
        assert (entry["attacks"], entry["checks"]) == (["margin", "shift"], {"passed": 1, "made": 1})
        rates = [entry["clean"], *entry["worst_case"]]
        for eps, rate in zip((0.0, *EPS), rates, strict=True):
            assert rate["recall_at_1"] == report.worst_case(eps)
            interval = binomtest(round(120 * report.worst_case(eps)), 120).proportion_ci(0.95, "exact")
            assert rate["interval"] == pytest.approx(list(interval))
        assert [worst["eps"] for worst in entry["worst_case"]] == EPS
        assert entry["report_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert len(entry["model_sha256"]) == 64
        assert json.loads(json.dumps(entry)) == entry

    def test_a_flagged_report_is_refused(self, report, tmp_path):
        flagged = (*report.checks, Check("masked", False, "gradients vanish"))
        with pytest.raises(InputError, match=r"is flagged.*masked: gradients vanish"):
            entry_of(saved(report, tmp_path, checks=flagged), MODEL)
        with pytest.raises(InputError, match="is flagged"):
            entry_of(saved(report, tmp_path, checks=flagged), MODEL, unchecked=True)

    @pytest.mark.parametrize("checks", [(), (Check("square", None, "not asked"),)])
    def test_without_checks_only_if_asked(self, checks, report, tmp_path):
        path = saved(report, tmp_path, checks=checks)
        with pytest.raises(InputError, match=r"without checks.*--unchecked"):
            entry_of(path, MODEL)
        assert entry_of(path, MODEL, unchecked=True)["checks"] is None

    def test_few_queries_are_refused(self, tmp_path):
        images, labels = torch.rand(20, 1, 4, 4), torch.arange(20) // 2
        few = evaluate_robustness(nn.Flatten(), (images, labels), eps=0.1, attacks=["margin"], checks=False)
        with pytest.raises(InputError, match="20 queries; expected 100 or more"):
            entry_of(saved(few, tmp_path), MODEL, unchecked=True)

    def test_a_changed_number_is_refused(self, report, tmp_path):
        better = [replace(report.worst[0], measures={**report.worst[0].measures, "recall_at_1": 1.0})]
        with pytest.raises(InputError, match="is not that of the attacks"):
            entry_of(saved(report, tmp_path, worst=(*better, *report.worst[1:])), MODEL)

    def test_changed_flags_are_refused(self, report, tmp_path):
        flags = "1" * 120
        all_right = replace(
            report.worst[1], robust_flags=flags, measures={**report.worst[1].measures, "recall_at_1": 1.0}
        )
        with pytest.raises(InputError, match=r"at eps 0\.0627451 is not that of the attacks"):
            entry_of(saved(report, tmp_path, worst=(report.worst[0], all_right)), MODEL)

    def test_something_else_is_refused(self, tmp_path):
        (tmp_path / "report.json").write_text("{}", encoding="utf-8")
        with pytest.raises(InputError, match="holds no report"):
            entry_of(tmp_path / "report.json", MODEL)


class TestBoard:
    def test_a_folder_for_each_threat_model(self, report, tmp_path):
        path = add(entry_of(saved(report, tmp_path), MODEL), tmp_path / "board")
        name = "digits-8x8--a-b--a-cnn--trained-at-8-255--1234-passes--seed-3.json"
        assert path == tmp_path / "board" / "Linf" / name
        assert entries(tmp_path / "board") == [entry_of(saved(report, tmp_path), MODEL)]

    def test_nothing_is_replaced_unasked(self, report, tmp_path):
        entry = entry_of(saved(report, tmp_path), MODEL)
        add(entry, tmp_path)
        with pytest.raises(InputError, match=r"is there already.*--force"):
            add(entry, tmp_path)
        add(entry, tmp_path, replace=True)
        for number, other in enumerate(({"seed": 4}, {"train_eps": 4 / 255}, {"train_eps": 0})):
            add({**entry, **other, "report_sha256": f"of report {number}"}, tmp_path)
        assert len(entries(tmp_path)) == 4

    def test_another_split_is_another_entry(self, report, tmp_path):
        first = add(entry_of(saved(report, tmp_path), MODEL), tmp_path)
        other = entry_of(saved(replace(report, notes=("another",)), tmp_path), replace(MODEL, split="5 to 9; 0 to 4"))
        second = add(other, tmp_path)
        assert second.name == first.name.replace(".json", "--5-to-9-0-to-4.json")
        assert [entry["split"] for entry in entries(tmp_path)] == ["5 to 9; 0 to 4", MODEL.split]
        with pytest.raises(InputError, match=f"{second.name} is there already"):
            add(other, tmp_path)
        assert add(other, tmp_path, replace=True) == second

    def test_a_report_is_added_once(self, report, tmp_path):
        path = saved(report, tmp_path)
        first = add(entry_of(path, MODEL), tmp_path / "board")
        for again in (False, True):
            with pytest.raises(InputError, match=f"This report is there already, as .*{first.name}"):
                add(entry_of(path, replace(MODEL, seed=4)), tmp_path / "board", replace=again)

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(InputError, match="holds no entries"):
            entries(tmp_path)

    def test_a_broken_file(self, tmp_path):
        (tmp_path / "Linf").mkdir()
        (tmp_path / "Linf" / "a.json").write_text("{", encoding="utf-8")
        with pytest.raises(InputError, match="is no JSON"):
            entries(tmp_path)

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({"clean": {"recall_at_1": 0.5}}, "KeyError.*interval"),
            ({"clean": {"recall_at_1": 1.5, "interval": [0.4, 0.6]}}, "R@1 of 1.5 in 0.4 to 0.6"),
            ({"worst_case": 3}, "TypeError"),
        ],
    )
    def test_an_entry_that_was_changed(self, change, found, report, tmp_path):
        path = add({**entry_of(saved(report, tmp_path), MODEL), **change}, tmp_path / "board")
        with pytest.raises(InputError, match=rf"{path.name} is no entry \(.*{found}"):
            entries(tmp_path / "board")


def made(method, rates, seed=0, **changes):
    """An entry with rates without attack, at 4/255 and at 16/255."""
    found = [{"recall_at_1": rate, "interval": [rate - 0.05, rate + 0.05]} for rate in rates]
    worst = [{"eps": eps, **rate} for eps, rate in zip(EPS, found[1:], strict=False)]
    fixed = {"threat_model": "Linf", "suite": "standard-v2", "queries": 300, "checks": {"passed": 13, "made": 13}}
    model = {"data": "D", "split": "S", "backbone": "net", "passes": 1000, "train_eps": 8 / 255, "paper": ""}
    return {**fixed, **model, "method": method, "seed": seed, "clean": found[0], "worst_case": worst, **changes}


class TestTables:
    def test_one_line_for_each_method_strongest_first(self):
        found = [
            made("weak", [0.9, 0.2, 0.1]),
            made("strong", [0.8, 0.5, 0.3], paper="arXiv 2"),
            made("twice", [0.7, 0.3, 0.2], 0),
            made("twice", [0.8, 0.4, 0.3], 1, passes=1001),
        ]
        text = tables(found)
        assert text.startswith(
            "## D, Linf\n\nS\n\n| method | network | passes | trained at | R@1 | at 4/255 | at 16/255 |"
        )
        lines = text.splitlines()[6:]
        assert [line.split(" | ")[0] for line in lines] == ["| strong (arXiv 2)", "| twice", "| weak"]
        assert "| 8/255 | 80.0 [75.0, 85.0] | 50.0 [45.0, 55.0] | 30.0 [25.0, 35.0] | 1 | 300 |" in lines[0]
        assert (
            "| 1,000 | 8/255 | 75.0 ± 7.1 | 35.0 ± 7.1 | 25.0 ± 7.1 | 2 | 300 | standard-v2 | 13 of 13 passed |"
            in lines[1]
        )

    def test_names_stay_in_their_cells(self):
        lines = tables([made("a|b\nc", [0.9, 0.3, 0.2])]).splitlines()
        assert lines[-1].startswith("| a\\|b c | net |")
        assert lines[-1].replace("\\|", "").count("|") == lines[-2].count("|") == lines[-3].count("|")

    def test_radii_that_one_has_alone_do_not_order(self):
        text = tables([made("a", [0.9, 0.3]), made("b", [0.9, 0.2, 0.2])])
        assert [line[2] for line in text.splitlines()[6:]] == ["a", "b"]
        assert "| 30.0 [25.0, 35.0] |  | 1 |" in text

    def test_what_differs_stands_apart(self):
        others = [
            made("a", [0.9, 0.3, 0.2], passes=2000),
            made("a", [0.9, 0.3, 0.2], train_eps=0),
            made("a", [0.9, 0.3, 0.2], checks=None),
            made("a", [0.9, 0.3, 0.2], queries=500),
        ]
        text = tables([made("a", [0.9, 0.3, 0.2]), *others])
        assert len(text.splitlines()[6:]) == 5
        assert "| no attack |" in text
        assert "| not made |" in text

    def test_threat_models_and_data_have_tables_of_their_own(self):
        text = tables([made("a", [1, 0.5]), made("a", [1, 0.5], threat_model="L2"), made("a", [1, 0.5], data="E")])
        assert [line for line in text.splitlines() if line.startswith("##")] == ["## D, L2", "## D, Linf", "## E, Linf"]


def test_min_queries_is_where_the_interval_is_20_points_wide():
    low, high = binomtest(leaderboard.MIN_QUERIES // 2, leaderboard.MIN_QUERIES).proportion_ci(0.95, "exact")
    assert 0.19 < high - low < 0.21
