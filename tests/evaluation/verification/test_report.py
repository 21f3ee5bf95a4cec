import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from query_batches import Made
from some_pairs import verified

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import VerificationReport
from pml_adversarial.evaluation.reports.results import Check
from pml_adversarial.evaluation.verification.attacks import REJECTED


@pytest.fixture(scope="module")
def report():
    checks = (Check("one", True, "fine"), Check("two", False, "not fine"), Check("three", None, "too few"))
    return dataclasses.replace(verified(subset=8, keep_attacked=True), checks=checks)


class TestReading:
    def test_at(self, report):
        clean, attacked = report.at(0.1), report.at(0.1, 0.06)
        assert clean.threshold == attacked.threshold
        assert (clean.tar.total, attacked.tar.total) == (20, 8)
        assert clean.dodging is None
        assert report.at("EER", 0.02).at == "EER"

    def test_a_rate_that_so_few_pairs_cannot_show_is_none(self, report):
        assert report.at(0.001) is None
        assert report.at(0.001, 0.06) is None
        assert "20 impostor pairs show no false accept rate below 0.05; FAR 0.001 cannot be measured" in report.notes

    @pytest.mark.parametrize("far", [0.2, "eer", 1e-4])
    def test_a_rate_that_was_not_asked_for(self, report, far):
        with pytest.raises(InputError, match=r"There is no threshold for .*; choose 0\.5, 0\.1, 0\.001, 'EER'"):
            report.at(far)

    @pytest.mark.parametrize("read", ["result", "roc"])
    def test_an_eps_that_was_not_evaluated(self, report, read):
        with pytest.raises(InputError, match=r"eps=0\.03 was not evaluated; choose 0, 0\.02, 0\.06"):
            getattr(report, read)(0.03)

    def test_roc(self, report):
        for eps in (0, 0.06):
            result, roc = report.result(eps), report.roc(eps)
            assert roc.equal_error_rate == result.equal_error_rate
            assert roc.auc == result.auc
            for at in result.thresholds:
                assert (roc.tar(at.threshold), roc.far(at.threshold)) == (at.tar, at.far)
        assert len(report.roc(0.06).genuine) == 8

    def test_flagged(self, report):
        assert [check.name for check in report.flagged] == ["two"]


class TestTable:
    def test_lines(self, report):
        lines = str(report).splitlines()
        assert lines[0].split() == ["worst", "case", "EER", "accuracy", "AUC"]
        assert [line.split()[0] for line in lines[2:5]] == ["none", "eps", "eps"]
        assert lines[6].split() == [
            "worst",
            "case",
            "threshold",
            "similarity",
            "TAR",
            "dodging",
            "FAR",
            "impersonation",
        ]
        rows = lines[8:17]  # two rates and the EER, without attack and at two eps
        assert sum("FAR 0.1 " in row for row in rows) == sum("FAR 0.5 " in row for row in rows) == 3
        tar = report.at(0.1, 0.06).tar
        (row,) = (row for row in rows if row.startswith("eps 0.06") and "FAR 0.1 " in row)
        assert f"{100 * tar.rate:.1f} [{100 * tar.low:.1f}, {100 * tar.high:.1f}]" in row
        assert [line.split()[0] for line in lines[20:28]] == ["momentum", "enrolled", "pgd", "square"] * 2
        assert lines[29].startswith("custom, Linf, cosine, listed pairs: 20 genuine, 20 impostor pairs, 16 attacked; ")
        assert lines[-3:] == ["[ok] one: fine", "[FLAG] two: not fine", "[no evidence] three: too few"]
        assert sum(line.startswith("note: ") for line in lines) == len(report.notes)

    def test_columns_are_aligned(self, report):
        for table in str(report).split("\n\n")[:3]:
            assert len({len(line) for line in table.splitlines()}) == 1

    def test_the_documentation_shows_these_columns(self, report):
        page = Path(__file__).parents[3] / "docs" / "evaluation.md"
        (shown,) = re.findall(r"^```text\n(worst case .*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
        headings = [table.splitlines()[0].split() for table in shown.split("\n\n")]
        assert headings == [table.splitlines()[0].split() for table in str(report).split("\n\n")[:2]]

    def test_a_share_of_no_pairs(self, report):
        at = dataclasses.replace(report.at("EER", 0.06), dodging=dataclasses.replace(report.at(0.1).tar, rate=None))
        results = (dataclasses.replace(report.result(0.06), thresholds=(at,)),)
        assert "no pairs" in str(dataclasses.replace(report, results=results))


class TestJSON:
    def test_is_read_as_it_was_written(self, report, tmp_path):
        report.save_json(tmp_path / "report.json")
        found = VerificationReport.load_json(tmp_path / "report.json")
        assert report.attacked is not None
        assert found.attacked is None
        names = [part.name for part in dataclasses.fields(report) if part.name != "attacked"]
        assert {name: getattr(found, name) for name in names} == {name: getattr(report, name) for name in names}
        assert str(found) == str(report)
        assert found.roc(0.06).equal_error_rate == report.roc(0.06).equal_error_rate

    def test_what_is_in_it(self, report, tmp_path):
        report.save_json(tmp_path / "report.json")
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["schema"] == 1
        assert found["results"][0]["thresholds"][0]["tar"]["rate"] == report.results[0].thresholds[0].tar.rate
        assert len(found["results"][0]["similarities"]) == len(found["same"]) == 40
        assert len(found["results"][1]["similarities"]) == len(found["attacked_pairs"]) == 16
        assert "attacked" not in found

    def test_embeddings_that_are_not_finite_under_attack(self, tmp_path):
        """JSON knows no infinity, and means and middles of such similarities must not overflow either."""
        model = Made(lambda x: torch.where(x[:, :1, 0, 0] > 0.3, math.nan, x.flatten(1)))
        images = torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.6
        images[:, 0, 0, 0] = 0.25
        report = verified(model, (images, torch.arange(24) % 4), eps=0.1, square=300)
        assert set(report.result(0.1).similarities[: report.num_genuine]) == {REJECTED}
        assert report.at("EER", 0.1).tar.count == 0
        report.save_json(tmp_path / "report.json")
        assert str(VerificationReport.load_json(tmp_path / "report.json")) == str(report)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "results": [3]}', "3"])
    def test_another_file(self, content, tmp_path):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(InputError, match=r"holds no report; expected the JSON that VerificationReport\.save_json"):
            VerificationReport.load_json(tmp_path / "report.json")

    def test_another_version(self, tmp_path):
        (tmp_path / "report.json").write_text('{"schema": 7}')
        with pytest.raises(InputError, match="is of schema 7, this version reads 1; measure it again"):
            VerificationReport.load_json(tmp_path / "report.json")
