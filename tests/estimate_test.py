"""Medians with order-statistic intervals, and weighted lines."""

import math
import statistics

import numpy as np
import pytest

from ternax import estimate


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_samples_have_no_interval(n):
    found = estimate.median(range(n))
    assert (found.value, found.low, found.high, found.count) == ((n - 1) / 2, None, None, n)


# The k of published tables of the sign test at 95 %, two-sided: the k-th from each end.
@pytest.mark.parametrize(
    "n, k", [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8), (50, 18)]
)
def test_interval_is_the_kth_from_each_end(n, k):
    shuffled = np.random.default_rng(n).permutation(np.arange(1, n + 1)).tolist()
    found = estimate.median(shuffled)
    assert (found.low, found.high) == (k, n + 1 - k)
    assert found.value == statistics.median(shuffled)


def test_order_statistics_keep_what_they_promise():
    """Exactly, from the binomial: at least 95 %, and one more would be less."""
    for n in range(6, 200):
        found = estimate.median(range(1, n + 1))
        missed = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n)]
        assert missed[found.low] <= 0.05 < missed[found.low + 1]


@pytest.mark.parametrize("n", [6, 11, 20])
def test_coverage_by_simulation(n):
    """Of a skewed distribution, whose mean is not its median."""
    draws = np.random.default_rng(0).lognormal(size=(4000, n))  # the true median is 1
    found = [estimate.median(row.tolist()) for row in draws]
    covered = np.mean([m.low <= 1 <= m.high for m in found])
    assert covered > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_a_higher_confidence_is_wider():
    assert estimate.median(range(20), confidence=0.99).low < estimate.median(range(20)).low
    assert estimate.median(range(6), confidence=0.99).low is None


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        estimate.median([])


def test_line_is_the_weighted_fit_of_numpy():
    random = np.random.default_rng(1)
    x = random.uniform(1, 50, 12)
    t = (3 + 0.7 * x) * random.uniform(0.9, 1.1, 12)
    found = estimate.line(x.tolist(), t.tolist())
    (slope, fixed), covariance = np.polyfit(x, t, 1, w=1 / t, cov=True)
    assert found.slope == pytest.approx(slope) and found.fixed == pytest.approx(fixed)
    errors = np.sqrt(np.diag(covariance))
    assert (found.slope_error, found.fixed_error) == pytest.approx(tuple(errors))
    assert found.worst_share == pytest.approx(np.max(np.abs(t - fixed - slope * x) / t))


def test_a_line_beyond_its_points_says_how_sure_it_is():
    """Against the full covariance of numpy's fit; two points leave no interval."""
    random = np.random.default_rng(3)
    x = np.array([4.0, 8, 10, 4, 8, 10])
    t = (3 + 2 * x) * (1 + 0.02 * random.standard_normal(6))
    fit = estimate.line(x.tolist(), t.tolist())
    (slope, fixed), covariance = np.polyfit(x, t, 1, w=1 / t, cov=True)
    found, row = fit.at(80), np.array([80, 1])
    assert found.value == pytest.approx(80 * slope + fixed)
    reach = estimate.t_quantile(4) * np.sqrt(row @ covariance @ row)
    assert (found.high - found.value, found.value - found.low) == pytest.approx((reach, reach))
    assert estimate.line([1, 3], [5, 9]).at(5) == estimate.Interval(13, None, None, 2)


def test_line_through_two_points_is_exact():
    found = estimate.line([1, 3], [5, 9])
    assert (found.fixed, found.slope) == pytest.approx((3, 2))
    assert found.fixed_error == found.slope_error == 0
    assert found.worst_share == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "x, t, why",
    [
        ([1], [2], "two different x"),
        ([2, 2], [1, 3], "two different x"),
        ([1, 2], [1], "as many x as t, found 2 and 1"),
        ([1, 2], [1, 0], "above zero, found 0"),
    ],
)
def test_what_no_line_goes_through_is_refused(x, t, why):
    with pytest.raises(ValueError, match=why):
        estimate.line(x, t)


# Published two-sided 95 % and 99 % points of Student's t.
@pytest.mark.parametrize(
    "degrees, at_95, at_99",
    [
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (4, 2.776, 4.604),
        (9, 2.262, 3.250),
        (10, 2.228, 3.169),
        (30, 2.042, 2.750),
        (120, 1.980, 2.617),
    ],
)
def test_student_quantiles_are_those_of_the_tables(degrees, at_95, at_99):
    assert estimate.t_quantile(degrees) == pytest.approx(at_95, abs=6e-4)
    assert estimate.t_quantile(degrees, 0.99) == pytest.approx(at_99, abs=6e-4)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_t_interval_covers_what_it_promises(n):
    draws = np.random.default_rng(n).normal(1, 2, size=(4000, n))
    found = [estimate.t_interval(row.tolist()) for row in draws]
    covered = np.mean([m.low <= 1 <= m.high for m in found])
    assert abs(covered - 0.95) < 3.5 * math.sqrt(0.05 * 0.95 / 4000)


def test_pairs_drop_what_they_share():
    shared = np.random.default_rng(0).normal(0, 100, 12)
    step = np.random.default_rng(1).normal(1, 0.1, 12)
    found = estimate.paired_difference((shared + step).tolist(), shared.tolist())
    assert found.value == pytest.approx(step.mean())
    assert found.high - found.low < 0.2
    with pytest.raises(ValueError, match="found 2 and 1"):
        estimate.paired_difference([1, 2], [1])


def test_one_value_has_a_mean_and_no_interval():
    found = estimate.t_interval([3.0])
    assert (found.value, found.low, found.high, found.count) == (3.0, None, None, 1)
    assert found.map(lambda x: 2 * x) == estimate.Interval(6.0, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        estimate.t_interval([])


@pytest.mark.parametrize(
    "share, count, low, high",
    # 0 and n of n: z^2 / (n + z^2); 8 of 10 as in Brown, Cai and DasGupta's tables.
    [(0.0, 10, 0, 0.27753), (1.0, 10, 0.72247, 1), (0.8, 10, 0.49016, 0.94331)],
)
def test_wilson(share, count, low, high):
    assert estimate.wilson(share, count) == pytest.approx((low, high), abs=1e-5)


def test_wilson_ends_solve_the_score_equation():
    for end in estimate.wilson(0.37, 53):
        score = (0.37 - end) / math.sqrt(end * (1 - end) / 53)
        assert abs(score) == pytest.approx(statistics.NormalDist().inv_cdf(0.975))


def test_what_is_no_share_is_refused():
    for share, count in ((1.1, 5), (-0.1, 5), (0.5, 0)):
        with pytest.raises(ValueError, match="expected a share"):
            estimate.wilson(share, count)
