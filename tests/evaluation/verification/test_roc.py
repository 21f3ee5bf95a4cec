"""Rates at thresholds, against loops over all thresholds and against scikit-learn."""

import itertools
import math

import numpy
import pytest
import torch
from scipy.stats import binomtest, mannwhitneyu, norm
from sklearn.metrics import roc_auc_score, roc_curve
from some_pairs import rates_by_loops

from pml_adversarial.evaluation.verification.roc import ROC, PairScores, Rate


def drawn(genuine=30, impostors=41, shift=1.0, seed=0, digits=None):
    """Similarities; with few digits, many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(genuine + impostors, generator=generator, dtype=torch.float64)
    scores[:genuine] += shift
    scores = scores if digits is None else scores.round(decimals=digits)
    return scores[:genuine], scores[genuine:]


def both(genuine, impostors):
    """Similarities and whether they are genuine, in lists."""
    return [*genuine.tolist(), *impostors.tolist()], [True] * len(genuine) + [False] * len(impostors)


def thresholds_between(genuine, impostors, tie=0.0):
    """One on each step, and one between all neighbouring steps."""
    steps = sorted({*genuine.tolist(), *(value + tie for value in impostors.tolist())})
    between = [(low + high) / 2 for low, high in itertools.pairwise(steps)]
    return sorted([*steps, *between, steps[0] - 1, steps[-1] + 1])


SOME = [drawn(), drawn(5, 200, 2.0, 1), drawn(200, 5, -0.5, 2), drawn(40, 40, 1.0, 3, 1), drawn(60, 30, 0.5, 4, 0)]
some = pytest.mark.parametrize(("genuine", "impostors"), SOME)


class TestRate:
    @pytest.mark.parametrize(("count", "total"), [(0, 1), (1, 1), (3, 17), (0, 50), (50, 50), (999, 1000)])
    def test_interval_is_clopper_pearson(self, count, total):
        found, exact = Rate.of(count, total), binomtest(count, total).proportion_ci(0.95, "exact")
        assert (found.count, found.total, found.rate) == (count, total, count / total)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)

    def test_of_no_pairs_nothing_is_known(self):
        assert Rate.of(0, 0) == Rate(0, 0, None, 0.0, 1.0)


class TestPairScores:
    def test_accepted_from_the_threshold_on_and_impostors_within_rounding(self):
        same = torch.tensor([True, True, True, False, False, False])
        similarities = torch.tensor([0.5, 0.5 - 1e-9, 0.6, 0.5, 0.5 - 0.9e-6, 0.5 - 1.1e-6], dtype=torch.float64)
        scores = PairScores(similarities, same, 1e-6)
        assert scores.accepted(0.5).tolist() == [True, False, True, True, True, False]

    def test_some_of_them(self):
        scores = PairScores(torch.arange(4.0), torch.tensor([True, False, True, False]), 0.5)
        part = scores[torch.tensor([3, 0])]
        assert (part.similarities.tolist(), part.same.tolist(), part.tie) == ([3, 0], [False, True], 0.5)


class TestCurve:
    @some
    @pytest.mark.parametrize("tie", [0.0, 0.3])
    def test_by_loops(self, genuine, impostors, tie):
        similarities, same = both(genuine, impostors)
        roc = PairScores(torch.tensor(similarities, dtype=torch.float64), torch.tensor(same), tie).roc()
        thresholds, far, tar = roc.curve()
        assert thresholds[0] == math.inf
        assert thresholds.tolist() == sorted(thresholds.tolist(), reverse=True)
        for threshold, accepted, true in zip(thresholds.tolist(), far.tolist(), tar.tolist(), strict=True):
            assert (true, accepted) == pytest.approx(rates_by_loops(similarities, same, threshold, tie), abs=1e-12)
        for threshold in thresholds_between(genuine, impostors, tie):
            wanted = rates_by_loops(similarities, same, threshold, tie)
            assert (roc.tar(threshold).rate, roc.far(threshold).rate) == pytest.approx(wanted, abs=1e-12)

    @some
    def test_is_that_of_scikit_learn(self, genuine, impostors):
        similarities, same = both(genuine, impostors)
        far, tar, thresholds = roc_curve(same, similarities, drop_intermediate=False)
        for found, wanted in zip(ROC(genuine, impostors).curve(), (thresholds, far, tar), strict=True):
            numpy.testing.assert_allclose(found[1:].numpy(), wanted[1:], atol=1e-12)

    def test_area_is_that_of_scikit_learn_where_nothing_ties(self):
        genuine, impostors = drawn()
        similarities, same = both(genuine, impostors)
        assert ROC(genuine, impostors).auc == pytest.approx(roc_auc_score(same, similarities), abs=1e-12)

    @some
    @pytest.mark.parametrize("tie", [0.0, 0.3])
    def test_area_by_loops(self, genuine, impostors, tie):
        higher = sum(g > i + tie for g in genuine.tolist() for i in impostors.tolist())
        assert ROC(genuine, impostors, tie).auc == pytest.approx(higher / (len(genuine) * len(impostors)), abs=1e-12)

    @some
    def test_accuracy_by_loops(self, genuine, impostors):
        right = sum(g >= 0.4 for g in genuine.tolist()) + sum(i < 0.4 for i in impostors.tolist())
        found = ROC(genuine, impostors).accuracy(0.4)
        assert (found.count, found.total) == (right, len(genuine) + len(impostors))


class TestReversed:
    @pytest.mark.parametrize(("genuine", "impostors"), [(30, 41), (8, 200), (300, 12)])
    @pytest.mark.parametrize("digits", [None, 0])
    def test_is_the_test_of_mann_and_whitney(self, genuine, impostors, digits):
        found = []
        for seed in range(60):
            one, other = drawn(genuine, impostors, -seed / 40, seed, digits)
            p_value = mannwhitneyu(one, other, alternative="less", method="asymptotic", use_continuity=False).pvalue
            found.append(ROC(one, other, 1e-9).is_reversed)
            if digits is None:
                assert found[-1] == (p_value < norm.cdf(-3.09))
            else:  # equal similarities make the exact deviation smaller
                assert p_value < 0.001 or not found[-1]
        assert {True, False} == set(found)

    def test_equal_similarities_are_no_evidence(self):
        assert not ROC(torch.ones(500), torch.ones(500), 0.1).is_reversed


class TestThresholdAt:
    @some
    @pytest.mark.parametrize("far", [0.5, 0.21, 0.1, 0.03])
    @pytest.mark.parametrize("tie", [0.0, 0.3])
    def test_no_lower_threshold_holds_the_rate(self, genuine, impostors, far, tie):
        roc, (similarities, same) = ROC(genuine, impostors, tie), both(genuine, impostors)
        found = roc.threshold_at(far)
        if far < 1 / len(impostors):
            assert found is None
            return
        assert rates_by_loops(similarities, same, found, tie)[1] <= far
        assert rates_by_loops(similarities, same, math.nextafter(found, -math.inf), tie)[1] > far

    @some
    @pytest.mark.parametrize("far", [0.5, 0.21, 0.1, 0.03])
    def test_true_accept_rate_is_the_highest_of_scikit_learn(self, genuine, impostors, far):
        if far < 1 / len(impostors):
            return
        similarities, same = both(genuine, impostors)
        accepted, true, _ = roc_curve(same, similarities, drop_intermediate=False)
        roc = ROC(genuine, impostors)
        assert roc.tar(roc.threshold_at(far)).rate == pytest.approx(true[accepted <= far + 1e-12].max(), abs=1e-12)

    @pytest.mark.parametrize(("count", "far"), [(10, 0.1), (1000, 0.003), (3000, 0.001), (7, 1 / 7), (49, 3 / 49)])
    def test_a_rate_of_whole_pairs_allows_them_all(self, count, far):
        roc = ROC(torch.tensor([0.0]), torch.arange(count).double())
        assert roc.far(roc.threshold_at(far)).count == round(count * far)
        assert roc.threshold_at(0.99 / count) is None

    def test_equal_impostors_are_accepted_together_or_not_at_all(self):
        roc = ROC(torch.tensor([0.9]), torch.tensor([0.5] * 9 + [0.1]))
        assert roc.far(roc.threshold_at(0.5)).count == 0
        assert roc.far(roc.threshold_at(0.9)).count == 9

    def test_a_rate_near_one_still_refuses_the_lowest(self):
        roc = ROC(torch.tensor([0.9]), torch.arange(5.0))
        assert roc.far(roc.threshold_at(1 - 1e-12)).count == 4


class TestEqualErrorRate:
    @some
    @pytest.mark.parametrize("tie", [0.0, 0.3])
    def test_is_the_lowest_over_all_thresholds(self, genuine, impostors, tie):
        similarities, same = both(genuine, impostors)
        found = ROC(genuine, impostors, tie).equal_error_rate
        errors = []
        for threshold in thresholds_between(genuine, impostors, tie):
            tar, far = rates_by_loops(similarities, same, threshold, tie)
            errors.append(max(1 - tar, far))
        assert found.rate == pytest.approx(min(errors), abs=1e-12)
        tar, far = rates_by_loops(similarities, same, found.threshold, tie)
        assert max(1 - tar, far) == pytest.approx(found.rate, abs=1e-12)
        assert found.low <= found.rate <= found.high

    @pytest.mark.parametrize("seed", range(5))
    def test_is_near_that_of_scikit_learn(self, seed):
        genuine, impostors = drawn(300, 300, 1.0, seed)
        similarities, same = both(genuine, impostors)
        far, tar, _ = roc_curve(same, similarities, drop_intermediate=False)
        crossing = numpy.argmin(numpy.abs(far - (1 - tar)))
        wanted = (far[crossing] + 1 - tar[crossing]) / 2
        assert ROC(genuine, impostors).equal_error_rate.rate == pytest.approx(wanted, abs=1 / 300)

    def test_threshold_is_in_the_middle_of_the_gap(self):
        found = ROC(torch.tensor([0.8, 0.9]), torch.tensor([0.1, 0.2])).equal_error_rate
        assert (found.rate, found.threshold) == (0, pytest.approx(0.5))

    def test_of_equal_similarities_all_are_wrong(self):
        roc = ROC(torch.full((5,), 0.7), torch.full((8,), 0.7))
        assert (roc.equal_error_rate.rate, roc.auc) == (1, 0)
        assert roc.tar(roc.threshold_at(0.5)).count == 0

    def test_similarities_that_differ_by_rounding_are_equal(self):
        noise = torch.rand(20, generator=torch.Generator().manual_seed(0)).double() * 5e-7
        assert ROC(0.7 + noise[:10], 0.7 + noise[10:], 1e-6).equal_error_rate.rate == 1
        assert ROC(0.7 + noise[:10], 0.7 + noise[10:]).equal_error_rate.rate < 1

    def test_of_neighbouring_numbers(self):
        low = 0.5
        high = math.nextafter(low, 1)
        found = ROC(torch.tensor([high], dtype=torch.float64), torch.tensor([low], dtype=torch.float64))
        assert found.equal_error_rate.threshold == high

    @pytest.mark.parametrize(("genuine", "impostors"), [(6, 90), (40, 60), (90, 6)])
    def test_interval_covers_the_true_rate(self, genuine, impostors):
        true = norm.cdf(-0.5)  # of two normal distributions that are 1 apart
        found = [ROC(*drawn(genuine, impostors, 1.0, seed)).equal_error_rate for seed in range(200)]
        assert sum(rate.low <= true <= rate.high for rate in found) >= 190
        assert sum(rate.high - rate.low for rate in found) / 200 < 0.9
