"""A report is enough to measure again: in a fresh process, from its JSON, on the model and images that it names."""

import dataclasses
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning.distances import LpDistance
from query_batches import images_of, network

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import QueryAttack, Report, evaluate_robustness, quick, repeat, standard
from pml_adversarial.evaluation.attacks.gradients import classifier_attack

MINE = QueryAttack("mine", lambda batch, eps, restart: batch.images + eps * torch.randn_like(batch.images).sign())
AGAIN = """
import sys

import torch
from query_batches import network

from pml_adversarial.evaluation import Report, repeat

torch.set_num_threads(1)
torch.manual_seed(99)
report = Report.load_json("report.json")
model = network(3)
model.load_state_dict(torch.load("model.pt", weights_only=True))
queries, gallery = torch.load("images.pt", weights_only=True)
repeat(report, model, queries, gallery).save_json("again.json")
"""


def near(labels, rows):
    """Right is what has the same label, or the next one."""
    return (labels[rows].unsqueeze(1) - labels).abs() <= 1


def numbers(report):
    """All of a report but times, and what says when and how it was made."""
    found = report.to_dict()
    found["attacks"] = [{**attack, "seconds": 0} for attack in found["attacks"]]
    found["provenance"] = {k: v for k, v in found["provenance"].items() if k not in ("time", "command")}
    return found


def through_json(report, folder):
    report.save_json(folder / "report.json")
    return Report.load_json(folder / "report.json")


