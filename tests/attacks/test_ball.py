"""Where an attack may move an image."""

import itertools
import math

import numpy
import pytest
import torch
from query_batches import RADIUS, all_norms, both_norms, length
from scipy.optimize import minimize

from pml_adversarial.attacks.ball import chosen, chosen_at_random, per_image, project, radius_text, sparse_direction
from pml_adversarial.errors import InputError
from pml_adversarial.evaluation.retrieval.options import largest_radius


class TestProject:
    @all_norms
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

    @all_norms
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_what_it_gives_it_leaves_alone(self, norm, dtype):
        clean = torch.rand(50, 2, 4, 5, dtype=dtype)
        held = project(clean + torch.randn_like(clean), clean, RADIUS[norm], norm)
        assert (length(held - clean, norm) > 0.9 * RADIUS[norm]).sum() > 25
        torch.testing.assert_close(project(held, clean, RADIUS[norm], norm), held, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("eps", "scale"), [(0.3, 1.0), (1.2, 1.0), (1.2, 0.1), (2.5, 3.0), (4.0, 3.0)])
    def test_l1_is_the_nearest_point_that_an_optimiser_finds(self, eps, scale):
        generator = torch.Generator().manual_seed(3)
        clean = torch.rand(6, 1, 2, 3, dtype=torch.float64, generator=generator)
        points = clean + scale * torch.randn(6, 1, 2, 3, dtype=torch.float64, generator=generator)
        for row, found in enumerate(project(points, clean, eps, "L1")):
            centre, wanted = clean[row].flatten().numpy(), points[row].flatten().numpy()

            def change(parts):  # what is added, and what is taken away
                return parts[:6] - parts[6:]

            def slope(parts, centre=centre, wanted=wanted):  # a difference quotient would not be exact enough
                of_points = 2 * (centre + change(parts) - wanted)
                return numpy.concatenate([of_points, -of_points])

            best = minimize(
                lambda parts, centre=centre, wanted=wanted: ((centre + change(parts) - wanted) ** 2).sum(),
                [0.01] * 12,
                jac=slope,
                bounds=[*((0, 1 - c) for c in centre), *((0, c) for c in centre)],
                constraints={"type": "ineq", "fun": lambda parts: eps - parts.sum()},
                method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 500},
            )
            expected = torch.tensor(centre + change(best.x)).reshape(1, 2, 3)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("norm", "eps"), [("L0", 1), ("L0", 3), ("patch", 1), ("patch", 2)])
    def test_counts_are_the_nearest_of_all_points(self, norm, eps):
        """Of all sets of positions, or of all squares, by loops."""
        generator = torch.Generator().manual_seed(3)
        clean = torch.rand(20, 2, 2, 4, generator=generator)
        points = clean + torch.randn(20, 2, 2, 4, generator=generator)
        at = list(itertools.product(range(2), range(4)))
        if norm == "L0":
            places = list(itertools.combinations(at, eps))
        else:
            corners = itertools.product(range(2 - eps + 1), range(4 - eps + 1))
            places = [[(y + i, x + j) for i in range(eps) for j in range(eps)] for y, x in corners]
        for row, found in enumerate(project(points, clean, eps, norm)):
            nearest, least = None, math.inf
            for place in places:
                candidate = clean[row].clone()
                for y, x in place:
                    candidate[:, y, x] = points[row, :, y, x].clamp(0, 1)
                if (distance := (candidate - points[row]).square().sum().item()) < least:
                    nearest, least = candidate, distance
            torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("norm", "eps"), [("L1", 50.0), ("L0", 16), ("patch", 4)])
    def test_the_widest_ball_holds_every_image(self, norm, eps):
        clean, points = torch.rand(2, 9, 1, 4, 4)
        torch.testing.assert_close(project(points, clean, eps, norm), points)

    @pytest.mark.parametrize("norm", ["L1", "L0", "patch"])
    @pytest.mark.parametrize("shape", [(5, 6), (5, 4, 6), (5, 3, 4, 6), (5, 2, 3, 4, 6)])
    def test_inputs_of_any_shape(self, norm, shape):
        clean = torch.rand(shape)
        held = project(1 - clean, clean, 2, norm)
        assert held.shape == clean.shape
        changed = (held != clean).flatten(1).sum(1)
        channels, frames = (3, 2 if len(shape) == 5 else 1) if len(shape) > 3 else (1, 1)
        if norm != "L1":
            sides = 2 if len(shape) == 2 else 4
            assert changed.unique().tolist() == [2 * channels if norm == "L0" else sides * channels * frames]
        else:
            assert (changed > 0).all()

    def test_l2_shortens_along_the_way(self):
        held = project(torch.tensor([[[[0.9, 0.9]]]]), torch.tensor([[[[0.5, 0.5]]]]), 0.1, "L2")
        torch.testing.assert_close(held, torch.full((1, 1, 1, 2), 0.5 + 0.1 / math.sqrt(2)))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @all_norms
    def test_what_is_not_finite_is_clean_again(self, bad, norm):
        clean = torch.full((1, 1, 1, 3), 0.5)
        held = project(torch.tensor([[[[bad, 0.51, 0.5]]]]), clean, 1 if norm in ("L0", "patch") else 0.1, norm)
        torch.testing.assert_close(held, torch.tensor([[[[0.5, 0.51, 0.5]]]]))


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 2, 2)])
def test_a_value_for_each_image(shape):
    images = torch.ones(shape)
    scaled = per_image(torch.arange(4.0), images) * images
    for row, image in enumerate(scaled):
        assert (image == row).all()


