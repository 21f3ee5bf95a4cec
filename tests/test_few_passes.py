"""Every way to train with fewer passes: it trains, leaves no trace, and its attack makes rows worse off."""

import math
from functools import partial

import pytest
import torch
from few_passes import EPS, ROWS, counted_model, four_labels, score_of, signs_by_hand, twelve_images, wrapped  # noqa: F401

from pml_adversarial import attacks
from pml_adversarial.attacks import NFGSM, Autocast, FriendlyPGD
from pml_adversarial.defenses import ATTA, FreeAT, HardRows

ATTACKS = {
    "N-FGSM": partial(NFGSM, eps=EPS),
    "friendly": partial(FriendlyPGD, eps=EPS),
    "bfloat16": Autocast(attacks.preset(EPS)),
    "float16": Autocast(attacks.preset(EPS), torch.float16),
}
PLUGINS = {"hard rows": HardRows, "ATTA": partial(ATTA, eps=EPS), "free": partial(FreeAT, eps=EPS)}


def attack_of(name):
    """None where a plugin brings the attack."""
    return None if name in ("ATTA", "free") else ATTACKS.get(name, attacks.preset(EPS))


class TestAll:
    @pytest.mark.parametrize("name", [*ATTACKS, *PLUGINS])
    def test_trains_from_nothing_and_leaves_no_trace(self, name, model, images, labels):
        plugins = [PLUGINS[name]()] if name in PLUGINS else []
        loss_func, watch = wrapped(model, *plugins, attack=attack_of(name), warmup=4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(6):
            for reuse in (plugin for plugin in plugins if isinstance(plugin, ATTA)):
                reuse.next(torch.arange(ROWS))
            random_state = torch.get_rng_state()
            loss = loss_func(model(images), labels)
            assert torch.equal(torch.get_rng_state(), random_state)
            assert all(p.requires_grad and p.grad is None for p in model.parameters())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert math.isfinite(loss.item())
            assert loss_func.strength == min(1, step / 4)
        assert not images.requires_grad
        assert loss_func.num_perturbed == (ROWS / 2 if name == "hard rows" else ROWS)
        assert watch.adversarial.inputs.min() >= 0
        assert watch.adversarial.inputs.max() <= 1

    @pytest.mark.parametrize("name", [*ATTACKS, "hard rows", "ATTA"])
    def test_what_it_perturbs_is_worse_off(self, name, model, images, labels):
        plugins = [PLUGINS[name]()] if name in PLUGINS else []
        loss_func, watch = wrapped(model, *plugins, attack=attack_of(name))
        for reuse in (plugin for plugin in plugins if isinstance(plugin, ATTA)):
            reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        broken = watch.adversarial.score_before > 0 if name == "friendly" else torch.zeros(1, dtype=torch.bool)
        rose = watch.adversarial.score_after > watch.adversarial.score_before
        assert (rose | broken).float().mean() > 0.9
