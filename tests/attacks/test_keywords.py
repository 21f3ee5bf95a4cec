"""The attack that eps and steps ask for, beside an attack or without one."""

from functools import partial

import pytest
import torch
import torchattacks
from one_step import Spy
from pytorch_metric_learning import losses, miners

from pml_adversarial import AdversarialLoss, AdversarialMiner, AttackError, attacks
from pml_adversarial.attacks.adapter import budget
from pml_adversarial.attacks.keywords import attack_of, seed_paper_attack, shown_options
from pml_adversarial.attacks.presets import PRESET, SEED_PAPER


def brighter(objective):
    """Has neither eps nor steps."""
    return lambda inputs, labels: (inputs + 0.05).clamp(0, 1)


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
