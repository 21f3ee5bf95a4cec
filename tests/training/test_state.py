"""A training run that is killed between two checkpoints goes on as if it had not been; loading runs no code."""

import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses, miners
from saved_losses import KINDS, WithLoss, same
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import AdversarialMiner, PluginError, hookimpl
from pml_adversarial.training.state import packed, unpacked

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 11, 4
PGD = partial(torchattacks.PGD, eps=0.1, alpha=0.05, steps=2)
LOSSES = {
    "ProxyAnchor": lambda: losses.ProxyAnchorLoss(4, 4),
    "Triplet": losses.TripletMarginLoss,
    "CrossBatchMemory": lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 40),
    "CrossBatchMemory, wrapped around": lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 16),
}


class Drifts:
    """Moves the copies by a drift that it remembers, with noise of its own between them."""

    def __init__(self):
        self.drift = torch.zeros(())

    @hookimpl(wrapper=True)
    def pml_adversarial_attack(self):
        attack = yield
        self.drift = 0.9 * self.drift + 0.01 * torch.rand(())
        return lambda inputs, labels: (attack(inputs, labels) + self.drift).clamp(0, 1)

    def state_dict(self):
        return {"drift": self.drift}

    def load_state_dict(self, state):
        self.drift = state["drift"]


class Run:
    """Everything that a run changes as it goes."""

    def __init__(self, name, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(48, 4)
        )
        self.miner = AdversarialMiner(miners.MultiSimilarityMiner(), self.model, attack=PGD, warmup=3, plugins=[Drifts])
        self.loss = seed_paper_loss(
            LOSSES[name](), self.model, attack=PGD, warmup=7, tuples_per_anchor=1, clean_weight=0.5, plugins=[Drifts]
        )
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.loss.parameters()], 0.05)
        self.losses = []

    def step(self):
        index = len(self.losses)
        images = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(index))  # an order of its own
        labels = torch.arange(8) // 2
        embeddings = self.model(images)
        loss = self.loss(embeddings, labels, self.miner(embeddings, labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    @property
    def parts(self):
        return {"model": self.model, "miner": self.miner, "loss": self.loss, "optimizer": self.optimizer}

    def save(self, path):
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({**state, "rng": torch.get_rng_state(), "losses": self.losses}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path):
        state = torch.load(path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        self.losses = state["losses"]


def train(name, folder, seed=0):
    """Goes on from the folder's checkpoint, or from the start; waits to be killed where the folder says so."""
    torch.set_num_threads(1)
    run, checkpoint = Run(name, seed), folder / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    while len(run.losses) < STEPS:
        run.step()
        (folder / "progress").write_text(str(len(run.losses)))
        if (folder / "stop_after").exists() and len(run.losses) == int((folder / "stop_after").read_text()):
            time.sleep(120)
        if len(run.losses) % EVERY == 0:
            run.save(checkpoint)
    run.save(folder / "end.pt")
    return run


def start(name, folder):
    command = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_state as t; "
    command += f"t.train({name!r}, t.Path({str(folder)!r}))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen([sys.executable, "-c", command], env=environment, stderr=subprocess.PIPE, text=True)


def kill_after(process, step, progress):
    deadline = time.monotonic() + 60
    while not progress.exists() or progress.read_text() != str(step):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def loaded(path):
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(("name", "killed_after"), [("ProxyAnchor", 6), ("CrossBatchMemory", 10)])
def test_a_killed_run_goes_on_as_the_unbroken_one(name, killed_after, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    broken.mkdir()
    (broken / "stop_after").write_text(str(killed_after))
    with start(name, broken) as process:
        kill_after(process, killed_after, broken / "progress")
    assert len(loaded(broken / "checkpoint.pt")["losses"]) == killed_after // EVERY * EVERY < killed_after
    assert not (broken / "end.pt").exists()
    (broken / "stop_after").unlink()
    with start(name, broken) as again:
        train(name, unbroken)
        assert again.wait() == 0, again.stderr.read()
    expected, found = loaded(unbroken / "end.pt"), loaded(broken / "end.pt")
    assert len(expected["losses"]) == STEPS
    assert expected["losses"] == found["losses"]
    assert same(expected, found)


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_goes_on_from_any_checkpoint(name, tmp_path):
    whole = Run(name)
    for _ in range(6):
        whole.save(tmp_path / f"{len(whole.losses)}.pt")
        whole.step()
    whole.save(tmp_path / "end.pt")
    assert len(set(whole.losses)) == 6
    for taken in range(6):
        resumed = Run(name, seed=99)  # everything is the checkpoint's
        resumed.load(tmp_path / f"{taken}.pt")
        while len(resumed.losses) < 6:
            resumed.step()
        resumed.save(tmp_path / "resumed.pt")
        assert same(loaded(tmp_path / "end.pt"), loaded(tmp_path / "resumed.pt")), taken


@pytest.mark.parametrize("left_out", ["miner", "loss", "rng"])
def test_every_part_of_the_checkpoint_is_needed(left_out, tmp_path):
    resumed, whole = Run("CrossBatchMemory", seed=99), Run("CrossBatchMemory")
    fresh = {**{name: part.state_dict() for name, part in resumed.parts.items()}, "rng": torch.get_rng_state()}
    for _ in range(3):
        whole.step()
    whole.save(tmp_path / "checkpoint.pt")
    torch.save({**loaded(tmp_path / "checkpoint.pt"), left_out: fresh[left_out]}, tmp_path / "lacking.pt")
    for _ in range(3):
        whole.step()
    resumed.load(tmp_path / "lacking.pt")
    for _ in range(3):
        resumed.step()
    assert whole.losses[3:] != resumed.losses[3:]


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["beside", "in place of the extra state"])
def test_a_checkpoint_that_would_run_code_is_refused(place, tmp_path):
    run = Run("ProxyAnchor")
    run.step()
    run.save(tmp_path / "checkpoint.pt")
    state = loaded(tmp_path / "checkpoint.pt")
    where, key = {"beside": (state, "harm"), "in place of the extra state": (state["loss"], "_extra_state")}[place]
    where[key] = Harmful(tmp_path / "harmed")
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Run("ProxyAnchor").load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "harmed").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (tmp_path / "harmed").exists()  # it would have been


def test_a_plugin_whose_state_would_run_code_when_loaded_is_refused(model, tmp_path):
    class Rude(Drifts):
        def state_dict(self):
            return {"drift": [0.1, Harmful(tmp_path / "harmed")]}

    loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, plugins=[Rude])
    with pytest.raises(PluginError, match=r"holds Harmful at \['plugins'\]\['0_Rude'\]\['drift'\]\[1\]"):
        loss_func.state_dict()


def test_bytes_of_a_pickle_run_no_code(model, tmp_path):
    """A saved state is bytes; those of a pickle are not taken for one."""
    loss_func = seed_paper_loss(losses.TripletMarginLoss(), model)
    harm = torch.frombuffer(bytearray(pickle.dumps(Harmful(tmp_path / "harmed"))), dtype=torch.uint8)
    loss_func.load_state_dict({"_extra_state": harm})
    assert not (tmp_path / "harmed").exists()


def test_the_documented_way_loads_weights_only():
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    calls = re.findall(r"torch\.load\(.*?\)", text)
    assert calls
    assert all("weights_only=True" in call for call in calls)


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.fixture
def trained(make, images, labels):
    whole = WithLoss(make(), plugins=["hm"] if make is losses.TripletMarginLoss else [])
    for _ in range(3):
        whole.step(images, labels)
    return whole


def goes_on_alike(one, other, images, labels):
    assert other.loss.adversary.step == one.loss.adversary.step == 3
    found = [[whole.step(images, labels) for _ in range(3)] for whole in (one, other)]
    assert found[0] == found[1]
    assert len(set(found[0])) == 3
    return True


class TestTools:
    """Libraries that save, copy or average every entry of a state dict."""

    def fresh(self, trained, make):
        torch.manual_seed(99)
        return WithLoss(make(), plugins=[type(plugin) for plugin in trained.loss.adversary.hooks.named])

    def test_every_entry_is_a_tensor_of_one_form(self, trained, images, labels):
        def form():
            return {name: (value.shape, value.dtype) for name, value in trained.state_dict().items()}

        before = form()
        trained.step(images, labels)
        assert form() == before

    def test_accelerate(self, trained, make, images, labels, tmp_path):
        accelerate = pytest.importorskip("accelerate")
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(trained)
        accelerator.save_state(str(tmp_path))
        fresh = self.fresh(trained, make)
        accelerator._models.clear()
        accelerator.prepare(fresh)
        accelerator.load_state(str(tmp_path))
        assert goes_on_alike(trained, fresh, images, labels)

    def test_safetensors(self, trained, make, images, labels, tmp_path):
        tools = pytest.importorskip("safetensors.torch")
        tools.save_model(trained, str(tmp_path / "whole.safetensors"))
        tools.save_file(trained.state_dict(), str(tmp_path / "state.safetensors"))
        fresh, again = self.fresh(trained, make), self.fresh(trained, make)
        tools.load_model(fresh, str(tmp_path / "whole.safetensors"))
        again.load_state_dict(tools.load_file(str(tmp_path / "state.safetensors")))
        assert same(dict(fresh.state_dict()), dict(again.state_dict()))
        assert goes_on_alike(trained, fresh, images, labels)

    @pytest.mark.parametrize("name", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
    def test_timms_averages(self, name, trained, images, labels):
        ema = getattr(pytest.importorskip("timm.utils"), name)(trained, decay=0.9)
        before = copy.deepcopy(trained)
        for _ in range(3):
            trained.step(images, labels)
            ema.update(trained)
        averaged = ema.ema if name == "ModelEma" else ema.module
        weight, start, end = averaged.net[1].weight, before.net[1].weight, trained.net[1].weight
        assert 0 < (weight - start).norm() < (end - start).norm()
        assert averaged.loss.adversary.step == 3  # it takes no steps of its own
        averaged.eval()
        assert averaged.loss(averaged.net(images), labels).isfinite()

    @pytest.mark.parametrize("use_buffers", [True, False])
    def test_torchs_average(self, use_buffers, trained, images, labels):
        averaged = torch.optim.swa_utils.AveragedModel(trained, use_buffers=use_buffers)
        for _ in range(2):
            trained.step(images, labels)
            averaged.update_parameters(trained)
        assert not torch.equal(averaged.module.net[1].weight, trained.net[1].weight)
        clean = averaged.module.eval()
        assert clean.loss(clean.net(images), labels).isfinite()

    def test_an_average_of_state_dicts_is_loaded_without_the_steps(self, trained, make, images, labels, caplog):
        """As federated training does it: all entries are averaged as numbers, and loaded."""
        one = {name: value.clone() for name, value in trained.state_dict().items()}
        trained.step(images, labels)
        mean = {name: (one[name].double() + value.double()) / 2 for name, value in trained.state_dict().items()}
        fresh = self.fresh(trained, make)
        fresh.load_state_dict(mean)
        torch.testing.assert_close(fresh.net[1].weight, mean["net.1.weight"].float())
        assert fresh.loss.adversary.step == 0
        assert "cannot be read" in caplog.text

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_a_cast_keeps_the_steps(self, dtype, trained, make):
        state = {name: value.to(dtype) for name, value in trained.state_dict().items()}
        fresh = self.fresh(trained, make)
        fresh.load_state_dict(state)
        assert fresh.loss.adversary.step == 3
        assert fresh.loss.adversary.seed == 3

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
    def test_copies(self, copied, trained, images, labels):
        other = copied(trained)
        other.loss.watch(other.net)
        assert goes_on_alike(trained, other, images, labels)

    def test_half_and_to(self, trained, make):
        trained.half().to("cpu")
        fresh = self.fresh(trained, make)
        fresh.load_state_dict(trained.state_dict())
        assert fresh.loss.adversary.step == 3

    def test_distributed_checkpoints(self, trained, make):
        tools = pytest.importorskip("torch.distributed.checkpoint.state_dict")
        state, fresh = tools.get_model_state_dict(trained), self.fresh(trained, make)
        tools.set_model_state_dict(fresh, state)
        assert fresh.loss.adversary.step == 3


VALUES = {
    "none": None,
    "bools": [True, False],
    "whole": (0, -1, 2**63, -(2**64) + 1),
    "real": [0.1, -float("inf"), 5e-324],
    "text": 'a "quoted" é',
    "nested": {3: {"x": torch.arange(6).reshape(2, 3).T}, "empty": {}},
    "tensors": [torch.tensor(True), torch.zeros(0, 3), torch.arange(3).bfloat16(), torch.tensor(1 + 2j)],
}


class TestPacked:
    def test_gives_it_back(self):
        found = unpacked(packed(VALUES))
        assert same(found, VALUES)
        assert repr(found) == repr(VALUES)  # of the same types

    def test_keeps_nan(self):
        found = unpacked(packed({"x": float("nan"), "y": torch.tensor(float("nan"))}))
        assert found["x"] != found["x"]
        assert found["y"].isnan()

    @pytest.mark.parametrize("other", [10**30, 0.1, None, True, -1])
    def test_numbers_take_the_same_room(self, other):
        assert len(packed({"step": 1, "of": [other]})) == len(packed({"step": 2, "of": [0]}))

    @pytest.mark.parametrize("value", [object(), 2**127, {1, 2}, torch.eye(2).to_sparse(), b"bytes"])
    def test_refuses_what_it_cannot_give_back(self, value):
        with pytest.raises(PluginError, match=rf"holds {type(value).__name__} at \['a'\]\[0\]"):
            packed({"a": [value]})

    def test_notices_a_change(self):
        state = packed(VALUES)
        for place in (0, 20, 25, len(state) // 2, -1):
            changed = state.clone()
            changed[place] ^= 1
            assert unpacked(changed) is None
        assert unpacked(state[:-1]) is None
        assert unpacked(state[:5]) is unpacked(state[:20]) is unpacked(state[:0]) is None
