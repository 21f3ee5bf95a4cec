"""The experiment of the demo: what is trained, and what is told of it."""

from functools import partial

import pytest
import torchattacks
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss

from pml_adversarial.attacks.presets import PRESET
from pml_adversarial.cli import experiment
from pml_adversarial.cli.images import digits


def test_the_run_on_digits_keeps_the_settings_of_its_figures(monkeypatch):
    made = []
    wrapper = experiment.AdversarialLoss
    monkeypatch.setattr(experiment, "AdversarialLoss", lambda *a, **k: made.append(wrapper(*a, **k)) or made[-1])
    settings = experiment.Settings(epochs=1, batch_size=500, warmup=0)
    experiment.train(settings, digits(), ContrastiveLoss(), None, PRESET, 0, list)
    (loss_func,) = made
    assert loss_func.adversary.hooks.own.keep_clean is False  # perturbed rows in place of the clean ones
    assert not loss_func.adversary.monitor.guarded


@pytest.mark.slow
def test_adversarial_training_makes_unseen_digits_robust():
    """The main job, three seeds: the worst case per query over all attacks, each of 30 steps with random restarts."""
    settings = experiment.Settings(seeds=(0, 1, 2), eps=(0.1,), attack_steps=30, restarts=2)
    attack = partial(torchattacks.PGD, eps=0.2, alpha=0.1, steps=5)
    measured = experiment.run(settings, lambda: MultiSimilarityLoss(2, 40, 0.5), lambda: None, attack, progress=False)
    means = experiment.summary(settings, measured, {})["models"]
    plain, adversarial = means["plain"], means["adversarial"]
    assert adversarial["worst_case"]["0.1"] >= 0.40
    assert adversarial["worst_case"]["0.1"] >= plain["worst_case"]["0.1"] + 0.25
    assert adversarial["recall_at_1"] >= plain["recall_at_1"] - 0.02
