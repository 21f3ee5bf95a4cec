"""A search that sees losses only: what it proposes, what it keeps, how often it asks, and what it finds."""

import by_loops
import pytest
import torch
from query_batches import RADIUS, bench_of, both_norms, embedded, images_of, length, network

from pml_adversarial.evaluation.random_search import margin_search, random_search


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Recorded:
    """A loss that notes what it is asked; ``of`` gives the loss of one image in one row."""

    def __init__(self, of):
        self.of, self.asked, self.losses = of, {}, {}

    def __call__(self, images, rows):
        found = []
        for image, row in zip(images, rows.tolist(), strict=True):
            found.append(float(self.of(image, row)))
            self.asked.setdefault(row, []).append(image.clone())
            self.losses.setdefault(row, []).append(found[-1])
        return torch.tensor(found)


def kept(losses):
    """At each time, the number of the proposal that is kept: the last of the lowest so far."""
    best, found = 0, []
    for number, loss in enumerate(losses):
        best = number if loss <= losses[best] else best
        found.append(best)
    return found


class TestSearch:
    @both_norms
    def test_returns_the_last_of_the_best_that_it_asked_about(self, norm):
        images = pixels(4, 2, 5, 6)
        loss = Recorded(lambda image, row: (image * torch.linspace(-1, 1, 60).reshape(2, 5, 6)).sum().round(decimals=1))
        torch.manual_seed(1)
        found = random_search(loss, images, 0.3, norm, 40)
        ties = 0
        for row in range(4):
            asked, losses = loss.asked[row], loss.losses[row]
            assert len(asked) == 40
            assert torch.equal(found[row], asked[kept(losses)[-1]])
            assert losses[kept(losses)[-1]] == min(losses) < losses[0]
            ties += len(set(losses)) < len(losses)
        assert ties

    def test_each_proposal_changes_one_square_of_the_point_that_is_kept(self):
        images, eps = pixels(3, 2, 7, 9), 0.1
        loss = Recorded(lambda image, row: image.sum())
        torch.manual_seed(2)
        random_search(loss, images, eps, "Linf", 60)
        sides = set()
        for row in range(3):
            asked = loss.asked[row]
            corners = torch.stack([(images[row] + sign * eps).clamp(0, 1) for sign in (-1, 1)])
            assert all(
                any(torch.equal(column, c[ch, :, x]) for c in corners)
                for ch in range(2)
                for x, column in enumerate(asked[0][ch].T)
            )  # stripes
            for number, best in enumerate(kept(loss.losses[row])[:-1]):
                proposed = asked[number + 1]
                where = (proposed != asked[best]).any(0).nonzero()
                if len(where):
                    top, left, bottom, right = (*where.amin(0).tolist(), *(where.amax(0) + 1).tolist())
                    sides.add(max(bottom - top, right - left))
                    square = slice(top, bottom), slice(left, right)
                    for ch in range(2):
                        part = proposed[ch][square]
                        fits = [torch.allclose(part, corner[ch][square]) for corner in corners]
                        assert any(fits)
        assert (min(sides), max(sides)) == (1, 4)

    @both_norms
    @pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 40), (3, 2, 1, 4, 6), (3, 5, 7), (3, 1, 1, 2)])
    def test_stays_in_the_ball_whatever_the_shape_and_type(self, norm, shape):
        images = pixels(*shape).double()
        loss = Recorded(lambda image, row: -image.square().sum())
        found = random_search(loss, images, 0.2, norm, 20)
        assert found.dtype == torch.double
        for asked in (found, *(torch.stack([loss.asked[row][i] for row in range(3)]) for i in range(20))):
            assert asked.shape == images.shape
            assert length(asked - images, norm).max() <= 0.2 + 1e-9
            assert 0 <= asked.min() <= asked.max() <= 1

    def test_does_not_go_on_where_no_more_is_wanted(self):
        loss = Recorded(lambda image, row: -torch.inf if len(loss.asked.get(row, [])) >= 3 * row else 1.0)
        found = random_search(loss, pixels(4, 1, 4, 4), 0.1, "Linf", 8)
        assert {row: len(asked) for row, asked in loss.asked.items()} == {0: 1, 1: 4, 2: 7, 3: 8}
        for row in range(3):
            assert torch.equal(found[row], loss.asked[row][-1])

    def test_goes_on_where_the_loss_is_flat(self):
        """Of 36 pixels, 30 or more have to rise, which the first stripes do not do, and no single square."""
        images = torch.full((1, 1, 6, 6), 0.5)
        loss = Recorded(lambda image, row: -float((image > 0.5).sum() >= 30))
        torch.manual_seed(1)
        random_search(loss, images, 0.1, "Linf", 300)
        assert loss.losses[0][0] == 0
        assert min(loss.losses[0]) == -1

    @pytest.mark.parametrize(("norm", "share"), [("Linf", 0.9), ("L2", 0.85)])
    def test_comes_near_the_best_of_a_linear_loss(self, norm, share):
        weights = pixels(5, 1, 8, 8, seed=1) - 0.5
        smooth = torch.nn.functional.interpolate(weights[..., ::2, ::2], (8, 8))  # constant on squares
        images = torch.full((5, 1, 8, 8), 0.5)
        torch.manual_seed(0)
        found = random_search(lambda x, rows: (x * smooth[rows]).flatten(1).sum(1), images, 0.1, norm, 1000)
        gained = ((images - found) * smooth).flatten(1).sum(1)
        flat = smooth.flatten(1)
        best = 0.1 * (flat.abs().sum(1) if norm == "Linf" else flat.norm(dim=1))
        assert (gained > share * best).all()
        assert (gained <= best + 1e-5).all()


class TestMargin:
    @both_norms
    def test_what_it_breaks_is_broken_by_loops(self, norm):
        model = network()
        batch = bench_of(model, images_of(), norm=norm).batch(torch.arange(24))
        torch.manual_seed(0)
        found = embedded(model, margin_search(batch, RADIUS[norm], 150))
        labels, items = batch.gallery.labels, batch.gallery.embeddings
        before, after = (
            sum(by_loops.stands(queries[i], labels[i], i, items, labels) for i in range(24))
            for queries in (batch.clean, found)
        )
        assert after < before / 2

    def test_asks_no_gradient_and_only_as_often_as_it_may(self):
        model = network()
        batch = bench_of(model, images_of()).batch(torch.arange(24))
        passes = batch.embed.forward_passes, batch.embed.backward_passes
        margin_search(batch, 0.01, 30)
        assert batch.embed.forward_passes - passes[0] <= 24 * 30
        assert batch.embed.backward_passes == passes[1]
