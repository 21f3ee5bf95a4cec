"""Where an attack may move an image."""

import math

import pytest
import torch
from query_batches import RADIUS, both_norms, length

from pml_adversarial.attacks.ball import per_image, project


class TestProject:
    @both_norms
    def test_holds_to_the_ball_and_to_the_pixels(self, norm):
        clean = torch.rand(50, 1, 4, 4)
        found = clean + torch.randn(50, 1, 4, 4)
        held = project(found, clean, RADIUS[norm], norm)
        assert (length(held - clean, norm) <= RADIUS[norm] + 1e-6).all()
        assert 0 <= held.min() <= held.max() <= 1

    @both_norms
    def test_leaves_alone_what_is_allowed(self, norm):
        clean = torch.rand(50, 1, 4, 4) * 0.8 + 0.1
        found = clean + 0.01 * torch.randn(50, 1, 4, 4)
        torch.testing.assert_close(project(found, clean, 0.1, norm), found, rtol=0, atol=1e-7)

    def test_l2_shortens_along_the_way(self):
        held = project(torch.tensor([[[[0.9, 0.9]]]]), torch.tensor([[[[0.5, 0.5]]]]), 0.1, "L2")
        torch.testing.assert_close(held, torch.full((1, 1, 1, 2), 0.5 + 0.1 / math.sqrt(2)))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @both_norms
    def test_what_is_not_finite_is_clean_again(self, bad, norm):
        clean = torch.full((1, 1, 1, 3), 0.5)
        held = project(torch.tensor([[[[bad, 0.51, 0.5]]]]), clean, 0.1, norm)
        torch.testing.assert_close(held, torch.tensor([[[[0.5, 0.51, 0.5]]]]))


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 2, 2)])
def test_a_value_for_each_image(shape):
    images = torch.ones(shape)
    scaled = per_image(torch.arange(4.0), images) * images
    for row, image in enumerate(scaled):
        assert (image == row).all()
