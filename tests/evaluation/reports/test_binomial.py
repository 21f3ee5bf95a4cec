import math

import pytest
import torch
from scipy import stats

from pml_adversarial.evaluation.reports import binomial


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


class TestRateInterval:
    @pytest.mark.parametrize("total", [1, 2, 7, 100, 60_502])
    @pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
    def test_is_clopper_pearson(self, total, confidence):
        for successes in {0, 1, total // 3, total - 1, total}:
            theirs = stats.binomtest(successes, total).proportion_ci(confidence, method="exact")
            found = binomial.rate_interval(successes, total, confidence)
            assert tuple(found) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize(("successes", "total"), [(0, 9), (4, 9), (9, 9)])
    def test_at_its_ends_what_was_found_has_the_probability_that_it_may_have(self, successes, total):
        def probability(counts, rate):
            return sum(math.comb(total, k) * rate**k * (1 - rate) ** (total - k) for k in counts)

        low, high = binomial.rate_interval(successes, total)
        assert probability(range(successes, total + 1), low) == pytest.approx(0.025 if successes else 1, rel=1e-9)
        assert probability(range(successes + 1), high) == pytest.approx(0.025 if successes < total else 1, rel=1e-9)

    @pytest.mark.parametrize("rate", [0.01, 0.3, 0.98])
    def test_holds_the_true_rate_at_least_as_often_as_it_says(self, rate):
        """Over all counts that 40 trials can have, each with its probability."""
        held = 0.0
        for count in range(41):
            low, high = binomial.rate_interval(count, 40)
            held += math.comb(40, count) * rate**count * (1 - rate) ** (40 - count) * (low <= rate <= high)
        assert 0.95 <= held < 1


class TestMcNemar:
    def test_by_a_loop_over_all_ways_in_which_the_queries_may_fall(self):
        for total in range(13):
            for only_first in range(total + 1):
                ways = [math.comb(total, k) for k in range(total + 1)]
                as_rare = sum(way for way in ways if way <= ways[only_first])
                assert binomial.mcnemar(only_first, total - only_first) == pytest.approx(as_rare / 2**total, rel=1e-9)

    def test_many(self):
        assert binomial.mcnemar(5000, 5200) == binomial.mcnemar(5200, 5000) == pytest.approx(0.0487, abs=2e-3)


class TestPairedInterval:
    def test_published(self):
        """Bentur et al. (2009) in Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014): -0.517 to -0.026."""
        found = binomial.paired_interval(7, 1, 21)
        assert tuple(round(end, 3) for end in found) == (-0.517, -0.026)

    @pytest.mark.parametrize(
        ("first", "second", "total"), [(7, 1, 21), (0, 5, 40), (0, 0, 30), (12, 9, 21), (3, 3, 1000), (1, 0, 1)]
    )
    def test_its_ends_are_the_differences_that_the_score_test_just_does_not_reject(self, first, second, total):
        """The score statistic, with the likeliest rates of a given difference found by trying very many."""

        def statistic(delta):
            rates = torch.linspace(max(0.0, -delta), min(1.0, (1 - delta) / 2), 400_001, dtype=torch.float64)[1:-1]
            only_second, agree = rates + delta, 1 - 2 * rates - delta
            logs = first * rates.log() + second * only_second.log() + (total - first - second) * agree.log()
            likeliest = rates[logs.nan_to_num(-math.inf).argmax()].item()
            variance = (2 * likeliest + delta - delta**2) / total
            return ((second - first) / total - delta) ** 2 / variance

        limit = stats.norm.ppf(0.975) ** 2
        for end in binomial.paired_interval(first, second, total):
            if abs(end) < 1:
                assert statistic(end) == pytest.approx(limit, rel=2e-4)

    def test_is_mirrored_where_the_models_are_exchanged(self):
        for first, second in ((0, 0), (4, 9), (30, 0), (17, 13)):
            low, high = binomial.paired_interval(first, second, 30)
            assert tuple(binomial.paired_interval(second, first, 30)) == pytest.approx((-high, -low), abs=1e-9)
            assert -1 <= low <= (second - first) / 30 <= high <= 1
            assert low < high

    def test_without_a_difference_it_is_not_a_point(self):
        quantile = stats.norm.ppf(0.975) ** 2
        expected = quantile / (50 + quantile)
        assert tuple(binomial.paired_interval(0, 0, 50)) == pytest.approx((-expected, expected), abs=1e-9)

    @pytest.mark.parametrize(("first", "second", "most"), [(0.1, 0.1, 0.97), (0.05, 0.2, 0.97), (0.02, 0.01, 0.999)])
    def test_holds_the_true_difference_about_as_often_as_it_says(self, first, second, most):
        """Over all counts of 60 queries, each with its probability."""
        held = 0.0
        for one in range(61):
            for other in range(61 - one):
                rest = 60 - one - other
                ways = math.comb(60, one) * math.comb(60 - one, other)
                weight = ways * first**one * second**other * (1 - first - second) ** rest
                if weight > 1e-7:
                    low, high = binomial.paired_interval(one, other, 60)
                    held += weight * (low <= second - first <= high)
        assert 0.93 < held < most


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
