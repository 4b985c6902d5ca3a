"""Bootstrap of groups: what it covers on data whose truth is known, and what it refuses."""

import math

import numpy as np
import pytest

from ternax import resample
from ternax.estimate import wilson


def test_coverage_of_a_ratio_over_unequal_alike_groups():
    """24 groups of 2 to 30 members, a skewed effect each."""
    random = np.random.default_rng(7)
    truth, trials, covered, alone = 3.0, 300, 0, 0
    for _ in range(trials):
        sizes = random.integers(2, 31, 24)
        groups = np.repeat(np.arange(24), sizes)
        effect = random.gamma(4.0, 0.25, 24)  # mean 1
        weights = random.uniform(50, 150, len(groups))
        values = weights * (2 + effect[groups]) + random.normal(size=len(groups)) * 20
        found = resample.bootstrap_ratio(values, weights, groups=groups, resamples=1000)
        covered += found.low <= truth <= found.high
        found = resample.bootstrap_ratio(values, weights, resamples=500)
        alone += found.low <= truth <= found.high
    assert 0.92 <= covered / trials <= 0.98
    assert alone / trials < 0.8, "the data does not tell groups from single members"


def test_coverage_of_a_share_whose_trials_are_alike():
    random = np.random.default_rng(3)
    trials, covered = 400, 0
    for _ in range(trials):
        rates = random.beta(8, 2, 20)  # mean 0.8
        found = resample.clustered_share(random.binomial(100, rates), np.full(20, 100))
        covered += found.low <= 0.8 <= found.high
    assert 0.91 <= covered / trials <= 0.98


def test_value_is_the_ratio_of_sums_and_groups_only_widen():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 5)
    values, weights = random.normal(size=10)[groups] + 5, random.uniform(1, 2, 50)
    alike = resample.bootstrap_ratio(values * weights, weights, groups=groups)
    alone = resample.bootstrap_ratio(values * weights, weights)
    expected = pytest.approx(np.average(values, weights=weights))
    assert alike.value == expected and alone.value == expected
    assert alike.low < alone.low < alone.value < alone.high < alike.high
    assert (alike.count, alone.count) == (10, 50)


def test_a_mean_of_normal_values_has_nearly_the_t_interval():
    from ternax.estimate import t_interval

    values = np.random.default_rng(5).normal(2, 1, 60)
    found, expected = resample.bootstrap_mean(values), t_interval(values.tolist())
    assert found.value == pytest.approx(expected.value)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.04)


def test_the_same_arguments_give_the_same_interval():
    values = np.random.default_rng(1).gamma(2, size=30)
    assert resample.bootstrap_mean(values) == resample.bootstrap_mean(values)
    assert resample.bootstrap_mean(values) != resample.bootstrap_mean(values, seed=1)


def test_few_groups_have_no_interval_and_equal_ones_a_point():
    few = resample.bootstrap_mean(np.arange(30.0), groups=np.repeat(np.arange(5), 6))
    assert (few.value, few.low, few.high, few.count) == (14.5, None, None, 5)
    assert resample.clustered_share([1, 2], [3, 3]).low is None
    equal = resample.bootstrap_ratio(np.full(20, 0.3), np.full(20, 0.1))
    assert equal.low == equal.high == equal.value == pytest.approx(3)


def test_a_share_of_all_still_has_an_interval():
    found = resample.clustered_share(np.full(10, 7), np.full(10, 7))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(wilson(1.0, 70)[0]) and found.low < 1


def test_independent_trials_keep_their_number():
    """Groups of one trial: the effective number is the true one, but for n/(n - 1)."""
    outcomes = np.random.default_rng(2).random(500) < 0.3
    found = resample.clustered_share(outcomes, np.ones(500))
    low, high = wilson(outcomes.mean(), 500)
    assert math.isclose(found.low, low, rel_tol=1e-3) and math.isclose(
        found.high, high, rel_tol=1e-3
    )


@pytest.mark.parametrize("denominators", [[1.0, 0.0], [1.0, -1.0]])
def test_what_no_ratio_is_taken_of_is_refused(denominators):
    with pytest.raises(ValueError, match="above zero"):
        resample.bootstrap_ratio([1.0, 2.0], denominators)
    with pytest.raises(ValueError, match="above zero"):
        resample.bootstrap_mean([])
