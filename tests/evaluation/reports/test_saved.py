"""Reports that are kept as JSON, and what is no such file."""

import json

import pytest

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.reports.saved import Saved


class Kept(Saved):
    SCHEMA = 3

    def __init__(self, number):
        self.number = number

    def to_dict(self):
        return {"schema": self.SCHEMA, "number": self.number}

    @classmethod
    def from_dict(cls, found):
        return cls(int(found["number"]))


def test_is_read_as_it_was_written(tmp_path):
    Kept(7).save_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {"schema": 3, "number": 7}
    assert Kept.load_json(tmp_path / "report.json").number == 7


@pytest.mark.parametrize(
    "content",
    ["", "nonsense", "[]", "3", "null", "{}", '"schema"', '{"schema": 3}', '{"schema": 3, "number": "x"}', "\xff"],
)
def test_something_else_is_refused(tmp_path, content):
    (tmp_path / "report.json").write_text(content, encoding="latin-1")
    with pytest.raises(
        InputError, match=r"report\.json holds no report; expected the JSON that Kept\.save_json writes"
    ):
        Kept.load_json(tmp_path / "report.json")


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "report.json").write_text('{"schema": 99, "number": 7}')
    with pytest.raises(InputError, match=r"is of schema 99, this version reads 3; measure it again"):
        Kept.load_json(tmp_path / "report.json")


def test_what_is_no_json_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Kept(float("nan")).save_json(tmp_path / "report.json")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Kept.load_json(tmp_path / "report.json")
