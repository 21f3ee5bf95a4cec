"""Tables in Markdown of what pytest-benchmark wrote.

python -m pytest benchmarks --no-cov -p no:cacheprovider --benchmark-json all.json
python -m benchmarks.summary all.json                      # the tables
python -m benchmarks.summary all.json --keep small.json    # the same file without what no table shows
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.robustness.table import markdown

COLUMNS = {
    "ratio": "ratio (quartiles)",
    "ms": "ms",
    "more_ms": "ms more",
    "image_passes": "image passes",
    "mebibytes": "MiB",
    "queries_per_second": "queries / s",
    "share_of_matmul": "of matrix throughput",
}
"""What benchmarks may note of themselves, and its head in a table. A time that they do not note is the median."""


def shrunk(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables need, and nothing of each round."""
    kept = ("group", "name", "extra_info")
    return {
        "machine_info": {"pml_adversarial": found["machine_info"]["pml_adversarial"]},
        "datetime": found["datetime"],
        "benchmarks": [
            {**{name: one[name] for name in kept}, "stats": {"median": one["stats"]["median"]}}
            for one in found["benchmarks"]
        ],
    }


def summary(found: Mapping[str, Any]) -> str:
    """One table per group, after a line about the machine."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in found["benchmarks"]:
        groups.setdefault(one["group"] or one["name"], []).append(one)
    parts = [described(found["machine_info"]["pml_adversarial"])]
    parts += [f"**{name}**\n\n{_table(ones)}" for name, ones in groups.items()]
    return "\n\n".join(parts) + "\n"


def described(machine: Mapping[str, Any]) -> str:
    """Where it was measured, in one line."""
    return (
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} thread, Python {machine['python']}, "
        f"torch {machine['torch']}."
    )


def _table(ones: Sequence[Mapping[str, Any]]) -> str:
    noted = [name for name in COLUMNS if name == "ms" or any(name in one["extra_info"] for one in ones)]
    lines = [["case", *(COLUMNS[name] for name in noted)]]
    for one in ones:
        info = {"ms": 1e3 * one["stats"]["median"], **one["extra_info"]}
        lines.append([info.get("case", one["name"]), *(_cell(name, info) for name in noted)])
    return markdown(lines)


def _cell(name: str, info: Mapping[str, Any]) -> str:
    value = info.get(name)
    if value is None:
        return ""
    if name == "ratio":
        low, high = info["quartiles"]
        return f"{value:.3f} ({low:.3f} to {high:.3f})"
    if isinstance(value, list):
        return " / ".join(map(_number, value))
    return f"{100 * value:.0f} %" if name == "share_of_matmul" else _number(value)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="of --benchmark-json")
    parser.add_argument("--keep", type=Path, help="where to write what the tables need")
    options = parser.parse_args(arguments)
    found = json.loads(options.file.read_text(encoding="utf-8"))
    if options.keep:
        options.keep.write_text(json.dumps(shrunk(found), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(summary(found))


if __name__ == "__main__":
    main()
