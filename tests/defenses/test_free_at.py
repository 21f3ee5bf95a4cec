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
from pytorch_metric_learning.losses import MultiSimilarityLoss

from pml_adversarial import InputError
from pml_adversarial.defenses import FreeAT


class TestFreeAT:
    def test_moves_by_the_gradient_of_training(self, model, images, labels):
        method = FreeAT(eps=EPS, alpha=0.01)
        loss_func, watch = wrapped(model, method, keep_clean=False)
        loss_func(model(images), labels).backward()
        first = watch.adversarial.inputs.detach()
        again = first.clone().requires_grad_()
        MultiSimilarityLoss()(model.layers(again), labels).backward()
        expected = first + 0.01 * again.grad.sign()
        loss_func(model(images), labels)
        expected = (images + (expected - images).clamp(-EPS, EPS)).clamp(0, 1)
        assert torch.allclose(watch.adversarial.inputs, expected, atol=1e-6)

    def test_attacks_without_a_pass(self, model, images, labels):
        loss_func, _ = wrapped(model, FreeAT(eps=EPS))
        first, second = passed_in_two_steps(loss_func, model, images, labels)
        assert second == [ROWS]  # the perturbed rows
        assert first == [*CHECK, *second]

    def test_raises_the_loss_from_time_to_time(self, model, images, labels):
        loss_func, _ = wrapped(model, FreeAT(eps=EPS, alpha=0.02), keep_clean=False)
        losses = []
        for _ in range(6):
            losses.append(loss_func(model(images), labels))
            losses[-1].backward()
        assert losses[-1] > losses[0]

    def test_another_batch_size_starts_anew(self, model, images, labels):
        loss_func, watch = wrapped(model, FreeAT(eps=EPS))
        loss_func(model(images), labels).backward()
        loss_func(model(images[:6]), labels[:6]).backward()
        assert watch.adversarial.inputs.shape == images[:6].shape

    @pytest.mark.parametrize("eps", [0, -1, 8, None])
    def test_refuses_what_is_no_radius(self, eps):
        with pytest.raises(InputError, match="expected a number above 0 and up to 1"):
            FreeAT(eps)
