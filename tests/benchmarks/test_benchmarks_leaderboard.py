"""The leaderboard holds the committed runs, and its page holds the leaderboard."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # the benchmarks are not installed

from benchmarks import leaderboard  # noqa: E402
from pml_adversarial.cli.leaderboard import MARK  # noqa: E402
from pml_adversarial.evaluation.reports.leaderboard import add, entries, tables  # noqa: E402


def in_nine_digits(value):
    """Versions of SciPy differ in the last digits of an interval."""
    if isinstance(value, dict):
        return {name: in_nine_digits(part) for name, part in value.items()}
    if isinstance(value, list):
        return [in_nine_digits(part) for part in value]
    return round(value, 9) if isinstance(value, float) else value


def test_entries_are_those_of_the_committed_runs(tmp_path):
    found = json.loads(json.dumps(list(leaderboard.entries())))
    assert len(found) > 100
    held = {entry["source"]: in_nine_digits(entry) for entry in entries(leaderboard.BOARD)}
    assert all(held[entry["source"]] == in_nine_digits(entry) for entry in found)
    for entry in found:
        assert (leaderboard.BOARD / add(entry, tmp_path).relative_to(tmp_path)).exists()  # no two of one name


def test_numbers_are_those_of_the_run():
    path = leaderboard.RESULTS / "omniglot-1700k" / "preset-ms" / "seed_0" / "run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    entry = leaderboard.entry(run, path)
    assert entry["clean"]["recall_at_1"] == run["report"]["clean"]["recall_at_1"] == 0.668
    assert [round(worst["recall_at_1"], 3) for worst in entry["worst_case"]] == [0.494, 0.348, 0.002]
    assert (entry["passes"], entry["train_eps"], entry["checks"]) == (1700272, 77 / 255, None)
    assert entry["attacks"] == ["apgd-ce", "margin", "shift"]


def test_training_without_an_attack_has_no_radius():
    path = leaderboard.RESULTS / "omniglot-1700k" / "plain-supcon" / "seed_0" / "run.json"
    assert leaderboard.entry(json.loads(path.read_text(encoding="utf-8")), path)["train_eps"] == 0


def test_the_page_has_the_tables_of_the_entries():
    page = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert page.partition(MARK)[2].strip() == tables(entries(leaderboard.BOARD)).strip()


def test_methods_that_the_leaderboard_names_are_there():
    assert set(leaderboard.NAMES) <= set(leaderboard.METHODS)
