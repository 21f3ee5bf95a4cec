"""Several processes share an evaluation: all get the report of one process, number by number, or all get its error."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import sharing_worker as worker
import torch
import torch.distributed as dist
from sharing_worker import Counted, seen
from torch import nn

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.runs.sharing import Ranks, _Calls, _wait_for_all, check_silent, moved, sharing

WORKER = Path(worker.__file__)
WORLDS = (2, 3)
PROBES = 35  # images that each process embeds to find out what kind of model it has: 3 of one, and twice 16
both = pytest.mark.parametrize("world", WORLDS)


def without_times(report):
    for attack in report["attacks"]:
        del attack["seconds"]
    for name in ("time", "command"):
        del report["provenance"][name]
    return report


def started(folder, world, *names):
    """Processes of a fresh interpreter; the folder is made."""
    folder.mkdir(exist_ok=True)
    path = {"PYTHONPATH": os.pathsep.join([str(WORKER.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(folder), str(world), *names]
    return subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, check=True).stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder of what was seen, and what was shown, by the number of processes."""
    root, same = tmp_path_factory.mktemp("ranks"), [case.__name__ for case in worker.SAME]
    others = [*(case.__name__ for case in worker.OTHERS), *(f"fails at {images}" for images in worker.FAIL_AT)]
    shown = {1: started(root / "1", 1, *same)}
    shown |= {world: started(root / str(world), world, *same, *others) for world in WORLDS}
    return root, shown


def test_two_processes_equal_one_and_share_errors(tmp_path):
    """The one test of several processes that is fast, as they are forked from this one."""
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks
            worker.run(tmp_path / str(world), world, ["plain", "fails at 150"][:world])
    ((alone, _),) = seen(tmp_path / "1", 1, "plain")
    alone = without_times(alone)
    for report, _ in seen(tmp_path / "2", 2, "plain"):
        assert without_times(report) == alone
    for (error, after), _ in seen(tmp_path / "2", 2, "fails at 150"):
        assert error == ("OSError", "out of luck")
        assert without_times(after) == alone


@pytest.mark.slow
class TestSeveralProcesses:
    @both
    @pytest.mark.parametrize("name", [case.__name__ for case in worker.SAME])
    def test_all_have_the_report_of_one_process(self, name, world, ran):
        ((alone, _),) = seen(ran[0] / "1", 1, name)
        alone, count = without_times(alone), alone.pop("embedded", None)
        for report, _ in seen(ran[0] / str(world), world, name):
            assert 0 < (report.pop("embedded", None) or 1) <= (count or 1)
            assert without_times(report) == alone

    @both
    def test_each_makes_a_part(self, world, ran):
        ((alone, _),) = seen(ran[0] / "1", 1, "gallery")
        each = [report["embedded"] for report, _ in seen(ran[0] / str(world), world, "gallery")]
        assert alone["embedded"] < sum(each) <= alone["embedded"] + (world - 1) * PROBES
        assert max(each) < 0.75 * alone["embedded"]

    @both
    @pytest.mark.parametrize("images", worker.FAIL_AT)
    def test_an_error_of_one_is_raised_in_all(self, images, world, ran):
        ((alone, _),) = seen(ran[0] / "1", 1, "plain")
        alone = without_times(alone)
        for (error, after), _ in seen(ran[0] / str(world), world, f"fails at {images}"):
            assert error == ("OSError", "out of luck")
            assert without_times(after) == alone  # and then they can share again

    @both
    def test_an_error_before_the_model_is_asked(self, world, ran):
        first, *others = (found for found, _ in seen(ran[0] / str(world), world, "fails_before"))
        assert first == ("InputError", "queries has images of shape (3,); expected (N, C, H, W).")
        assert set(others) == {("InputError", f"Rank 0: {first[1]}")}

    @both
    def test_goes_on_from_what_the_first_process_kept(self, world, ran):
        ((alone, _),) = seen(ran[0] / "1", 1, "plain")
        alone = without_times(alone)
        for found, _ in seen(ran[0] / str(world), world, "resumed"):
            assert found["first"] == ("OSError", "out of luck")
            parts = [f"batch_{number:05d}.pt" for number in range(world)]  # the others' second batches are lost
            assert found["kept"] == [*parts, "evaluation.json", "gallery.pt", "gradient.pt"]
            assert found["folders"] == ["parts"]  # the others neither read nor write
            assert without_times(found["report"]) == alone
            assert found["again"] <= PROBES + 16  # whose embeddings are compared with those that were kept

    @pytest.mark.parametrize("then", [1, 2])
    def test_goes_on_after_a_process_was_killed(self, then, ran, tmp_path):
        ((alone, _),) = seen(ran[0] / "1", 1, "plain")
        alone = without_times(alone)
        started(tmp_path, 3, "dies")
        gone, *others = seen(tmp_path, 3, "dies")
        assert gone is None
        assert {found[0] for found, _ in others} == {"RuntimeError"}
        assert all(found[1].startswith("Another process of this evaluation is gone") for found, _ in others)
        (tmp_path / "goes_on").mkdir()
        (tmp_path / "dies" / "parts").rename(tmp_path / "goes_on" / "parts")
        started(tmp_path, then, "goes_on")
        for report, _ in seen(tmp_path, then, "goes_on"):
            assert without_times(report) == alone

    @both
    def test_what_differs_is_refused(self, world, ran):
        first, *others = (found for found, _ in seen(ran[0] / str(world), world, "differ"))
        for name in ("seed", "model", "queries"):
            words = rf"This process evaluates something else than the first one: (\w+, )*{name}(, \w+)* differ\."
            assert all(re.match(words, found[name][1]) for found in others)
            assert first[name] == ("InputError", f"Rank 1: {others[0][name][1]}")

    @both
    def test_one_may_evaluate_alone(self, world, ran):
        ((alone, _),) = seen(ran[0] / "1", 1, "plain")
        alone = without_times(alone)
        for number, ((first, then), _) in enumerate(seen(ran[0] / str(world), world, "alone")):
            assert (first is None) if number else (without_times(first) == alone)
            assert without_times(then) == alone

    @both
    def test_who_waits_in_vain_is_told_and_then_fails(self, world, ran):
        ((first, then), lines), *others = seen(ran[0] / str(world), world, "does_not_come")
        assert first[0] == "InputError"
        assert first[1].startswith(f"Of {world} processes, 1 came to this evaluation within 0 s. Expected all")
        (line,) = (line for line in lines if "waits" in line)
        assert (
            f"for the other processes of torch.distributed: 1 of {world} are here. If they are not to come, use" in line
        )
        assert without_times(then)["num_queries"] == 24
        assert all(without_times(report) == then for (_, report), _ in others)

    @both
    def test_too_few_batches_are_mentioned_once(self, world, ran):
        (_, lines), *others = seen(ran[0] / str(world), world, "one_batch")
        nothing = f"1 batch(es) of queries for {world} processes: some have nothing to do"
        assert lines == [f"{nothing}. batch_size={24 // world} gives each a batch."]
        assert [lines for _, lines in others] == [[]] * (world - 1)

    @both
    def test_the_first_one_shows_progress(self, world, ran):
        (_, lines), *others = seen(ran[0] / str(world), world, "shows")
        assert len(lines) == 1
        assert lines[0].endswith(f"; in each of {world} processes.")
        assert [lines for _, lines in others] == [[]] * (world - 1)
        assert ran[1][world].count("custom: attacks move embeddings: 100%") >= 1

    @both
    def test_a_model_that_talks_is_refused(self, world, ran):
        for (kind, words), _ in seen(ran[0] / str(world), world, "in_parallel_within"):
            assert kind == "InputError"
            assert words.startswith("The model runs DistributedDataParallel, which talks to other processes in each")

    @both
    def test_a_parallel_model_comes_back_in_its_own_mode(self, world, ran):
        assert all(report["came back"] for report, _ in seen(ran[0] / str(world), world, "in_parallel"))


