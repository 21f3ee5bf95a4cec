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
from pytorch_metric_learning.losses import MultiSimilarityLoss, TripletMarginLoss

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

    @pytest.mark.parametrize("perturb", ["all", "positive"])
    def test_each_row_has_its_own_perturbation(self, perturb, model, images, labels):
        """Also where a miner names other rows in each step, and some of them several times."""
        method = FreeAT(eps=EPS, alpha=0.01)
        loss_func, watch = wrapped(model, method, loss=TripletMarginLoss(2.0), keep_clean=False, perturb=perturb)

        def step(*rows):
            first = torch.tensor(rows)
            tuples = first, (first + 3) % 12, (first + 1) % 12
            loss_func(model(images), labels, tuples).backward()
            inputs = watch.adversarial.inputs.detach()
            change = inputs - images[watch.plan.rows]
            return {int(row): c for row, c in zip(watch.plan.rows.flip(0), change.flip(0), strict=True)}

        torch.manual_seed(0)
        one = step(0, 1, 2)
        learned = {int(c) // (1 << 20): m for c, m in zip(method._copies.flip(0), method._change.flip(0), strict=True)}
        other = step(2, 5, 8)
        both = one.keys() & other.keys()
        assert both
        assert other.keys() - one.keys()
        for row in both:
            expected = (images[row] + learned[row]).clamp(0, 1) - images[row]
            torch.testing.assert_close(other[row], expected, atol=1e-6, rtol=0)
        for row in other.keys() - one.keys():
            assert not any(torch.allclose(other[row], change, atol=1e-4) for change in learned.values())

    def test_says_that_it_does_not_learn(self, model, images, labels, caplog):
        loss_func, _ = wrapped(model, FreeAT(eps=EPS))
        for _ in range(3):
            torch.autograd.grad(loss_func(model(images), labels), list(model.parameters()))
        assert caplog.text.count("FreeAT has learned nothing from the last step") == 1

    def test_goes_on_from_its_state(self, model, images, labels):
        method = FreeAT(eps=EPS)
        loss_func, watch = wrapped(model, method)
        loss_func(model(images), labels).backward()
        state = method.state_dict()
        other, its_watch = wrapped(model, resumed := FreeAT(eps=EPS))
        resumed.load_state_dict(state)
        loss_func(model(images), labels)
        other(model(images), labels)
        assert torch.equal(watch.adversarial.inputs, its_watch.adversarial.inputs)

    @pytest.mark.parametrize("eps", [0, -1, 8, None])
    def test_refuses_what_is_no_radius(self, eps):
        with pytest.raises(InputError, match="expected a number above 0 and up to 1"):
            FreeAT(eps)
