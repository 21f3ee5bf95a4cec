"""The attack that eps and steps ask for, beside an attack or without one."""

from functools import partial

import pytest
import torch
import torchattacks
from one_step import Spy
from pytorch_metric_learning import losses, miners

from pml_adversarial import AdversarialLoss, AdversarialMiner, AttackError, attacks


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
