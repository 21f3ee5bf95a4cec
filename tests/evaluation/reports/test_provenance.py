"""What a report says of the machine, the program and the moment."""

import json
import platform
import sys
from datetime import datetime, timedelta, timezone

import pytest
import torch
from query_batches import images_of, network

from pml_adversarial.evaluation import evaluate_robustness, quick
from pml_adversarial.evaluation.reports import fingerprints, provenance
from pml_adversarial.evaluation.retrieval.images import ImageSet

CPU = torch.device("cpu")


def surroundings():
    return provenance.surroundings(CPU)


def test_says_what_the_program_ran_on():
    found = surroundings()
    assert platform.machine() in found["hardware"]
    assert found["platform"] == platform.platform()
    moment = datetime.fromisoformat(found["time"])
    assert moment.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - moment) < timedelta(seconds=60)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads):
    torch.set_num_threads(threads)
    assert surroundings()["threads"] == threads


@pytest.mark.parametrize(
    ("name", "change", "back"),
    [
        ("deterministic_algorithms", torch.use_deterministic_algorithms, False),
        ("cudnn_deterministic", lambda on: setattr(torch.backends.cudnn, "deterministic", on), False),
        ("cudnn_benchmark", lambda on: setattr(torch.backends.cudnn, "benchmark", on), False),
    ],
)
def test_flags_of_torch(name, change, back):
    assert surroundings()[name] is back
    change(True)
    try:
        assert surroundings()[name] is True
    finally:
        change(back)


def test_the_command_is_as_it_was_given(monkeypatch):
    """``sys.argv`` would not have the ``-m``; a fresh process is asked in the tests of `repetition`."""
    command = [sys.executable, "-m", "told", "--eps", "8/255 and more"]
    monkeypatch.setattr(sys, "orig_argv", command)
    assert surroundings()["command"] == command


def test_versions():
    found = provenance.versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert set(found) == {"pml-adversarial", "torch", "pytorch-metric-learning", "torchattacks", "python"}


def test_a_report_says_what_was_measured():
    images, model = images_of(), network()
    with torch.autocast("cpu", torch.bfloat16):
        report = evaluate_robustness(model, images, eps=0.1, attacks=quick(1, 1), checks=False)
    assert report.provenance["model"] == fingerprints.of_modules((model,))
    assert report.provenance["queries"] == fingerprints.of_images(ImageSet(images, CPU, "queries"))
    assert report.provenance["gallery"] == {"is_the_queries": True, **report.provenance["queries"]}
    assert report.settings["precision"] == "float32 -> bfloat16, autocast cpu torch.bfloat16"
    assert set(report.provenance) == {"model", "queries", "gallery", *surroundings()}
