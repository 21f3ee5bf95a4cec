from functools import partial

import pytest
import torch
from few_passes import (  # noqa: F401
    CHECK,
    EPS,
    ROWS,
    counted_model,
    four_labels,
    passed_in_two_steps,
    score_of,
    signs_by_hand,
    twelve_images,
    wrapped,
)

from pml_adversarial.attacks import NFGSM


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
        first, second = passed_in_two_steps(loss_func, model, images, labels)
        assert second == [ROWS] * 2  # one step, the perturbed rows
        assert first == [*CHECK, *second]
