"""The package's own preset, which is the default of `AdversarialLoss`."""

import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.miners import BatchHardMiner

from pml_adversarial import AdversarialLoss, AdversarialMiner, AttackError
from pml_adversarial.attacks.adapter import budget
from pml_adversarial.attacks.pgd import PGD
from pml_adversarial.attacks.presets import PRESET, SEED_PAPER, preset
from pml_adversarial.training.schedule import DEFAULT_WARMUP
from pml_adversarial.training.tuples import ROLES


def brighter(objective):
    """Has no eps."""
    return lambda inputs, labels: (inputs + 0.05).clamp(0, 1)


def test_it_is_pgd_within_8_of_255_levels():
    assert PRESET.func is PGD
    assert PRESET.args == ()
    assert PRESET.keywords == {
        "eps": 8 / 255,
        "alpha": pytest.approx(20 / 3 / 255),
        "steps": 3,
        "random_start": True,
    }


@pytest.mark.parametrize(
    ("wrapper", "wrapped"), [(AdversarialLoss, ContrastiveLoss), (AdversarialMiner, BatchHardMiner)]
)
def test_it_is_the_default(wrapper, wrapped, model):
    method = wrapper(wrapped(), model).adversary.hooks.own
    assert (method.attack, method.roles, method.tuples_per_anchor, method.clean_weight) == (PRESET, ROLES, None, 0)
    assert method.keep_clean == (wrapper is AdversarialLoss)
    assert wrapper(wrapped(), model).adversary.schedule.warmup == (DEFAULT_WARMUP if wrapper is AdversarialLoss else 0)


class TestWarmup:
    @pytest.mark.parametrize(
        ("attack", "steps"), [(PRESET, 200), (torchattacks.FGSM, 200), (brighter, 0), (torchattacks.CW, 0)]
    )
    def test_is_of_200_steps_where_there_is_an_eps(self, attack, steps, model):
        assert AdversarialLoss(ContrastiveLoss(), model, attack=attack).adversary.schedule.warmup == steps

    def test_of_its_own_is_taken(self, model):
        for steps in (0, 7):
            assert AdversarialLoss(ContrastiveLoss(), model, warmup=steps).adversary.schedule.warmup == steps

    def test_cannot_be_asked_of_an_attack_without_eps(self, model):
        AdversarialLoss(ContrastiveLoss(), model, attack=brighter, warmup=0)
        with pytest.raises(AttackError, match="no eps that could grow"):
            AdversarialLoss(ContrastiveLoss(), model, attack=brighter, warmup=DEFAULT_WARMUP)

    def test_grows_to_the_full_eps(self, model, images, labels):
        loss_func, found = AdversarialLoss(ContrastiveLoss(), model), []
        for step in (0, DEFAULT_WARMUP // 2, DEFAULT_WARMUP):
            loss_func.adversary.step = step
            loss_func(model(images), labels)
            found.append(loss_func.perturbation_linf)
        assert found == pytest.approx([0, 4 / 255, 8 / 255], abs=1e-6)


@pytest.mark.parametrize(("eps", "steps"), [(4 / 255, 3), (0.1, 3), (0.1, 10), (1, 1)])
def test_another_eps_has_its_alpha(eps, steps):
    assert budget(preset(eps, steps)) == pytest.approx({"eps": eps, "alpha": 2.5 * eps / steps})
    assert preset(eps, steps).keywords["steps"] == steps


@pytest.mark.parametrize("eps", [2 / 255, 0.1])
def test_another_eps_is_reached(eps, model, images, labels):
    loss_func = AdversarialLoss(ContrastiveLoss(), model, attack=preset(eps), warmup=0)
    loss_func(model(images), labels)
    assert loss_func.perturbation_linf == pytest.approx(eps, rel=1e-4)
    assert loss_func.share_score_rose == 1


def test_clean_and_perturbed_rows_are_trained_on_in_one_batch(model, images, labels):
    seen = []

    def spied(objective, eps=8 / 255, alpha=20 / 3 / 255):
        attack = PRESET(objective, eps=eps, alpha=alpha)

        def run(inputs, labels):
            seen.append(attack(inputs, labels))
            return seen[-1]

        return run

    loss, parameters = ContrastiveLoss(), list(model.parameters())
    found = AdversarialLoss(loss, model, attack=spied, warmup=0)(model(images), labels)
    (perturbed,) = seen
    assert (perturbed != images).flatten(1).any(1).all()  # every row
    expected = loss(model(torch.cat([images, perturbed])), torch.cat([labels, labels]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (found, expected))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_the_seed_papers_method_is_one_call_away(model, images, labels):
    loss_func = AdversarialLoss(
        ContrastiveLoss(), model, attack=SEED_PAPER, perturb="positive", keep_clean=False, guard=False, warmup=0
    )
    value = loss_func(model(images), labels)
    assert loss_func.perturbation_linf == pytest.approx(0.01, rel=1e-4)
    assert value.item() == pytest.approx(loss_func.loss_after, rel=1e-5)  # nothing but the readdressed tuples
    assert not loss_func.adversary.monitor.guarded


@pytest.mark.parametrize("eps", [0, -0.1, 8, 1.01, float("nan"), float("inf"), True, "8/255", None])
def test_an_eps_that_is_no_radius_is_refused(eps):
    with pytest.raises(AttackError, match=r"eps=.*; expected a number above 0 and up to 1.*eps=8/255"):
        preset(eps)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3"])
def test_steps_that_are_no_number_are_refused(steps):
    with pytest.raises(AttackError, match=r"steps=.*; expected a whole number"):
        preset(0.1, steps)
