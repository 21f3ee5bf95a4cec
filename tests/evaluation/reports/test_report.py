"""A report as JSON, and printed."""

import dataclasses
import json
import re

import pytest
from query_batches import Made, images_of, network
from scipy.stats import binomtest

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import Report, evaluate_robustness
from pml_adversarial.evaluation.attacks.gradients import gradient_attack, margin_score, nearest_wrong, promotion
from pml_adversarial.evaluation.attacks.kinds import GalleryAttack, QueryAttack
from pml_adversarial.evaluation.reports.results import Check
from pml_adversarial.evaluation.reports.table import table
from pml_adversarial.evaluation.suites import standard


@pytest.fixture(scope="module")
def report():
    attacks = (
        QueryAttack("margin", gradient_attack(margin_score, 4)),
        GalleryAttack("promote", nearest_wrong, promotion, 4),
    )
    found = evaluate_robustness(
        network(), images_of(), eps=(4 / 255, 0.1), attacks=attacks, nmi=True, checks=False, subset=range(20)
    )
    checks = (Check("one", True, "fine"), Check("two", False, "not fine"), Check("three", None, "no gradient"))
    return dataclasses.replace(found, checks=checks)


class TestIntervals:
    def test_are_those_of_every_rate(self, report):
        found = report.to_dict()
        assert found["intervals"]["kind"] == "Clopper-Pearson"
        assert found["intervals"]["confidence"] == 0.95
        parts = [(found["clean"], found["intervals"]["clean"])]
        parts += [(part["measures"], part["intervals"]) for key in ("attacks", "worst") for part in found[key]]
        assert len(parts) == 1 + 4 + 4
        for measures, intervals in parts:
            assert list(intervals) == [name for name in measures if name.startswith("recall_at_")]
            for name, interval in intervals.items():
                theirs = binomtest(round(20 * measures[name]), 20).proportion_ci(0.95, method="exact")
                assert interval == pytest.approx([theirs.low, theirs.high], abs=1e-12)

    def test_one_that_is_missing_is_no_report(self, report, tmp_path):
        found = report.to_dict()
        del found["worst"][0]["intervals"]
        (tmp_path / "report.json").write_text(json.dumps(found))
        with pytest.raises(InputError, match="holds no report"):
            Report.load_json(tmp_path / "report.json")


class TestNumbers:
    @pytest.mark.parametrize("made", [lambda x: 0 * x.flatten(1), lambda x: 0 * x.flatten(1) + 1, lambda x: x[:, 0, 0]])
    def test_of_a_model_that_tells_nothing_are_finite(self, made, tmp_path):
        report = evaluate_robustness(Made(made), images_of(), eps=(0.1, 1.0), attacks=standard(2, 1, 3, 2))
        report.save_json(tmp_path / "report.json")
        assert re.search(r"NaN|Infinity", (tmp_path / "report.json").read_text()) is None
        assert Report.load_json(tmp_path / "report.json").to_dict() == report.to_dict()


class TestJSON:
    def test_comes_back_as_it_was(self, report, tmp_path):
        report.save_json(tmp_path / "report.json")
        found = Report.load_json(tmp_path / "report.json")
        assert found.to_dict() == report.to_dict()
        for one, another in zip(
            (*report.attacks, *report.worst, *report.checks), (*found.attacks, *found.worst, *found.checks), strict=True
        ):
            assert one == another
            assert type(one) is type(another)
        assert found.curve() == report.curve()
        assert found.worst_case(4 / 255) == report.worst_case(4 / 255)
        assert str(found) == str(report)
        assert found.examples == ()
        assert found.attacked is None

    def test_holds_what_is_needed_to_measure_again(self, report):
        found = report.to_dict()
        assert found["schema"] == Report.SCHEMA
        assert found["settings"]["eps"] == [4 / 255, 0.1]
        assert found["settings"]["subset"] == list(range(20))
        assert found["settings"]["device"] == "cpu"
        assert [attack["name"] for attack in found["settings"]["attack_settings"]] == ["margin", "promote"]
        assert set(found["versions"]) == {
            "pml-adversarial",
            "torch",
            "pytorch-metric-learning",
            "torchattacks",
            "python",
        }
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    @pytest.mark.parametrize("change", [{"extra": 1}, {"attacks": [{"attack": "x"}]}, {"worst": {"a": 1}}])
    def test_a_report_with_other_parts_is_refused(self, report, tmp_path, change):
        (tmp_path / "report.json").write_text(json.dumps({**report.to_dict(), **change}))
        with pytest.raises(InputError, match="holds no report"):
            Report.load_json(tmp_path / "report.json")

    def test_another_schema_is_refused(self, report, tmp_path):
        (tmp_path / "report.json").write_text(json.dumps({**report.to_dict(), "schema": 99}))
        with pytest.raises(InputError, match=rf"is of schema 99, this version reads {Report.SCHEMA}; measure it again"):
            Report.load_json(tmp_path / "report.json")


def test_printed_it_is_the_table(report):
    assert str(report) == table(report)
