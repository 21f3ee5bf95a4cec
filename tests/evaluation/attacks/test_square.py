"""The black-box attack by random search, in images of any size."""

import pytest
import torch
from query_batches import RADIUS, Made, bench_of, both_norms, images_of, length, network
from torch import nn

from pml_adversarial import evaluate_robustness
from pml_adversarial.attacks.ball import project
from pml_adversarial.evaluation.attacks.gradients import margin_score
from pml_adversarial.evaluation.attacks.kinds import QueryAttack
from pml_adversarial.evaluation.attacks.square import _as_images, _hull, _share, _windows, square_attack

SHAPES = [(3, 8, 8), (3, 12, 5), (1, 5, 12), (1, 4, 4), (1, 2, 2), (1, 1, 3), (3, 1, 1), (2, 3, 4, 5), (2, 9), (7,)]


def batch_of(shape=(1, 6, 6), norm="Linf", count=24, seed=0):
    labels = torch.arange(count) % 4
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(4, *shape, generator=generator) * 0.6 + 0.2
    images = (patterns[labels] + 0.1 * torch.randn(count, *shape, generator=generator)).clamp(0, 1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 6))
    return bench_of(model, (images, labels), norm=norm).batch(torch.arange(count))


@both_norms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestImagesOfAnySize:
    def test_stay_in_the_ball_and_in_the_box_and_use_it_all(self, norm, shape):
        batch, eps = batch_of(shape, norm), RADIUS[norm]
        found = square_attack(margin_score, 20)(batch, eps, 0)
        assert found.shape == batch.images.shape
        assert 0 <= found.min() <= found.max() <= 1
        moved = length(found - batch.images, norm)
        assert (moved <= eps * (1 + 1e-4)).all()
        assert moved.max() > 0.9 * eps

    def test_the_score_never_falls(self, norm, shape):
        batch, eps = batch_of(shape, norm), RADIUS[norm]
        scores = []
        for queries in (1, 5, 40):
            torch.manual_seed(0)
            found = square_attack(margin_score, queries)(batch, eps, 0)
            scores.append(batch.gallery.margin(batch.embed(found), batch.targets).clamp(max=0))
        assert (scores[0] <= scores[1]).all() or queries == 1  # other schedules draw alike at first
        assert scores[0].mean() <= scores[2].mean() + 1e-6


class TestSeesOutputsOnly:
    def test_no_gradient_and_no_more_than_the_queries(self):
        asked = []

        def embed(images):
            assert not images.requires_grad
            assert not torch.is_grad_enabled()
            asked.append(len(images))
            return images.flatten(1)

        batch = bench_of(Made(embed), images_of()).batch(torch.arange(24))
        asked.clear()
        square_attack(margin_score, 30)(batch, 1e-6, 0)
        robust = int((batch.gallery.margin(batch.clean, batch.targets) < 0).sum())
        assert len(asked) == 30
        assert asked[0] == 24
        assert set(asked[1:]) == {robust}  # what is wrong already is not asked about again

    def test_a_broken_query_is_not_asked_about_again(self):
        batch = bench_of(network(), images_of(spread=0.05)).batch(torch.arange(24))
        before = batch.embed.forward_passes
        found = square_attack(margin_score, 200)(batch, 0.5, 0)
        assert (batch.gallery.margin(batch.embed(found), batch.targets) >= 0).all()
        assert batch.embed.forward_passes - before < 24 * 100


class TestStrength:
    @both_norms
    def test_breaks_more_than_as_much_noise(self, norm):
        batch, eps = bench_of(network(), images_of(), norm=norm).batch(torch.arange(24)), RADIUS[norm]
        torch.manual_seed(0)
        found = square_attack(margin_score, 300)(batch, eps, 0)
        broken = batch.gallery.margin(batch.embed(found), batch.targets) >= 0
        by_noise = torch.zeros_like(broken)
        for _ in range(300):
            noise = eps * torch.randn_like(batch.images).sign()
            noise = project(batch.images + 100 * noise, batch.images, eps, norm)
            by_noise |= batch.gallery.margin(batch.embed(noise), batch.targets) >= 0
        assert broken.sum() >= by_noise.sum() + 3

    def test_in_a_report(self):
        attack = QueryAttack("square", square_attack(margin_score, 100), black_box=True)
        report = evaluate_robustness(network(), images_of(), eps=0.1, attacks=[attack], checks=False)
        assert report.worst_case(0.1) < report.clean["recall_at_1"]
        assert report.attacks[0].backward_passes == 0


class TestParts:
    def test_the_share_falls_by_halves_as_in_the_paper(self):
        shares = [_share(step, 10_000) for step in (0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999)]
        assert shares == [0.8, 0.8, *(0.8 / 2**n for n in range(1, 10)), 0.8 / 2**9]
        assert _share(5, 500) == _share(100, 10_000)

    def test_windows_are_rectangles_anywhere(self):
        torch.manual_seed(0)
        found = _windows(torch.zeros(400, 3, 4, 5), (2, 3))
        assert found.shape == (400, 1, 4, 5)
        places = set()
        for window in found[:, 0]:
            rows, columns = window.any(1).nonzero().flatten().tolist(), window.any(0).nonzero().flatten().tolist()
            assert rows == [rows[0], rows[0] + 1]
            assert columns == list(range(columns[0], columns[0] + 3))
            assert int(window.sum()) == 6
            places.add((rows[0], columns[0]))
        assert places == {(row, column) for row in range(3) for column in range(3)}

    def test_the_smallest_rectangle_around_marks(self):
        mask = torch.zeros(2, 1, 5, 6, dtype=torch.bool)
        mask[0, 0, 1, 4] = mask[0, 0, 3, 2] = True
        found = _hull(mask)
        expected = torch.zeros(5, 6, dtype=torch.bool)
        expected[1:4, 2:5] = True
        assert torch.equal(found[0, 0], expected)
        assert not found[1].any()

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_any_inputs_as_images(self, shape):
        inputs = torch.rand(2, *shape)
        found = _as_images(inputs)
        assert found.ndim == 4
        assert torch.equal(found.reshape(inputs.shape), inputs)
