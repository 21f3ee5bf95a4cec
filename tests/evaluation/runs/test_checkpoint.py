"""An evaluation that is cut off goes on from what was finished; a folder belongs to one evaluation."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from notes import Notes
from query_batches import embedded, images_of, network

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.attacks.kinds import QueryAttack
from pml_adversarial.evaluation.attacks.transfer import transfer_attack
from pml_adversarial.evaluation.suites import quick

ATTACKS = quick(steps=4, restarts=2)


def evaluated(folder, model=None, queries=None, gallery=None, **options):
    options = {
        "eps": (0.02, 0.05),
        "attacks": ATTACKS,
        "batch_size": 7,
        "keep_attacked": True,
        "checks": False,
        **options,
    }
    return evaluate_robustness(model or network(), queries or images_of(), gallery, resume=folder, **options)


def everything(report):
    """All of a report but the times, which are those of another run."""
    found = without_time(report)
    for attack in found["attacks"]:
        del attack["seconds"]
    return found


def without_time(report):
    """All of a report but when it was made."""
    found = report.to_dict()
    found["provenance"] = {key: value for key, value in found["provenance"].items() if key != "time"}
    return found


def assert_same(report, other):
    assert everything(report) == everything(other)
    assert report.attacked.keys() == other.attacked.keys()
    assert all(torch.equal(report.attacked[eps], other.attacked[eps]) for eps in report.attacked)
    assert len(report.examples) == len(other.examples) > 0
    for one, another in zip(report.examples, other.examples, strict=True):
        assert (one.query, one.attack, one.eps) == (another.query, another.attack, another.eps)
        assert torch.equal(one.perturbed, another.perturbed)


class Interrupted(Exception):
    pass


def interrupt_after(batches, model):
    """The model raises once it has embedded so many batches."""
    passes = count(1)

    def interrupt(module, args):
        if next(passes) > batches:
            raise Interrupted

    return model.register_forward_pre_hook(interrupt)


class TestGoesOn:
    @pytest.mark.parametrize("batches", [0, 2, 5, 40, 75, 100])
    def test_after_an_exception_anywhere(self, tmp_path, batches):
        model = network()
        handle = interrupt_after(batches, model)
        with pytest.raises(Interrupted):
            evaluated(tmp_path, model)
        handle.remove()
        kept = sorted(file.name for file in tmp_path.glob("*.pt"))
        rows = Notes()
        handle = model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        resumed = evaluated(tmp_path, model)
        handle.remove()
        assert_same(resumed, evaluated(None, model))
        probes = 3 + 2 * 16
        whole = probes + 24 + sum(r.forward_passes for r in resumed.attacks) + 7  # gallery, attacks, examples
        assert (sum(rows) < whole) == bool(kept)
        assert sorted(file.name for file in tmp_path.glob("*.pt")) == [
            *(f"batch_{number:05d}.pt" for number in range(4)),
            "gallery.pt",
            "gradient.pt",
        ]

    def test_a_finished_run_asks_the_model_only_what_kind_it_is(self, tmp_path):
        model = network()
        first = evaluated(tmp_path, model)
        handle = interrupt_after(6, model)  # with the one that compares its embeddings with the kept ones
        again = evaluated(tmp_path, model)
        handle.remove()
        assert_same(first, again)
        assert without_time(first) == without_time(again)  # with the seconds of the first run

    def test_half_written_files_are_ignored(self, tmp_path):
        model = network()
        evaluated(tmp_path, model)
        whole = (tmp_path / "batch_00001.pt").read_bytes()
        (tmp_path / "batch_00001.pt").unlink()
        (tmp_path / "batch_00001.unfinished").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "evaluation.unfinished").write_text('{"eps"')
        assert_same(evaluated(tmp_path, model), evaluated(None, model))

    def test_a_failure_while_writing_leaves_no_part(self, tmp_path, monkeypatch):
        def fail(value, path):
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

        model = network()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "save", fail)
            with pytest.raises(OSError, match="disk full"):
                evaluated(tmp_path, model)
        assert list(tmp_path.glob("*.pt")) == []
        assert_same(evaluated(tmp_path, model), evaluated(None, model))

    def test_loading_runs_no_code(self, tmp_path):
        class Runs:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        evaluated(tmp_path)
        torch.save({"clean": Runs()}, tmp_path / "batch_00002.pt")
        with pytest.raises(pickle.UnpicklingError):
            evaluated(tmp_path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("parts", [1, 3])
    def test_after_a_kill(self, tmp_path, parts):
        """A process that is killed without warning, when it has just finished some parts."""
        program = "import sys; from test_checkpoint import run_slowly; run_slowly(sys.argv[1])"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
        try:
            deadline = time.monotonic() + 120
            while len(list(tmp_path.glob("*.pt"))) < parts:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "batch_00003.pt").exists()
        assert_same(evaluated(tmp_path), evaluated(None))


def run_slowly(folder):
    torch.set_num_threads(1)
    model = network()
    model.register_forward_pre_hook(lambda module, args: time.sleep(0.02))
    evaluated(folder, model)


class TestBelongsToOneEvaluation:
    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"eps": 0.05}, "eps"),
            ({"norm": "L2"}, "norm"),
            ({"batch_size": 8}, "batch_size"),
            ({"seed": 1}, "seed"),
            ({"recall_at": (1, 3)}, "recall_at"),
            ({"subset": [1, 2]}, "subset, queries"),
            ({"keep_attacked": False}, "keep_attacked"),
            ({"normalization": ([0.0], [1.0])}, "normalization"),
            ({"attacks": ATTACKS[:1]}, "attacks, attack_settings, code"),
            ({"attacks": quick(steps=5, restarts=2)}, "attack_settings"),
            ({"attacks": quick(steps=4, restarts=3)}, "attack_settings"),
            ({"model": network(6)}, "model"),
            ({"queries": images_of(seed=1)}, "queries, gallery"),
            ({"queries": (images_of()[0], images_of()[1].flip(0))}, "queries, gallery"),
            ({"gallery": images_of(seed=1)}, "gallery"),
        ],
    )
    def test_another_is_refused_by_name(self, tmp_path, changed, named):
        evaluated(tmp_path)
        with pytest.raises(InputError, match=f"holds parts of another evaluation: {named} differ. Use another folder"):
            evaluated(tmp_path, **changed)

    def test_other_known_embeddings_are_refused(self, tmp_path):
        known = embedded(network(), images_of(seed=1)[0])
        evaluated(tmp_path, gallery=images_of(seed=1), gallery_embeddings=known)
        with pytest.raises(InputError, match="another evaluation: gallery_embeddings differ"):
            evaluated(tmp_path, gallery=images_of(seed=1), gallery_embeddings=-known)
        with pytest.raises(InputError, match="another evaluation: gallery, gallery_embeddings differ"):
            evaluated(tmp_path, gallery=images_of(seed=1))

    def test_other_code_around_the_same_weights_is_refused(self, tmp_path):
        net = network().eval()
        evaluated(tmp_path, model=lambda images: net(images))
        with pytest.raises(
            InputError, match=r"kept embeddings are not those of this model: a query's differ by .* Use anoth"
        ):
            evaluated(tmp_path, model=lambda images: net(images.flip(-1)))

    def test_another_gradient_of_the_same_embeddings_is_refused(self, tmp_path):
        net, folders = network().eval(), [tmp_path / "none", tmp_path / "a part"]

        def masked(share):
            return lambda images: net(share * images + (1 - share) * images.detach())

        for folder, share in zip(folders, (0, 0.5), strict=True):
            evaluated(folder, model=masked(share))
            with pytest.raises(InputError, match=r"of a model with other gradients: .* Use another folder for resume"):
                evaluated(folder, model=net)
            evaluated(folder, model=masked(share))

    def test_another_function_of_the_same_name_is_refused(self, tmp_path):
        own = torch.arange(24)
        evaluated(tmp_path, ignore=lambda rows: (rows[:, None] - own).abs() == 1)
        with pytest.raises(InputError, match="another evaluation: ignored_items differ"):
            evaluated(tmp_path, ignore=lambda rows: (rows[:, None] - own).abs() == 2)

    @pytest.mark.parametrize("change", ["parts in train mode", "random numbers", "autocast"])
    def test_a_model_that_answers_otherwise_is_refused(self, tmp_path, change):
        net = torch.nn.Sequential(*network(), torch.nn.Dropout(0.5)).eval()
        evaluated(tmp_path, model=lambda images: net(images))
        noisy = change == "random numbers"
        net[-1].training = change == "parts in train mode"
        named = {"parts in train mode": "at_random", "random numbers": "at_random", "autocast": "precision"}[change]
        with (
            torch.autocast("cpu", enabled=change == "autocast"),
            pytest.raises(InputError, match=f"another evaluation: .*{named}.* differ"),
        ):
            evaluated(tmp_path, model=lambda images: net(images) + noisy * torch.randn(len(images), 1))

    def test_an_attack_with_other_code_is_refused(self, tmp_path):
        def attack(sign):
            code = "lambda batch, eps, restart: batch.images {} eps * batch.images.sign()"
            return QueryAttack("own", eval(code.format(sign)))

        evaluated(tmp_path, attacks=[attack("+")])
        evaluated(tmp_path, attacks=[attack("+")])
        with pytest.raises(InputError, match="another evaluation: code differ"):
            evaluated(tmp_path, attacks=[attack("-")])

    def test_another_surrogate_in_a_function_is_refused(self, tmp_path):
        def attack(seed):
            net = network(seed)
            return transfer_attack(lambda images: net(images), steps=2)

        evaluated(tmp_path, attacks=[attack(1)])
        evaluated(tmp_path, attacks=[attack(1)])
        with pytest.raises(InputError, match="another evaluation: attack_settings"):
            evaluated(tmp_path, attacks=[attack(2)])

    def test_one_changed_image_among_few_is_noticed(self, tmp_path):
        evaluated(tmp_path)
        images, labels = images_of()
        images[11, 0, 2, 3] = 0.123
        with pytest.raises(InputError, match="queries, gallery differ"):
            evaluated(tmp_path, queries=(images, labels))

    @pytest.mark.parametrize("note", ["", "{", "[]", "3", '{"eps": [0.1]}', "\x00"])
    def test_a_note_of_something_else(self, tmp_path, note):
        (tmp_path / "evaluation.json").write_text(note)
        with pytest.raises(InputError, match="holds parts of another evaluation"):
            evaluated(tmp_path)

    def test_the_note_says_what_was_evaluated(self, tmp_path):
        evaluated(tmp_path / "deep" / "folder")
        note = json.loads((tmp_path / "deep" / "folder" / "evaluation.json").read_text())
        assert note["eps"] == [0.02, 0.05]
        assert [attack["name"] for attack in note["attack_settings"]] == ["margin", "shift"]
        assert {attack["perturb"]["options"]["steps"] for attack in note["attack_settings"]} == {4}
        assert {attack["restarts"] for attack in note["attack_settings"]} == {2}

    def test_none_keeps_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        evaluated(None)
        assert list(tmp_path.iterdir()) == []
