"""Every way to train with fewer passes: it trains, leaves no trace, and its attack makes rows worse off."""

import math
from functools import partial

import pytest
import torch
from few_passes import EPS, ROWS, counted_model, four_labels, score_of, signs_by_hand, twelve_images, wrapped  # noqa: F401

from pml_adversarial import AttackError, attacks
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


class TestNFGSM:
    def test_is_one_sign_step_from_wide_noise_that_is_not_projected(self, model, images, labels):
        loss_func, watch = wrapped(model, attack=partial(NFGSM, eps=EPS, alpha=0.03, spread=1.5), seed=7)
        context = model(images)
        drawn = []
        uniform = torch.Tensor.uniform_

        def kept(self, *args):
            drawn.append(uniform(self, *args).clone())
            return self.copy_(drawn[-1])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", kept)
            loss_func(context, labels)
        (noise,) = drawn
        start = images + noise
        expected = start + 0.03 * signs_by_hand(model, start, context.detach(), labels)
        assert -1.5 * EPS <= noise.min() < -1.4 * EPS
        assert 1.4 * EPS < noise.max() <= 1.5 * EPS
        assert torch.allclose(watch.adversarial.inputs, expected.clamp(0, 1), atol=1e-6)
        assert loss_func.perturbation_linf > EPS

    def test_passes_each_row_once(self, model, images, labels):
        loss_func, _ = wrapped(model, attack=partial(NFGSM, eps=EPS))
        loss_func(model(images), labels)
        assert model.passed == [ROWS] * 3  # the batch, one step, the perturbed rows


class TestFriendlyPGD:
    def test_never_resting_it_is_pgd_from_the_same_start(self, model, images, labels):
        """Written out with all rows, and the score of each by hand."""
        loss_func, watch = wrapped(
            model, attack=partial(FriendlyPGD, eps=EPS, alpha=0.02, steps=3, enough=math.inf), seed=7
        )
        starts = []
        uniform = torch.Tensor.uniform_
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", lambda t, *a: (starts.append(uniform(t, *a).clone()), t)[1])
            loss_func(context := model(images), labels)
        points = (images + starts[0]).clamp(0, 1)
        for _ in range(3):
            points = points + 0.02 * signs_by_hand(model, points, context.detach(), labels)
            points = (images + (points - images).clamp(-EPS, EPS)).clamp(0, 1)
        assert torch.allclose(watch.adversarial.inputs, points, atol=1e-6)

    @pytest.mark.parametrize("steps", [0, 1.5, None])
    def test_other_numbers_of_steps_are_refused(self, model, images, labels, steps):
        loss_func, _ = wrapped(model, attack=partial(FriendlyPGD, eps=EPS, steps=steps))
        with pytest.raises(AttackError, match="expected a whole number from 1 on, as the number of attack steps"):
            loss_func(model(images), labels)

    def test_rows_at_rest_are_where_they_stopped_and_pass_no_more(self, model, images, labels):
        loss_func, watch = wrapped(model, attack=partial(FriendlyPGD, eps=0.02, alpha=0.01, steps=8), keep_clean=False)
        context = model(images).detach()
        model.passed.clear()
        loss_func(model(images), labels)
        _, *steps, again = model.passed
        assert steps[0] == again == ROWS
        assert steps == sorted(steps, reverse=True)
        assert steps[-1] < ROWS  # else the test shows nothing
        assert len(steps) > 1
        scores = [
            score_of(model.layers(x)[0], i, context, labels) for i, x in enumerate(watch.adversarial.inputs.split(1))
        ]
        at_rest = ROWS - steps[-1]
        assert sum(score > -1e-6 for score in scores) >= at_rest

    def test_gradient_is_watched_in_the_rows_that_go_on(self, model, images, labels):
        loss_func, watch = wrapped(model, attack=partial(FriendlyPGD, eps=EPS, steps=5))
        loss_func(model(images), labels)
        assert not watch.adversarial.zero_gradient.any()
