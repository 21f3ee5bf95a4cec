import json
from pathlib import Path

from benchmarks.summary import main, shrunk, summary

ROOT = Path(__file__).parents[2]

FOUND = {
    "datetime": "2026-01-01T00:00:00",
    "machine_info": {
        "node": "somewhere",
        "pml_adversarial": {"device": "A CPU", "cores": 2, "threads": 1, "python": "3.12.1", "torch": "2.9.0"},
    },
    "benchmarks": [
        {
            "group": "library / bare",
            "name": "test_ratio[a]",
            "extra_info": {
                "case": "small",
                "ratio": 1.0123,
                "quartiles": [0.99, 1.034],
                "ms": [101.4, 99.96],
                "pairs": 9,
            },
            "stats": {"median": 3.0, "data": [3.0]},
        },
        {
            "group": "growth",
            "name": "g",
            "extra_info": {"case": "rows 16", "ms": [1.5, 0.25], "mebibytes": [2000.0, 0]},
            "stats": {"median": 1.0},
        },
        {"group": None, "name": "test_hooks", "extra_info": {}, "stats": {"median": 0.0000123}},
    ],
}
EXPECTED = """A CPU, 2 cores, 1 thread, Python 3.12.1, torch 2.9.0.

**library / bare**

| case | ratio (quartiles) | ms |
| --- | ---: | ---: |
| small | 1.012 (0.990 to 1.034) | 101 / 100 |

**growth**

| case | ms | MiB |
| --- | ---: | ---: |
| rows 16 | 1.5 / 0.25 | 2,000 / 0 |

**test_hooks**

| case | ms |
| --- | ---: |
| test_hooks | 0.0123 |
"""


def test_tables():
    assert summary(FOUND) == EXPECTED


def test_what_is_kept_gives_the_same_tables():
    kept = shrunk(FOUND)
    assert summary(kept) == EXPECTED
    assert "data" not in kept["benchmarks"][0]["stats"]
    assert "node" not in kept["machine_info"]


def test_the_command(tmp_path, capsys):
    (tmp_path / "all.json").write_text(json.dumps(FOUND))
    main([str(tmp_path / "all.json"), "--keep", str(tmp_path / "small.json")])
    assert capsys.readouterr().out == EXPECTED
    assert json.loads((tmp_path / "small.json").read_text()) == shrunk(FOUND)


def test_tables_of_the_docs_are_those_of_the_committed_run():
    found = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    machine, *groups = summary(found).strip().split("\n\n")
    assert machine in page
    assert len(groups) > 20
    for title, table in zip(groups[::2], groups[1::2], strict=True):
        assert f"<!-- {title.strip('*')} -->\n{table}\n" in page
