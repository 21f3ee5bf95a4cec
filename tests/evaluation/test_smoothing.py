import json
import math
import random
from statistics import NormalDist, fmean, variance

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import ConcatDataset, TensorDataset

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import smoothing as module
from pml_adversarial.evaluation.reports import binomial
from pml_adversarial.evaluation.smoothing import (
    certify,
    choose_thresholds,
    mean_bound,
    radius_lipschitz,
    radius_of_mean,
    radius_of_shares,
    smoothed_embeddings,
)
from pml_adversarial.training.isolation import random_stream

SIGMA = 0.1
PHI = NormalDist()


class HalfSpace(nn.Module):
    """Two embeddings, opposite to one another, on the two sides of a plane; in between if it is not steep."""

    def __init__(self, plane=0.5, steepness=math.inf):
        super().__init__()
        self.plane, self.steepness = plane, steepness

    def forward(self, images):
        distance = images.flatten(1)[:, 0] - self.plane
        side = distance.sign() if self.steepness == math.inf else torch.tanh(self.steepness * distance)
        return torch.stack([side, (1 - side**2).clamp(min=1e-30).sqrt()], 1)  # of 0 the root has no gradient


def at(*first_pixels):
    """One image per value of the first pixel; the other three are 0.5."""
    images = torch.full((len(first_pixels), 1, 2, 2), 0.5)
    images[:, 0, 0, 0] = torch.tensor(first_pixels)
    return images


TWO_SIDES = at(0.9, 0.95, 0.05, 0.1), torch.tensor([1, 1, 0, 0])


