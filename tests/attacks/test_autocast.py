from functools import partial

import pytest
import torch
import torchattacks
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

from pml_adversarial import AttackError, attacks
from pml_adversarial.attacks import Autocast, FriendlyPGD


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_only_attack_steps_are_in_it(self, dtype, model, images, labels):
        loss_func, _ = wrapped(model, attack=Autocast(attacks.preset(EPS), dtype))
        for _ in range(2):
            model.types.taken()
            loss_func(model(images), labels)
        assert model.types == [torch.float32, *[dtype] * 3, torch.float32]

    def test_is_scaled_as_the_attack_itself(self, model, images, labels):
        loss_func, _ = wrapped(model, attack=Autocast(attacks.preset(EPS)), warmup=2)
        seen = []
        for _ in range(3):
            loss_func(model(images), labels)
            seen.append(loss_func.perturbation_linf)
        assert seen == pytest.approx([0, EPS / 2, EPS], rel=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "bfloat16", None])
    def test_refuses_other_types(self, dtype):
        with pytest.raises(AttackError, match="expected one of torch"):
            Autocast(attacks.PRESET, dtype)

    @pytest.mark.parametrize("factory", [torchattacks.DeepFool, "PGD"])
    def test_refuses_what_is_refused_without_it(self, factory):
        with pytest.raises(AttackError):
            Autocast(factory)

    def test_early_stop_in_bfloat16(self, model, images, labels):
        loss_func, _ = wrapped(model, attack=Autocast(partial(FriendlyPGD, eps=EPS)))
        loss_func(model(images), labels)
        own, *passes, again = model.types
        check, steps = passes[: len(CHECK)], passes[len(CHECK) :]
        assert check == [torch.float32] * len(CHECK)
        assert own == again == torch.float32
        assert len(steps) >= 1
        assert set(steps) == {torch.bfloat16}
        assert loss_func.share_zero_gradient < 1