class TestSameNumbers:
    @pytest.mark.parametrize(
        "options",
        [
            {"eps": (0.02, 0.05), "attacks": quick(3, 2), "checks": True},
            {"eps": 0.5, "norm": "L2", "attacks": standard(3, 1, 20, 2), "seed": 4, "batch_size": 7},
            {"eps": 0.05, "attacks": ["shift", "square"], "recall_at": (1, 3), "subset": range(0, 24, 2)},
            {
                "eps": 0.05,
                "attacks": [QueryAttack("x", classifier_attack(partial(torchattacks.APGD, steps=3, rho=0.5)), 2)],
                "normalization": ([0.4], [0.5]),
                "keep_attacked": True,
                "nmi": True,
            },
        ],
    )
    def test_from_json(self, options, tmp_path):
        images, model = images_of(), network()
        report = evaluate_robustness(model, images, **{"checks": False, **options})
        torch.manual_seed(5)
        again = repeat(through_json(report, tmp_path), network(), images)
        assert numbers(again) == numbers(report)
        assert again.settings == report.settings
        assert again.worst[-1].measures["recall_at_1"] < again.clean["recall_at_1"]
        if report.attacked:
            assert all(torch.equal(again.attacked[eps], report.attacked[eps]) for eps in report.attacked)

    @pytest.mark.parametrize("suite", ["quick", "standard"])
    def test_the_name_of_a_suite_is_kept(self, suite, tmp_path, monkeypatch):
        make = {"quick": quick, "standard": standard}[suite]
        names = {attack.name for attack in make()}
        few = dict.fromkeys(("quick", "standard"), (f"{suite}-v1", partial(make, 2, 1)))
        monkeypatch.setattr("pml_adversarial.evaluation.suites.SUITES", few)
        monkeypatch.setattr("pml_adversarial.evaluation.repetition.SUITES", few)
        report = evaluate_robustness(network(), images_of(), eps=0.05, attacks=suite, checks=False)
        again = repeat(through_json(report, tmp_path), network(), images_of())
        assert again.suite == report.suite == f"{suite}-v1"
        assert {attack["name"] for attack in again.settings["attack_settings"]} == names
        assert numbers(again) == numbers(report)

    def test_a_suite_that_is_another_one_now_keeps_its_attacks(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pml_adversarial.evaluation.suites.SUITES", {"quick": ("quick-v1", partial(quick, 2, 1))})
        report = evaluate_robustness(network(), images_of(), eps=0.05, attacks="quick", checks=False)
        assert report.suite == "quick-v1"
        again = repeat(through_json(report, tmp_path), network(), images_of())
        assert again.suite == "custom"
        assert numbers(again)["worst"] == numbers(report)["worst"]

    def test_a_gallery_that_holds_queries_and_its_embeddings(self, tmp_path):
        (images, labels), model = images_of(), network()
        items = (torch.cat([images[:10], images_of(20, seed=1)[0]]), torch.cat([labels[:10], images_of(20, seed=1)[1]]))
        with torch.no_grad():
            known = model.eval()(items[0])
        own = [*range(10), *[-1] * 14]
        options = {"own": own, "gallery_embeddings": known, "attacks": quick(2, 1), "checks": False}
        report = through_json(evaluate_robustness(model, (images, labels), items, eps=0.05, **options), tmp_path)
        again = repeat(report, model, (images, labels), items, gallery_embeddings=known)
        assert numbers(again) == numbers(report)
        with pytest.raises(InputError, match="gallery_embeddings: found None, the report has"):
            repeat(report, model, (images, labels), items)
        with pytest.raises(InputError, match=r"measured: gallery_embeddings: found \{"):
            repeat(report, model, (images, labels), items, gallery_embeddings=known + 1)

    def test_a_distance_of_pml_and_masks_are_passed_again(self, tmp_path):
        images, own = images_of(), torch.arange(24)
        given = {
            "distance": LpDistance(p=1),
            "ignore": (own.unsqueeze(1) - own).abs() == 1,
            "relevant": partial(near, images[1]),
        }
        report = evaluate_robustness(network(), images, eps=0.05, attacks=quick(2, 1), checks=False, **given)
        report = through_json(report, tmp_path)
        assert numbers(repeat(report, network(), images, **given)) == numbers(report)
        with pytest.raises(InputError, match=r"report's distance is LpDistance.*Pass it as distance="):
            repeat(report, network(), images)
        with pytest.raises(
            InputError, match=r"relevant_items: found None, .*; ignore: found None, .*; relevant: found None"
        ):
            repeat(report, network(), images, distance=given["distance"])

    def test_another_function_of_the_same_name_is_refused(self, tmp_path):
        shift = 1

        def neighbour(rows):
            return (rows[:, None] - torch.arange(24)).abs() == shift

        options = {"eps": 0.05, "attacks": quick(2, 1), "checks": False}
        report = through_json(evaluate_robustness(network(), images_of(), ignore=neighbour, **options), tmp_path)
        assert numbers(repeat(report, network(), images_of(), ignore=neighbour)) == numbers(report)
        shift = 2
        with pytest.raises(InputError, match=r"measured: ignored_items: found \w+, the report has \w+\.$"):
            repeat(report, network(), images_of(), ignore=neighbour)

    def test_attacks_of_the_user_are_passed_again(self, tmp_path):
        options = {"eps": 0.1, "attacks": [MINE, *quick(2, 1)], "checks": False}
        report = through_json(evaluate_robustness(network(), images_of(), **options), tmp_path)
        with pytest.raises(InputError, match=r"^mine \(<lambda>\) cannot be made from the report"):
            repeat(report, network(), images_of())
        assert numbers(repeat(report, network(), images_of(), attacks=[MINE])) == numbers(report)

    def test_goes_on_from_a_folder(self, tmp_path):
        report = evaluate_robustness(network(), images_of(), eps=0.05, attacks=quick(2, 1), resume=tmp_path / "kept")
        again = repeat(through_json(report, tmp_path), network(), images_of(), resume=tmp_path / "kept")
        assert [attack.seconds for attack in again.attacks] == [attack.seconds for attack in report.attacks]

    @pytest.mark.slow
    def test_in_a_fresh_process(self, tmp_path):
        model, (images, labels), gallery = network(), images_of(), images_of(30, seed=1)
        options = {"eps": (0.02, 0.05), "attacks": [*quick(3, 1), "square"], "subset": range(9), "checks": False}
        report = evaluate_robustness(model, (images, labels), gallery, **options)
        report.save_json(tmp_path / "report.json")
        torch.save(model.state_dict(), tmp_path / "model.pt")
        torch.save(((images, labels), gallery), tmp_path / "images.pt")
        (tmp_path / "again.py").write_text(AGAIN)
        command = [sys.executable, "again.py"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        again = Report.load_json(tmp_path / "again.json")
        assert numbers(again) == numbers(report)
        assert again.provenance["command"] == command


class TestRefusals:
    def test_what_is_no_report(self):
        with pytest.raises(InputError, match="report is str; expected a Report of evaluate_robustness"):
            repeat("report.json", network(), images_of())

    @pytest.fixture(scope="class")
    @staticmethod
    def report():
        return evaluate_robustness(network(), images_of(), eps=0.05, attacks=quick(1, 1), checks=False)

    @pytest.mark.parametrize(
        ("model", "queries", "gallery", "differ"),
        [
            (network(6), images_of(), None, ["model"]),
            (network(), images_of(seed=1), None, ["queries", "gallery"]),
            (network(), (images_of()[0], images_of()[1].flip(0)), None, ["queries", "gallery"]),
            (network(), images_of(), images_of(), ["gallery"]),
            (network(6), images_of(seed=1), images_of(), ["model", "queries", "gallery"]),
        ],
    )
    def test_something_else_is_refused_by_name(self, report, model, queries, gallery, differ):
        with pytest.raises(InputError, match=r"^This is not what the report measured: ") as raised:
            repeat(report, model, queries, gallery)
        found = [part.split(":")[0] for part in str(raised.value).split("measured: ")[1].split("; ")]
        assert found == differ
        for name in differ:
            assert report.provenance[name]["sha256"] in str(raised.value)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"distance": "euclidean"}, "distance: found euclidean, the report has cosine"),
            ({"ignore": torch.eye(24).bool()}, r"ignore: found \w+, the report has None"),
            (
                {"relevant": lambda rows: rows[:, None] == torch.arange(24)},
                r"relevant_items: found \w+, the report has",
            ),
        ],
    )
    def test_another_search_is_refused(self, report, given, message):
        with pytest.raises(InputError, match=f"not what the report measured: {message}"):
            repeat(report, network(), images_of(), **given)

    def test_another_precision_is_refused(self, report):
        message = "precision: found float32 -> bfloat16, autocast cpu torch.bfloat16, the report has float32 -> float32"
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=message):
            repeat(report, network(), images_of())

    @pytest.mark.parametrize("change", [{"a_later_one": 3}, {"eps": None}])
    def test_settings_that_this_version_does_not_have(self, report, change):
        settings = {key: value for key, value in {**report.settings, **change}.items() if key not in change or value}
        message = rf"differ in the settings {next(iter(change))}\. Install the version that .*pml-adversarial"
        with pytest.raises(InputError, match=message):
            repeat(dataclasses.replace(report, settings=settings), network(), images_of())
