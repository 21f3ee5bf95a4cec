"""A training run that is killed between two checkpoints goes on as if it had not been; loading runs no code."""

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
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import AdversarialMiner, hookimpl

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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-c", command], env=environment, stderr=subprocess.PIPE, text=True)


def kill_after(process, step, progress):
    deadline = time.monotonic() + 60
    while not progress.exists() or progress.read_text() != str(step):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)  # what has not been measured is NaN


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


@pytest.mark.parametrize("place", ["beside", "in the extra state", "in a plugin's state"])
def test_a_checkpoint_that_would_run_code_is_refused(place, tmp_path):
    run = Run("ProxyAnchor")
    run.step()
    run.save(tmp_path / "checkpoint.pt")
    state = loaded(tmp_path / "checkpoint.pt")
    where = {
        "beside": state,
        "in the extra state": state["loss"]["_extra_state"],
        "in a plugin's state": state["miner"]["_extra_state"]["plugins"]["0_Drifts"],
    }[place]
    where["harm"] = Harmful(tmp_path / "harmed")
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Run("ProxyAnchor").load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "harmed").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (tmp_path / "harmed").exists()  # it would have been


def test_the_documented_way_loads_weights_only():
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    calls = re.findall(r"torch\.load\(.*?\)", text)
    assert calls
    assert all("weights_only=True" in call for call in calls)