class TestChosen:
    @pytest.mark.parametrize(("norm", "eps"), [("L0", 3), ("patch", 2)])
    def test_at_random_are_as_many_and_each_place_as_often(self, norm, eps):
        like = torch.zeros(6000, 2, 3, 4)
        found = chosen_at_random(like, eps, norm)
        assert found.flatten(1).sum(1).unique().tolist() == [3 if norm == "L0" else 4]
        patterns, counts = found.flatten(1).float().unique(dim=0, return_counts=True)
        assert len(patterns) == (math.comb(12, 3) if norm == "L0" else 2 * 3)
        expected = 6000 / len(patterns)
        assert (counts - expected).abs().max() < 5 * expected**0.5

    def test_most_weight(self):
        weights = torch.tensor([[[[5.0, 0, 0, 0], [0, 0, 3, 3]]]])
        assert chosen(weights, 1, "patch").int().tolist() == [[[[1, 0, 0, 0], [0, 0, 0, 0]]]]
        assert chosen(weights, 2, "patch").int().tolist() == [[[[0, 0, 1, 1], [0, 0, 1, 1]]]]
        assert chosen(weights, 2, "L0").int().sum() == 2


class TestChannelsLast:
    """Images whose rows would be taken for channels, so that more than eps positions change."""

    @pytest.mark.parametrize("norm", ["L0", "patch"])
    @pytest.mark.parametrize("shape", [(8, 8, 3), (32, 5, 4), (28, 28, 1)])
    def test_are_refused_where_channels_count_as_one(self, norm, shape):
        clean = torch.rand(2, *shape)
        cure = rf"shape \({', '.join(map(str, shape))}\).*such as \({shape[2]}, {shape[0]}, {shape[1]}\).*permute"
        with pytest.raises(InputError, match=cure):
            project(1 - clean, clean, 2, norm)
        with pytest.raises(InputError, match=cure):
            chosen_at_random(clean, 2, norm)

    @all_norms
    @pytest.mark.parametrize("shape", [(3, 8, 8), (64, 4, 4), (2, 3, 4), (16, 1, 3), (8, 8, 2), (8, 3), (5, 3, 8, 8)])
    def test_all_others_are_taken(self, norm, shape):
        clean = torch.rand(2, *shape)
        assert project(1 - clean, clean, RADIUS[norm], norm).shape == clean.shape

    @pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
    def test_are_taken_where_each_value_counts(self, norm):
        clean = torch.rand(2, 8, 8, 3)
        assert (project(1 - clean, clean, RADIUS[norm], norm) != clean).any()


