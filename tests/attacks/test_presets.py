"""The package's own preset, the default of `AdversarialLoss`; and the attack that eps and steps ask for."""

from functools import partial

import pytest
import torch
import torchattacks
from one_step import Spy
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.miners import BatchHardMiner

from pml_adversarial import AdversarialLoss, AdversarialMiner, AttackError, attacks
from pml_adversarial.attacks.adapter import budget
from pml_adversarial.attacks.pgd import PGD
from pml_adversarial.attacks.presets import PRESET, SEED_PAPER, attack_of, preset, seed_paper_attack, shown_options
from pml_adversarial.training.schedule import DEFAULT_WARMUP
from pml_adversarial.training.tuples import ROLES


def brighter(objective):
    """Has neither eps nor steps."""
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


class TestAttackOf:
    def test_nothing_is_the_preset_itself(self):
        assert attack_of() is PRESET

    @pytest.mark.parametrize("attack", [PRESET, torchattacks.FGSM, brighter, attacks.Autocast(torchattacks.PGD)])
    def test_an_attack_alone_is_itself(self, attack):
        assert attack_of(attack) is attack

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"eps": 0.1}, {"eps": 0.1, "steps": 3}),
            ({"steps": 5}, {"eps": 8 / 255, "steps": 5}),
            ({"eps": 1, "steps": 5}, {"eps": 1.0, "steps": 5}),
        ],
    )
    def test_without_an_attack_they_are_the_presets(self, options, expected):
        found = attack_of(**options).keywords
        assert {name: found[name] for name in expected} == expected
        assert found["alpha"] == pytest.approx(2.5 * expected["eps"] / expected["steps"])

    def test_on_an_attack_they_are_keywords_and_its_others_stay(self):
        inner = partial(torchattacks.PGD, alpha=0.03)
        found = attack_of(inner, eps=0.1, steps=4)
        assert {**found.keywords} == {"alpha": 0.03, "eps": 0.1, "steps": 4}
        assert inner.keywords == {"alpha": 0.03}

    def test_what_is_no_attack_is_refused(self):
        with pytest.raises(AttackError, match="expected"):
            attack_of("PGD", eps=0.1)


class TestSeedPaperAttack:
    @pytest.mark.parametrize(
        ("options", "eps", "steps"),
        [({}, 0.01, 5), ({"eps": 0.02}, 0.02, 5), ({"steps": 10}, 0.01, 10), ({"eps": 0.2, "steps": 1}, 0.2, 1)],
    )
    def test_takes_steps_of_two_eps_over_their_number(self, options, eps, steps):
        found = seed_paper_attack(**options)
        assert budget(found) == pytest.approx({"eps": eps, "alpha": 2 * eps / steps})
        assert found.keywords["steps"] == steps
        assert found.func is SEED_PAPER.func

    @pytest.mark.parametrize("options", [{"eps": 0}, {"eps": 2}, {"steps": 0}, {"steps": 2.0}])
    def test_what_is_no_radius_or_number_is_refused(self, options):
        with pytest.raises(AttackError, match=f"{next(iter(options))}=.*; expected"):
            seed_paper_attack(**options)


class TestShownOptions:
    @pytest.mark.parametrize(
        ("attack", "expected"),
        [
            (attacks.preset(0.1, steps=2), {"eps": 0.1, "steps": 2, "attack": "PGD"}),
            (torchattacks.FGSM, {"eps": 8 / 255, "attack": "FGSM"}),
            (partial(partial(torchattacks.PGD, steps=2), eps=0.3), {"eps": 0.3, "steps": 2, "attack": "PGD"}),
            (brighter, {"attack": "brighter"}),
            (torchattacks.CW, {"steps": 50, "attack": "CW"}),
            (attacks.Autocast(attacks.preset(0.1)), {"eps": 0.1, "steps": 3, "attack": "Autocast"}),
        ],
        ids=["preset", "class", "layers", "function", "no eps", "object"],
    )
    def test_are_those_that_the_attack_tells(self, attack, expected):
        assert shown_options(attack) == expected