class TestOneProcess:
    def test_makes_all_in_order(self):
        ranks, made = Ranks(), []
        shared = ranks.share([3, 1, 2], lambda number: made.append(number) or -number)
        assert (next(shared), made) == (-3, [3])
        assert list(shared) == [-1, -2]
        assert (ranks.is_first, ranks.count, ranks.own([5, 6])) == (True, 1, [5, 6])
        value = object()
        assert ranks.tell(value) is value

    def test_needs_no_group(self):
        assert not dist.is_initialized()
        with sharing() as ranks:
            assert ranks.count == 1
        with pytest.raises(KeyError, match="own"), sharing():
            raise KeyError("own")

    def test_in_a_group_of_one(self, tmp_path):
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(Counted())
            report = worker.evaluated(model)
        finally:
            dist.destroy_process_group()
        assert without_times(worker.everything(report)) == without_times(worker.everything(worker.evaluated(Counted())))


class Store:
    """Counts who has come; another process comes at the last moment, when this one is about to give up."""

    def __init__(self):
        self.present = 0

    def add(self, key, number):
        if number < 0:
            self.present += 1
        self.present += number
        return self.present


def test_who_comes_at_the_last_moment_is_not_left_alone(monkeypatch):
    store = Store()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    monkeypatch.setattr("pml_adversarial.evaluation.runs.sharing.world_size", lambda: 2)
    monkeypatch.setattr("pml_adversarial.evaluation.runs.sharing.PATIENCE", -1.0)
    calls = _Calls.number
    monkeypatch.setattr(_Calls, "number", calls)
    _wait_for_all()
    assert (store.present, _Calls.number) == (2, calls + 1)


class Sharded(nn.Linear):
    """Stands for a module of FSDP, whose classes say so by their names."""


Sharded.__name__ = "FSDPModule"


def test_sharded_models_are_refused_only_among_several(monkeypatch):
    model = nn.Sequential(nn.Flatten(), Sharded(3, 3))
    check_silent([model])
    monkeypatch.setattr("pml_adversarial.evaluation.runs.sharing.world_size", lambda: 2)
    check_silent([nn.Linear(3, 3)])
    with pytest.raises(InputError, match=r"runs FSDPModule, .* load its full state dict into one that is not sharded"):
        check_silent([model])


def test_moved_keeps_all_but_the_device():
    value = {"a": [torch.ones(2), 3], "b": (torch.zeros(1), "text", None)}
    found = moved(value, torch.device("meta"))
    assert (found["a"][0].device.type, found["a"][1], found["b"][1:]) == ("meta", 3, ("text", None))
    assert isinstance(found["b"], tuple)
    assert value["a"][0].device.type == "cpu"
