import math

import pytest
import torch
from scipy import stats

from pml_adversarial.evaluation import binomial


class TestTail:
    @pytest.mark.parametrize(
        ("count", "total", "rate"), [(0, 5, 0.3), (1, 5, 0.3), (3, 9, 0.01), (64, 64, 0.9), (7, 7, 0.5)]
    )
    def test_is_the_sum_of_the_probabilities(self, count, total, rate):
        tail = sum(math.comb(total, k) * rate**k * (1 - rate) ** (total - k) for k in range(count, total + 1))
        assert binomial.tail(count, total, rate) == pytest.approx(tail, rel=1e-9)

    def test_of_many(self):
        assert binomial.tail(10_500, 20_000, 0.5) == pytest.approx(7.9e-13, rel=0.05)
        assert binomial.tail(9_000, 20_000, 0.5) == pytest.approx(1)


class TestUpperQuantile:
    @pytest.mark.parametrize("total", [1, 2, 7, 40, 300])
    @pytest.mark.parametrize("rate", [0.001, 0.02, 0.3, 0.9])
    @pytest.mark.parametrize("risk", [0.0005, 0.013, 0.4])
    def test_is_the_smallest_number_that_is_seldom_exceeded(self, total, rate, risk):
        left, expected = 1.0, total
        for count in range(total + 1):
            left -= math.comb(total, count) * rate**count * (1 - rate) ** (total - count)
            if left <= risk:
                expected = count
                break
        assert binomial.upper_quantile(total, rate, risk) == expected


class TestRateLowerBounds:
    def test_is_clopper_pearson(self):
        successes = torch.arange(1, 1000)
        exact = torch.from_numpy(stats.beta.ppf(1e-4, successes.numpy(), 1001 - successes.numpy()))
        torch.testing.assert_close(binomial.rate_lower_bounds(successes, 1000, 1e-4), exact, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("total", [20, 1000])
    def test_as_many_successes_at_the_bound_have_the_probability_of_the_risk(self, total):
        for successes in (1, total // 3, total - 1, total):
            bound = binomial.rate_lower_bounds(torch.tensor(successes), total, 0.01).item()
            assert binomial.tail(successes, total, bound) == pytest.approx(0.01, rel=1e-6)

    def test_of_all_and_of_none(self):
        all_of_them, none = binomial.rate_lower_bounds(torch.tensor([500, 0]), 500, 1e-5).tolist()
        assert all_of_them == pytest.approx(1e-5 ** (1 / 500))
        assert none == 0

    def test_is_above_chernoffs_bound(self):
        successes = torch.arange(1, 41)
        for count, bound in zip(
            successes.tolist(), binomial.rate_lower_bounds(successes, 40, 0.01).tolist(), strict=True
        ):
            share = count / 40
            divergence = share * math.log(share / bound)
            divergence += (1 - share) * math.log((1 - share) / (1 - bound)) if share < 1 else 0
            assert divergence <= math.log(1 / 0.01) / 40 * (1 + 1e-9)
            assert bound < share

    @pytest.mark.parametrize("rate", [0.05, 0.5, 0.97])
    def test_is_false_at_most_as_often_as_it_says(self, rate):
        hits = (torch.rand(200, 20000, generator=torch.Generator().manual_seed(0)) < rate).sum(0)
        false = (binomial.rate_lower_bounds(hits, 200, 0.2) > rate).double().mean()
        assert 0 < false <= 0.2

    def test_keeps_the_shape(self):
        assert binomial.rate_lower_bounds(torch.ones(3, 4, dtype=torch.long), 9, 0.1).shape == (3, 4)