@pytest.fixture
def batch():
    """Twelve images of three classes around three patterns, and an embedding that is not linear."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(12) % 3
    patterns = torch.rand(3, 1, 4, 4, generator=generator)
    images = (patterns[labels] + 0.05 * torch.randn(12, 1, 4, 4, generator=generator)).clamp(0, 1)
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 6, bias=False)), (images, labels)


def certified(model, queries, gallery=None, **changed):
    options = {
        "sigma": SIGMA,
        "radii": [0, 0.05],
        "samples": 2000,
        "selection_samples": 300,
        "gallery_samples": 20,
        **changed,
    }
    return certify(model, queries, gallery, **options)


class TestMeanBound:
    def test_is_empirical_bernstein_of_values_moved_to_0_1(self):
        values = torch.rand(50, 3, dtype=torch.float64) ** 3 * 1.5 - 0.7
        for column, bound in zip(values.T.tolist(), mean_bound(values, 0.01).tolist(), strict=True):
            moved = [(1 + value) / 2 for value in column]
            log = math.log(2 / 0.01)
            low = fmean(moved) - math.sqrt(2 * variance(moved) * log / 50) - 7 * log / (3 * 49)
            assert bound == pytest.approx(max(-1, 2 * low - 1))

    def test_is_never_below_the_least_value(self):
        assert mean_bound(torch.full((3, 1), -0.9, dtype=torch.float64), 1e-6).item() == -1

    @pytest.mark.parametrize("chance", [0.1, 0.5, 0.97])
    def test_is_false_at_most_as_often_as_it_says(self, chance):
        draws = (torch.rand(300, 20000) < chance).double() * 2 - 1
        assert (mean_bound(draws, 0.2) > 2 * chance - 1).double().mean() <= 0.2

    def test_is_false_sometimes(self):
        draws = (torch.rand(300, 20000) < 0.5).double() * 2 - 1
        assert (mean_bound(draws, 0.2) > 0).double().mean() > 0


class TestRadii:
    """In units of sigma."""

    def drawn(self, seed):
        generator = torch.Generator().manual_seed(seed)
        thresholds = (torch.rand(5, 40, generator=generator, dtype=torch.float64) * 2 - 1).sort(0).values
        shares = torch.rand(5, 40, generator=generator, dtype=torch.float64).sort(0, descending=True).values
        return thresholds, shares ** torch.linspace(0.01, 1, 40)

    def holds(self, thresholds, shares, radius):
        """The lower bound of the mean that is left at a radius, by hand."""
        mean, before = -1.0, -1.0
        for threshold, share in zip(thresholds.tolist(), shares.tolist(), strict=True):
            mean += (threshold - before) * PHI.cdf(PHI.inv_cdf(share) - radius)
            before = threshold
        return mean > 0

    def test_the_mean_stays_above_0_just_as_far_as_it_says(self):
        thresholds, shares = self.drawn(0)
        radii = radius_of_shares(thresholds, shares)
        assert 5 < (radii > 0).sum() < 35
        for column, radius in enumerate(radii.tolist()):
            if radius > 0:
                assert self.holds(thresholds[:, column], shares[:, column], 0.9999 * radius)
            assert not self.holds(thresholds[:, column], shares[:, column], 1.0001 * radius)

    def test_one_threshold_has_a_closed_form(self):
        found = radius_of_shares(torch.tensor([[0.5]]).double(), torch.tensor([[0.9]]).double())
        assert found.item() == pytest.approx(PHI.inv_cdf(0.9) - PHI.inv_cdf(1 / 1.5))

    def test_shares_of_0_and_hopeless_thresholds_certify_nothing(self):
        thresholds = torch.tensor([[-0.5, -0.5], [0.3, 0.0]]).double()
        assert radius_of_shares(thresholds, torch.tensor([[0.9, 1 - 1e-9], [0.0, 0.999]]).double()).tolist() == [0, 0]

    @pytest.mark.parametrize("seed", range(5))
    def test_from_the_same_mean_shares_give_most_and_the_lipschitz_constant_least(self, seed):
        thresholds, shares = self.drawn(seed)
        mean = (thresholds.diff(dim=0, prepend=-torch.ones(1, 40)) * shares).sum(0) - 1
        lipschitz, salman, ours = radius_lipschitz(mean), radius_of_mean(mean), radius_of_shares(thresholds, shares)
        above = mean > 0
        assert above.any()
        assert (lipschitz[above] < salman[above]).all()
        assert (salman[above] <= ours[above] + 1e-9).all()
        assert lipschitz[~above].tolist() == salman[~above].tolist() == [0] * int((~above).sum())

    def test_of_the_mean(self):
        assert radius_of_mean(torch.tensor([0.6]).double()).item() == pytest.approx(PHI.inv_cdf(0.8))
        assert radius_lipschitz(torch.tensor([0.6]).double()).item() == pytest.approx(0.6 / math.sqrt(2 / math.pi))

    def test_thresholds_ascend_from_below_all_values(self):
        values = torch.randn(400, 7, dtype=torch.float64) * 0.1 + 0.3
        thresholds = choose_thresholds(values)
        assert (thresholds.diff(dim=0) >= 0).all()
        assert (thresholds[0] < values.amin(0)).all()
        assert (thresholds[-1] < values.amax(0)).all()
        assert choose_thresholds(values - 1.5).amin() == -1


class TestHalfSpace:
    """A model whose smoothed version is known: it is right up to the plane, and no further."""

    def test_the_radius_is_just_below_the_distance_to_the_plane(self):
        distances = torch.tensor([0.5, 1.0, 1.5, 2.0]) * SIGMA
        found = certified(
            HalfSpace(),
            (at(*(0.5 + distances).tolist()), torch.ones(4).long()),
            TWO_SIDES,
            samples=20000,
            selection_samples=1000,
        )
        assert (found.radius < distances).all()
        assert (found.radius > distances - 0.12 * SIGMA).all()
        assert (found.radius_lipschitz < found.radius).all()
        assert (found.radius_lipschitz > 0.3 * found.radius).all()

    def test_far_away_it_grows_with_the_samples(self):
        radii = [
            certified(HalfSpace(), (at(0.95), torch.ones(1).long()), TWO_SIDES, samples=n).radius.item()
            for n in (100, 4000)
        ]
        assert radii[0] == pytest.approx(SIGMA * PHI.inv_cdf((0.001 / (2 * 2 * 16)) ** (1 / 100)))
        assert radii[0] < radii[1] < 0.45

    def test_beyond_the_plane_nothing_is_certified(self):
        found = certified(HalfSpace(), (at(0.3, 0.45, 0.5), torch.ones(3).long()), TWO_SIDES)
        assert found.radius.tolist() == found.radius_lipschitz.tolist() == [0, 0, 0]
        assert found.right.tolist()[:2] == [False, False]

    def test_a_query_near_the_plane_is_abstained_from(self):
        found = certified(HalfSpace(), (at(0.503, 0.7), torch.ones(2).long()), TWO_SIDES)
        assert found.right.tolist() == [True, True]
        assert (found.radius > 0).tolist() == [False, True]
        assert (found.smoothed_recall_at_1, found.recall_at_1(), found.abstained) == (1, 0.5, 0.5)

    def test_the_radius_is_too_large_at_most_as_often_as_alpha_says(self):
        queries = at(*[0.5 + 0.5 * SIGMA] * 150), torch.ones(150).long()
        found = certified(HalfSpace(), queries, TWO_SIDES, samples=100, selection_samples=50, alpha=0.5)
        assert (found.radius > 0.5 * SIGMA).double().mean() <= 0.5
        assert (found.radius > 0).any()


def by_hand(model, queries, query, found):
    """Radius and radius by the Lipschitz constant of one query among the others, pair by pair."""
    images, labels = queries
    with torch.no_grad(), random_stream(found.seed, query):
        first, second = (
            normalize(model(images[[query] * count] + found.sigma * torch.randn(count, *images.shape[1:])).double())
            for count in (found.selection_samples, found.samples)
        )
    right = [found.items[j] for j in range(len(labels)) if labels[j] == labels[query] and j != query]
    wrong = [found.items[j] for j in range(len(labels)) if labels[j] != labels[query]]
    risk = found.alpha / len(wrong) / 2
    radii, lipschitz = [], []
    for n in wrong:
        leads = [(first @ (p - n)).tolist() for p in right]
        scores = [fmean(lead) / math.sqrt(variance(lead)) for lead in leads]
        p = right[scores.index(max(scores))]
        chosen, values = ((part @ (p - n) / (p - n).norm()).tolist() for part in (first, second))
        log = math.log(2 / risk)
        slack = math.sqrt(2 * variance(values) * log / len(values)) + 14 * log / 3 / (len(values) - 1)
        mean = fmean(values) - slack
        ordered = sorted(chosen)
        thresholds = [2 * ordered[0] - ordered[len(ordered) // 20]]
        thresholds += [ordered[int(PHI.cdf(-3 + 5.5 * i / 14) * len(ordered))] for i in range(15)]
        shares = [sum(value >= t for value in values) for t in thresholds]
        lows = binomial.rate_lower_bounds(torch.tensor(shares), len(values), risk / 16).tolist()
        low, high = 0.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            steps = [t - before for t, before in zip(thresholds, [-1, *thresholds], strict=False)]
            left = sum(step * PHI.cdf(PHI.inv_cdf(q) - middle) for step, q in zip(steps, lows, strict=True) if q > 0)
            low, high = (middle, high) if left > 1 else (low, middle)
        radii.append(found.sigma * max(low, PHI.inv_cdf((1 + mean) / 2), 0))
        lipschitz.append(found.sigma * max(0, mean) * math.sqrt(math.pi / 2))
    return min(radii), min(lipschitz)


class TestCertify:
    def test_equals_the_same_by_hand(self, batch):
        model, queries = batch
        found = certified(model, queries)
        assert (found.radius > 0).sum() >= 6
        for query in range(12):
            radius, lipschitz = by_hand(model, queries, query, found)
            assert found.radius[query].item() == pytest.approx(radius, abs=1e-6)
            assert found.radius_lipschitz[query].item() == pytest.approx(lipschitz, abs=1e-6)

    def test_smoothed_queries_are_right_as_far_as_the_samples_tell(self, batch):
        model, (images, labels) = batch
        labels = labels.clone()
        labels[:2] = torch.tensor([2, 0])  # two queries that are wrong now
        found = certified(model, (images, labels))
        for query in range(12):
            with torch.no_grad(), random_stream(0, query):
                torch.randn(300, 1, 4, 4)
                mean = normalize(model(images[[query] * 2000] + SIGMA * torch.randn(2000, 1, 4, 4))).mean(0).double()
            near = {j: float(found.items[j] @ mean) for j in range(12) if j != query}
            assert found.right[query] == (labels[max(near, key=near.get)] == labels[query])
        assert not found.right.all()
        assert (found.radius[~found.right] == 0).all()

    def test_uses_another_right_item_against_each_wrong_one(self):
        """A wrong item in the place of one right item is led by another one."""
        images, labels = at(0.8, 0.85, 0.2, 0.15), torch.tensor([1, 1, 1, 0])
        found = certified(HalfSpace(), (images[:1], labels[:1]), (images[1:], labels[1:]), gallery_samples=0)
        assert torch.equal(found.items[1], found.items[2])
        assert found.radius.item() > SIGMA

    def test_chooses_among_the_right_items_that_are_nearest(self, monkeypatch):
        monkeypatch.setattr(module, "_CANDIDATES", 1)
        items = at(0.2, 0.8, 0.2, 0.15), torch.tensor([1, 1, 1, 0])
        assert certified(HalfSpace(), (at(0.8), torch.ones(1).long()), items).radius.item() > SIGMA

    @pytest.mark.parametrize("block", [1, 5])
    def test_blocks_do_not_change_the_result(self, batch, block):
        whole, parts = (certified(*batch, samples=500, block=size) for size in (256, block))
        torch.testing.assert_close(parts.radius, whole.radius)
        torch.testing.assert_close(parts.radius_lipschitz, whole.radius_lipschitz)

    def test_a_model_that_seeds_the_random_numbers_does_not_repeat_the_noise(self, batch):
        model, queries = batch

        def seeding(images):
            torch.manual_seed(0)
            return model(images)

        found, expected = (certified(run, queries) for run in (seeding, model))
        assert torch.equal(found.radius, expected.radius)
        assert torch.equal(found.items, expected.items)
        assert "note: the model seeds the global random numbers of torch in each call" in str(found)
        assert json.loads(json.dumps(found.to_dict()))["notes"] == list(found.notes)
        assert expected.notes == ()
        assert "note" not in str(expected)

    def test_batch_size_changes_the_noise_alone(self, batch):
        whole, parts = certified(*batch), certified(*batch, batch_size=7)
        torch.testing.assert_close(parts.radius, whole.radius, atol=0.03, rtol=0)

    def test_memory_does_not_grow_with_queries_times_items(self):
        def largest(num_items):
            items = at(*torch.rand(num_items).tolist()), torch.arange(num_items) % 4
            with Largest() as seen:
                queries = items[0][:2], items[1][:2]
                certified(HalfSpace(), queries, items, samples=100, selection_samples=50, block=4, batch_size=64)
            return seen.numel

        assert largest(12) == largest(60) == 100 * 4

    def test_without_a_gallery_a_query_never_finds_itself(self):
        found = certified(HalfSpace(), (at(0.9, 0.1, 0.8, 0.2), torch.tensor([0, 0, 1, 1])))
        assert found.radius.tolist() == [0] * 4
        assert not found.right.any()

    def test_with_a_gallery_it_may_find_a_copy_of_itself(self):
        items = at(0.9, 0.1), torch.tensor([0, 1])
        assert (certified(HalfSpace(), items, items).radius > SIGMA).all()

    def test_takes_data_sets_and_normalised_inputs(self, batch):
        model, (images, labels) = batch
        data_set = ConcatDataset([TensorDataset(images, labels)])
        inside = nn.Sequential(Normalise(0.4, 0.3), model)
        found = certified(model, data_set, data_set, normalization=((0.4,), (0.3,)), samples=200)
        torch.testing.assert_close(
            found.radius, certified(inside, (images, labels), (images, labels), samples=200).radius
        )
        assert (found.radius > 0).any()

    def test_shows_progress(self, capsys):
        certified(HalfSpace(), TWO_SIDES, samples=100, progress=True)
        assert "4/4" in capsys.readouterr().err

    def test_a_query_without_a_right_item_is_left_out(self):
        queries = at(0.9, 0.7, 0.1, 0.4), torch.tensor([1, 5, 0, 1])
        found = certified(HalfSpace(), queries, TWO_SIDES)
        assert found.has_right_item.tolist() == [True, False, True, True]
        assert found.recall_at_1() == found.smoothed_recall_at_1 == pytest.approx(2 / 3)
        assert (found.to_dict()["num_queries"], found.to_dict()["left_out"]) == (3, 1)

    def test_a_query_that_finds_no_wrong_item_is_right_at_all_radii(self):
        ignored = torch.zeros(4, 4, dtype=torch.bool)
        ignored[0] = TWO_SIDES[1] != TWO_SIDES[1][0]
        found = certified(HalfSpace(), TWO_SIDES, TWO_SIDES, ignore=ignored)
        assert found.right[0]
        assert found.radius[0] == found.radius_lipschitz[0] == math.inf
        assert found.radius[1:].isfinite().all()
        assert found.recall_at_1(100) == pytest.approx(1 / 4)

    def test_ties_count_against_the_query(self):
        """Right and wrong item coincide, on the side of the query."""
        items = at(0.9, 0.9, 0.1), torch.tensor([1, 0, 0])
        found = certified(HalfSpace(), (at(0.9), torch.tensor([1])), items)
        assert (found.radius.item(), found.radius_lipschitz.item(), found.right.item()) == (0, 0, False)

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_a_collapsed_model_certifies_nothing(self, value):
        class Collapsed(nn.Module):
            def forward(self, images):
                return images.flatten(1) * 0 + value

        images = torch.rand(6, 1, 2, 2)
        found = certified(Collapsed(), (images, torch.arange(6) % 2))
        assert found.radius.tolist() == found.radius_lipschitz.tolist() == [0] * 6
        assert found.smoothed_recall_at_1 == found.abstained == found.recall_at_1() == 0

    @pytest.mark.parametrize("gallery_samples", [0, 20])
    def test_own_items_by_their_images(self, gallery_samples):
        model, options = HalfSpace(), {"gallery_samples": gallery_samples}
        images, labels = at(0.9, 0.6, 0.55, 0.1), torch.tensor([1, 1, 0, 0])
        by_index = certified(model, (images, labels), (images, labels), own=range(4), **options)
        by_image = certified(model, (images, labels), (images, labels), own="same", **options)
        neither = certified(model, (images, labels), own="same", **options)
        for found in (by_image, neither):
            assert found.recall_at_1() == by_index.recall_at_1() < 1
        known = torch.randn(4, 2)
        with pytest.raises(InputError, match="own='same' compares images, and gallery has labels only"):
            certified(model, (images, labels), (None, labels), own="same", gallery_embeddings=known)

    def test_queries_that_find_their_own_image_are_said(self):
        model, labels = HalfSpace(), torch.tensor([1, 1, 0, -1])
        queries, gallery = (at(0.9, 0.6, 0.1), labels[:3]), (at(0.9, 0.6, 0.55, 0.1), labels)
        apart = certified(model, queries, (at(0.92, 0.62, 0.12, 0.3), torch.tensor([1, 1, 0, 0])))
        assert apart.notes == () == tuple(apart.to_dict()["notes"])
        junk = "1 items of the label -1 are junk: no query finds them"
        left_in = "2 of 3 queries find their own image in the gallery; own='same' leaves it out"
        left_out = "own='same': 2 of 3 queries have their image in the gallery, and do not find this item"
        for own, said in ((None, left_in), ("same", left_out)):
            found = certified(model, queries, gallery, own=own)
            assert found.notes == (junk, said)
            assert found.to_dict()["notes"] == [junk, said]
            assert str(found).splitlines()[-2:] == [f"note: {junk}", f"note: {said}"]
        by_index = certified(model, queries, gallery, own=[0, 1, -1])
        assert by_index.notes == (junk,)

    def test_queries_that_find_their_own_vector_are_said(self):
        vectors = HalfSpace(0.5, 9.0)(at(0.9, 0.6, 0.1))
        labels = torch.tensor([1, 0, 0])
        found = certified(HalfSpace(0.5, 9.0), (at(0.9, 0.3), labels[:2]), (None, labels), gallery_embeddings=vectors)
        assert found.notes == ("1 of 2 queries find their own image in the gallery; own='same' leaves it out",)

    def test_noise_comes_last_and_is_not_clamped(self):
        seen = []

        class Watched(HalfSpace):
            def forward(self, images):
                assert not torch.is_grad_enabled()
                seen.append(images.flatten(1)[:, 3])
                return super().forward(images)

        images = at(0.9, 0.1)
        images[:, 0, 1, 1] = 1
        both = images, torch.tensor([0, 1])
        certified(Watched(), both, both, gallery_samples=0)
        noise = torch.cat([part for part in seen if len(part) > 2]) - 1  # the others are probes and the items
        assert len(noise) == 2 * (300 + 2000)
        assert noise.mean().abs() < 0.01
        assert noise.std().item() == pytest.approx(SIGMA, rel=0.05)

    @pytest.mark.parametrize("gallery_samples", [0, 8, 40])
    def test_items_are_normalised_means_of_noisy_copies(self, batch, gallery_samples):
        model, (images, _) = batch
        torch.manual_seed(3)
        found = smoothed_embeddings(model, images, SIGMA, gallery_samples, batch_size=500).detach()
        torch.manual_seed(3)
        noise = SIGMA * torch.randn(12, max(1, gallery_samples), 1, 4, 4) * (gallery_samples > 0)
        means = [normalize(model(images[i] + noise[i]).double()).mean(0) for i in range(12)]
        torch.testing.assert_close(found, normalize(torch.stack(means)).detach(), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("batch_size", [3, 8, 19])
    def test_items_of_any_batch_size_are_about_the_same(self, batch, batch_size):
        model, (images, _) = batch
        many = smoothed_embeddings(model, images, SIGMA, 400).detach()
        few = smoothed_embeddings(model, images, SIGMA, 400, batch_size=batch_size).detach()
        assert (many * few).sum(1).min() > 0.995

    def test_same_seed_same_answer(self, batch):
        first, again, other = (certified(*batch, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.radius, again.radius)
        assert torch.equal(first.items, again.items)
        assert not torch.equal(first.radius, other.radius)
        assert not torch.equal(first.items, other.items)

    def test_noise_of_each_query_is_its_own(self):
        queries = at(0.6, 0.6, 0.6), torch.ones(3).long()
        assert len(set(certified(HalfSpace(), queries, TWO_SIDES).radius_lipschitz.tolist())) == 3

    @pytest.mark.parametrize("broken", [False, True])
    def test_leaves_no_trace(self, moody_model, images, labels, broken):
        state, numbers = torch.get_rng_state(), random.getstate()
        running = moody_model[1].running_mean.clone()
        moody_model[2].eval()
        if broken:
            calls = []
            handle = moody_model.register_forward_hook(
                lambda *_: calls.append(1) or (1 / 0 if len(calls) > 2 else None)
            )
            with pytest.raises(ZeroDivisionError):
                certified(moody_model, (images, labels), samples=100)
            handle.remove()
        else:
            certified(moody_model, (images, labels), samples=100)
        assert torch.equal(torch.get_rng_state(), state)
        assert random.getstate() == numbers
        assert torch.equal(moody_model[1].running_mean, running)
        assert [m.training for m in moody_model] == [True, True, False, True, True, True]
        assert all(p.requires_grad and p.grad is None for p in moody_model.parameters())

    def test_runs_in_eval_mode(self, moody_model, images, labels):
        first = certified(moody_model, (images, labels), samples=100, gallery_samples=0)
        clean = normalize(moody_model.eval()(images).double()).detach()
        torch.testing.assert_close(first.items, clean, atol=1e-6, rtol=0)


class Normalise(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, images):
        return (images - self.mean) / self.std


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.numel = max(self.numel, *(part.numel() for part in made if isinstance(part, torch.Tensor)), 0)
        return result


def attack(model, items, right, image, sigma, norm, restarts=3, steps=25, copies=128):
    """The perturbation of an l2 norm that most favours wrong items, by ascent through the noise; the smoothed model is
    known, and each step sees noise of its own."""
    candidates = []
    for _ in range(restarts):
        change = normalize(torch.randn(1, image.numel())).reshape(image.shape) * norm * torch.rand(())
        for step in range(steps):
            change.requires_grad_()
            (gradient,) = torch.autograd.grad(lead(model, items, right, image + change, sigma, copies), change)
            length = norm * (1 + math.cos(math.pi * step / steps)) / 2
            change = change.detach() - length * gradient / gradient.norm().clamp(min=1e-12)
            change = change * (norm / change.norm().clamp(min=norm))
        with torch.no_grad():
            candidates.append((lead(model, items, right, image + change, sigma, 4000).item(), change))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def lead(model, items, right, image, sigma, copies):
    """How much nearer the nearest right item is to the smoothed embedding than the nearest wrong one."""
    noise = sigma * torch.randn(copies, *image.shape)
    similarities = items @ normalize(model(image + noise).double()).mean(0)
    return similarities[right].max() - similarities[~right].max()


class TestAgainstAttacks:
    @pytest.mark.slow
    def test_no_attack_within_the_radius_breaks_a_query(self, batch):
        model, (images, labels) = batch
        found = certified(model, (images, labels), samples=10000)
        wanted = (found.radius > 0).nonzero().flatten().tolist()
        assert len(wanted) >= 9
        broken = 0
        for query in wanted:
            keep = torch.arange(12) != query
            items, right = found.items[keep], labels[keep] == labels[query]
            for factor in (0.999, 6):
                norm = factor * found.radius[query].item()
                change = attack(model, items, right, images[query], SIGMA, norm)
                assert change.norm() <= norm * 1.0001
                with torch.no_grad():
                    left = lead(model, items, right, images[query] + change, SIGMA, 50000)
                if factor < 1:
                    assert left > 0
                else:
                    broken += int(left < 0)
        assert broken >= 3  # the attack is one

    def test_where_the_bound_is_tight_an_attack_just_beyond_it_breaks_the_query(self):
        model, distance = HalfSpace(steepness=200), SIGMA
        found = certified(
            model,
            (at(0.5 + distance), torch.ones(1).long()),
            TWO_SIDES,
            samples=20000,
            selection_samples=1000,
            gallery_samples=0,
        )
        radius = found.radius.item()
        assert 0.9 * distance < radius < distance
        right = TWO_SIDES[1] == 1
        for factor, stands in ((0.999, True), (1.15, False)):
            change = attack(model, found.items, right, at(0.5 + distance)[0], SIGMA, factor * radius, copies=1000)
            with torch.no_grad():
                left = lead(model, found.items, right, at(0.5 + distance)[0] + change, SIGMA, 200000)
            assert (left > 0) == stands


class TestCertificate:
    @pytest.fixture
    def found(self):
        queries = at(*torch.linspace(0.45, 0.89, 40).tolist(), 0.89), torch.tensor([1] * 40 + [7])
        return certified(HalfSpace(), queries, TWO_SIDES, samples=500, selection_samples=100, radii=[0.2, 0, 0.1])

    def test_recall_is_the_share_beyond_the_radius(self, found):
        for radius in (0, 0.1, 0.2):
            beyond = [
                r > radius
                for r, has_right_item in zip(found.radius, found.has_right_item, strict=True)
                if has_right_item
            ]
            assert found.recall_at_1(radius) == sum(beyond) / 40
        assert found.recall_at_1(found.radius.max().item()) == 0
        assert found.radii == (0, 0.1, 0.2)

    def test_lower_bound_takes_the_binomial_quantile_off_and_is_never_negative(self, found):
        off = stats.binom.isf(0.001, 40, 0.001) / 40
        assert found.recall_at_1_lower_bound(0.1) == pytest.approx(found.recall_at_1(0.1) - off)
        assert off > 0
        assert found.recall_at_1_lower_bound(3) == 0
        with pytest.raises(InputError, match="beta"):
            found.recall_at_1_lower_bound(0.1, beta=0)

    def test_goes_through_json(self, found):
        data = json.loads(json.dumps(found.to_dict()))
        assert data["radius"] == found.radius.tolist()
        assert data["sigma"] == SIGMA
        assert [row["radius"] for row in data["certified"]] == [0, 0.1, 0.2]
        for row in data["certified"]:
            assert row["recall_at_1"] == found.recall_at_1(row["radius"])
            assert row["recall_at_1_lower_bound"] == found.recall_at_1_lower_bound(row["radius"])
            beyond = found.radius_lipschitz[found.has_right_item] > row["radius"]
            assert row["recall_at_1_lipschitz"] == pytest.approx(beyond.double().mean().item())

    def test_prints_a_table(self, found):
        lines = str(found).splitlines()
        assert "40 queries (1 left out), 500 samples" in lines[0]
        assert len(lines) == 3 + 3
        assert lines[4].split()[:3] == [
            "0.1",
            f"{found.recall_at_1(0.1):.3f}",
            f"{found.recall_at_1_lower_bound(0.1):.3f}",
        ]
        assert max(map(len, lines)) <= 120


class TestErrors:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"sigma": 0}, "sigma=0"),
            ({"sigma": -1.0}, "sigma=-1"),
            ({"sigma": math.nan}, "sigma=nan"),
            ({"sigma": math.inf}, "sigma=inf"),
            ({"radii": []}, "radii"),
            ({"radii": [0.1, -0.1]}, "radii"),
            ({"radii": [math.nan]}, "radii"),
            ({"alpha": 0}, "alpha=0"),
            ({"alpha": 1}, "alpha=1"),
            ({"samples": 2.5}, "samples=2.5"),
            ({"samples": 10}, "at least 16 are needed"),
            ({"samples": 100, "alpha": 1e-40}, "samples=100 certify nothing"),
            ({"selection_samples": 1}, "selection_samples=1"),
            ({"gallery_samples": -1}, "gallery_samples=-1"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"block": 0}, "block=0"),
        ],
    )
    def test_settings(self, changed, message):
        with pytest.raises(InputError, match=message):
            certified(HalfSpace(), TWO_SIDES, **changed)

    def test_as_many_samples_as_it_asks_for_can_certify(self):
        queries = at(0.95), torch.ones(1).long()
        with pytest.raises(InputError, match="at least 16"):
            certified(HalfSpace(), queries, TWO_SIDES, samples=15)
        assert certified(HalfSpace(), queries, TWO_SIDES, samples=16).radius.item() > 0

    @pytest.mark.parametrize(
        ("queries", "message"),
        [
            ((TWO_SIDES[0].mul(255).long(), TWO_SIDES[1]), "int64"),
            ((TWO_SIDES[0] * 255, TWO_SIDES[1]), "expected pixels in"),
            ((TWO_SIDES[0] * math.nan, TWO_SIDES[1]), "NaN"),
            ((TWO_SIDES[0], TWO_SIDES[1][:3]), r"of shape \(3,\) for 4 images"),
            ((TWO_SIDES[0], TWO_SIDES[1][:, None]), r"of shape \(4, 1\) for 4 images"),
            ((TWO_SIDES[0][:0], TWO_SIDES[1][:0]), "queries holds no images"),
            ((TWO_SIDES[0], torch.ones(4).long()), "two or more"),
            ((TWO_SIDES[0], torch.arange(4)), "No query has a right item"),
            ((TWO_SIDES[0], [1.0, 1, 0, 0]), "whole number"),
            (TWO_SIDES[0], r"Tensor; expected \(images, labels\) or a data set"),
        ],
    )
    def test_images_and_labels(self, queries, message):
        with pytest.raises(InputError, match=message):
            certified(HalfSpace(), queries)

    def test_a_gallery_of_other_classes(self):
        with pytest.raises(InputError, match="No query has a right item"):
            certified(HalfSpace(), (at(0.9), torch.tensor([3])), TWO_SIDES)
        with pytest.raises(InputError, match="gallery has labels"):
            certified(HalfSpace(), TWO_SIDES, (TWO_SIDES[0], TWO_SIDES[1][:2]))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda e: e * math.nan, "NaN or infinite"),
            (lambda e: e[:, 0], "returned"),
            (lambda e: e[:1], r"expected embeddings \(\d+, D\)"),
            (lambda e: [e], "returned list"),
        ],
    )
    def test_models(self, change, message):
        class Odd(HalfSpace):
            def forward(self, images):
                return change(super().forward(images))

        with pytest.raises(InputError, match=message):
            certified(Odd(), TWO_SIDES)
