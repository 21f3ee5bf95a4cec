"""The experiment of the demo: what is trained, and what is told of it."""

import json
from functools import partial
from statistics import fmean

import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss, ProxyAnchorLoss
from pytorch_metric_learning.miners import BatchHardMiner

from pml_adversarial import InputError
from pml_adversarial.attacks.presets import PRESET
from pml_adversarial.cli import experiment
from pml_adversarial.cli.images import OpenSetSplit, digits

SHORT = experiment.Settings(
    epochs=2, batch_size=8, warmup=0, eps=(0.02, 0.05), attack_steps=1, restarts=1, seeds=(0, 3)
)
NO_BUDGET = partial(torchattacks.PGD, eps=0.0)


@pytest.fixture(scope="module")
def data():
    """Classes 3 and 7 for training, 4 and 5 for testing, in which brightness tells some images apart."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.tensor([3, 7]).repeat(10), torch.tensor([4, 5]).repeat(8)
    images = (
        (labels.reshape(-1, 1, 1, 1) + 2 * torch.rand(len(labels), 1, 1, 1, generator=generator)) / 10
        + 0.1 * torch.rand(len(labels), 1, 8, 8, generator=generator)
        for labels in (train, test)
    )
    return OpenSetSplit(*(tensor for pair in zip(images, (train, test), strict=True) for tensor in pair))


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_network_embeds_digits():
    assert experiment.small_network()(torch.rand(3, 1, 8, 8)).shape == (3, 64)


@pytest.fixture(scope="module")
def measured(data):
    """Trained against an attack without a budget, so that the two models of a seed learn the same."""
    return experiment.run(SHORT, ContrastiveLoss, BatchHardMiner, NO_BUDGET, data, progress=False)


class TestRun:
    def test_trains_both_models_for_every_seed(self, measured):
        assert [(m.seed, m.kind) for m in measured] == [
            (0, "plain"),
            (0, "adversarial"),
            (3, "plain"),
            (3, "adversarial"),
        ]
        assert all(m.seconds > 0 for m in measured)

    def test_models_of_a_seed_differ_in_nothing_but_the_attack(self, measured):
        plain, adversarial, other, _ = (weights(m.model) for m in measured)
        torch.testing.assert_close(plain, adversarial, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(plain, other, rtol=0.1, atol=0.01)

    def test_models_are_attacked_on_the_test_images(self, measured, data):
        for m in measured:
            assert [*m.report.attacked] == [*SHORT.eps]
            for eps, attacked in m.report.attacked.items():
                change = (attacked - data.test_images).flatten(1).abs().amax(1)
                assert (change > 0).all()
                assert change.max() <= eps + 1e-6

    def test_summary_is_of_json_and_means_over_seeds(self, measured):
        found = experiment.summary(SHORT, measured, {"loss": "ContrastiveLoss"})
        assert json.loads(json.dumps(found))["runs"] == found["runs"]
        assert (found["settings"]["loss"], found["settings"]["seeds"]) == ("ContrastiveLoss", SHORT.seeds)
        assert [(run["seed"], run["kind"]) for run in found["runs"]] == [(m.seed, m.kind) for m in measured]
        for name in ("map_at_r", "robust_recall_at_1"):  # so that a mean is not one of them
            assert len({str(run[name]) for run in found["runs"]}) == 2
        for kind in experiment.MODELS:
            runs = [run for run in found["runs"] if run["kind"] == kind]
            for name in ("recall_at_1", "map_at_r"):
                assert found["models"][kind][name] == pytest.approx(fmean(run[name] for run in runs))
            for k, eps in enumerate(SHORT.eps):
                worst = [run["robust_recall_at_1"][k] for run in runs]
                assert [part["eps"] for part in worst] == [eps, eps]
                mean = fmean(part["worst_case"] for part in worst)
                assert found["models"][kind]["worst_case"][str(eps)] == pytest.approx(mean)
                assert all(part["worst_case"] <= min(part["by_attack"].values()) for part in worst)


class TestTrain:
    def train(self, data, loss, miner=None, attack=None, seed=0, **settings):
        settings = experiment.Settings(**{"epochs": 2, "batch_size": 8, "warmup": 0, **settings})
        torch.manual_seed(seed)
        return experiment.train(settings, data, loss, miner, attack, seed, list)

    def test_of_classes_with_any_numbers_a_loss_with_proxies_learns_all_parameters(self, data):
        loss = ProxyAnchorLoss(2, 64)
        before = loss.proxies.detach().clone()
        self.train(data, loss)
        assert (loss.proxies != before).any(1).all()

    def test_takes_full_batches_of_every_epoch_in_another_order(self, data):
        class Notes(ContrastiveLoss):
            def forward(self, embeddings, labels, *rest):
                seen.append(labels.tolist())
                return super().forward(embeddings, labels, *rest)

        seen = []
        self.train(data, Notes(), epochs=3)
        assert [len(batch) for batch in seen] == [8, 8] * 3  # of 20 images, 4 are left over
        assert len({tuple(batch) for batch in seen}) > 1
        assert {label for batch in seen for label in batch} == {0, 1}

    def test_an_attack_makes_another_model(self, data):
        plain, adversarial = (weights(self.train(data, ContrastiveLoss(), attack=a)) for a in (None, PRESET))
        assert not torch.allclose(plain, adversarial, rtol=1e-3, atol=1e-5)

    def test_the_seed_is_the_run(self, data):
        one, again, other = (weights(self.train(data, ContrastiveLoss(), attack=PRESET, seed=s)) for s in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)

    def test_less_than_one_batch_is_refused(self, data):
        with pytest.raises(InputError, match="batch_size=21 for 20 training images; expected at least one full batch"):
            self.train(data, ContrastiveLoss(), batch_size=21)


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