class TestClips:
    """In "L0", the channels of one place in one frame change together, whichever axis holds them."""

    @pytest.mark.parametrize(("shape", "axis"), [((5, 3, 6, 7), 1), ((3, 5, 6, 7), 0), ((1, 16, 6, 7), 0)])
    @pytest.mark.parametrize("at_random", [True, False])
    def test_channels_change_together(self, shape, axis, at_random):
        clean = torch.rand(4, *shape)
        if at_random:
            changed = chosen_at_random(clean, 2, "L0").expand(clean.shape)
        else:
            changed = project(1 - clean, clean, 2, "L0") != clean
        together = changed.movedim(1 + axis, 1)
        assert torch.equal(together.any(1), together.all(1))
        assert together.any(1).flatten(1).sum(1).tolist() == [2] * 4
        assert largest_radius("L0", shape) == math.prod(shape) / shape[axis]

    @pytest.mark.parametrize("shape", [(3, 3, 6, 7), (3, 1, 6, 7), (5, 2, 6, 7), (5, 8, 8, 3)])
    def test_channels_that_cannot_be_told(self, shape):
        clean = torch.rand(2, *shape)
        for ask in (lambda: project(1 - clean, clean, 2, "L0"), lambda: largest_radius("L0", shape)):
            with pytest.raises(InputError, match=r"it cannot be told which axis.*norm='patch'"):
                ask()
        assert project(1 - clean, clean, 2, "patch").shape == clean.shape


class TestSparseDirection:
    def test_by_loops(self):
        generator = torch.Generator().manual_seed(0)
        points = torch.rand(30, 1, 2, 5, generator=generator)
        points[torch.rand(points.shape, generator=generator) < 0.3] = 0.0
        points[torch.rand(points.shape, generator=generator) < 0.3] = 1.0
        gradient = torch.randn(30, 1, 2, 5, generator=generator)
        for found, point, slope in zip(sparse_direction(gradient, points, 0.7), points, gradient, strict=True):
            able = {}
            for i, (value, rise) in enumerate(zip(point.flatten().tolist(), slope.flatten().tolist(), strict=True)):
                if (rise > 0 and value < 1) or (rise < 0 and value > 0):
                    able[i] = rise
            largest = sorted(able, key=lambda i: -abs(able[i]))[:3]
            total = sum(abs(able[i]) for i in largest)
            expected = [able[i] / total if i in largest else 0.0 for i in range(10)]
            assert found.flatten().tolist() == pytest.approx(expected)

    def test_without_gradient_nothing_moves(self):
        assert not sparse_direction(torch.zeros(2, 1, 2, 2), torch.rand(2, 1, 2, 2), 0.5).any()


@pytest.mark.parametrize(
    ("eps", "norm", "shown"),
    [
        (1 / 255, "Linf", "1/255"),
        (16 / 255, "Linf", "16/255"),
        (254 / 255, "Linf", "254/255"),
        (0.5 / 255, "Linf", "0.5/255"),
        (2.5 / 255, "Linf", "2.5/255"),
        (0.25 / 255, "Linf", "0.0009804"),
        (51 / 255, "Linf", "0.2"),  # round numbers stay what they are
        (0.03, "Linf", "0.03"),
        (1.0, "Linf", "1"),
        (0.0, "Linf", "0"),
        (0.123456, "Linf", "0.1235"),
        (8 / 255, "L2", "0.03137"),
        (2.5, "L2", "2.5"),
    ],
)
def test_a_radius_is_shown_in_levels_if_it_was_meant_so(eps, norm, shown):
    assert radius_text(eps, norm) == shown
