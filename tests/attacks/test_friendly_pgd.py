import math
from functools import partial

import pytest
import torch
from few_passes import (  # noqa: F401
    CHECK,
    EPS,
    ROWS,
    counted_model,
    four_labels,
    score_of,
    signs_by_hand,
    twelve_images,
    wrapped,
)

from pml_adversarial import AttackError
from pml_adversarial.attacks import FriendlyPGD


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
        model.passed.taken()
        loss_func(model(images), labels)
        own, *passes, again = model.passed
        check, steps = passes[: len(CHECK)], passes[len(CHECK) :]
        assert check == CHECK
        assert own == steps[0] == again == ROWS
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