class TestOnAWrapper:
    def step(self, model, images, labels, **options):
        spy = Spy()
        loss_func = AdversarialLoss(losses.TripletMarginLoss(), model, warmup=0, seed=1, plugins=[spy], **options)
        return loss_func(model(images), labels).item(), spy

    @pytest.mark.parametrize(
        ("options", "attack"),
        [
            ({"eps": 0.02}, attacks.preset(0.02)),
            ({"steps": 2}, attacks.preset(8 / 255, steps=2)),
            ({"eps": 0.02, "steps": 2}, attacks.preset(0.02, steps=2)),
            ({"attack": torchattacks.PGD, "eps": 0.02, "steps": 2}, partial(torchattacks.PGD, eps=0.02, steps=2)),
            ({"attack": attacks.NFGSM, "eps": 0.02}, partial(attacks.NFGSM, eps=0.02)),
            ({"attack": torchattacks.PGDL2, "eps": 2.0}, partial(torchattacks.PGDL2, eps=2.0)),
            (
                {"attack": partial(attacks.PGD, norm="L0", steps=2), "eps": 3},
                partial(attacks.PGD, norm="L0", steps=2, eps=3),
            ),
            (
                {"attack": attacks.Autocast(torchattacks.PGD), "eps": 0.02},
                attacks.Autocast(partial(torchattacks.PGD, eps=0.02)),
            ),
            (
                {"attack": lambda objective, **options: torchattacks.PGD(objective, **options), "steps": 2},
                partial(torchattacks.PGD, steps=2),
            ),
        ],
    )
    def test_eps_and_steps(self, options, attack, model, images, labels):
        value, spy = self.step(model, images, labels, **options)
        expected, of_attack = self.step(model, images, labels, attack=attack)
        assert value == expected
        assert torch.equal(spy.adversarial.inputs, of_attack.adversarial.inputs)
        miner, by_attack = (
            AdversarialMiner(miners.BatchHardMiner(), model, seed=1, **o) for o in (options, {"attack": attack})
        )
        embeddings = model(images)
        miner(embeddings, labels), by_attack(embeddings, labels)
        assert dict(miner.records) == {**by_attack.records, "attack_seconds": miner.attack_seconds}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eps": 8}, r"eps=8; expected a number above 0 and up to 1"),
            ({"eps": 0.1, "steps": 0}, r"steps=0; expected a whole number"),
            ({"attack": torchattacks.PGD, "eps": 2.0}, r"eps=2.0; expected a number above 0 and up to 1"),
            ({"attack": partial(attacks.PGD, norm="L0"), "eps": 2.5}, r"eps=2.5; expected a whole number"),
            ({"attack": torchattacks.PGD, "eps": -0.1}, r"eps=-0.1; expected a number above 0"),
            ({"attack": torchattacks.PGD, "steps": 1.5}, r"steps=1.5; expected a whole number"),
            ({"attack": torchattacks.FGSM, "steps": 2}, r"steps=2 was given, and attack=FGSM takes no keyword steps"),
            (
                {"attack": lambda objective: None, "eps": 0.1},
                r"eps=0.1 was given, and attack=<lambda> takes no",
            ),
            ({"attack": attacks.preset(0.1), "eps": 0.2}, r"eps=0.2 was given, and the attack sets eps=0.1 itself"),
            (
                {"attack": attacks.Autocast(attacks.preset(0.1)), "steps": 2},
                r"steps=2 was given, and the attack sets steps=3 itself",
            ),
        ],
    )
    def test_eps_and_steps_that_cannot_be(self, options, message, model):
        for make in (AdversarialLoss, AdversarialMiner):
            wrapped = losses.TripletMarginLoss() if make is AdversarialLoss else miners.BatchHardMiner()
            with pytest.raises(AttackError, match=message):
                make(wrapped, model, **options)
