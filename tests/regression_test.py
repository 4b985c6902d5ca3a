"""Regressions: coverage on made-up data, F tests against closed forms and other formulas."""

import math

import numpy as np
import pytest

from ternax import regression
from ternax.estimate import t_quantile

SIZES = np.repeat(np.arange(4.0), 6)
BUDGETS = np.tile([0.0, 2.0], 12)
DESIGN = np.column_stack([np.ones(24), SIZES - SIZES.mean(), BUDGETS - BUDGETS.mean()])


@pytest.mark.parametrize("n", [4, 24])  # one degree of freedom, and 21
def test_intervals_hold_the_truth_as_often_as_they_say(n):
    random, truth = np.random.default_rng(n), np.array([1.0, -0.3, 0.2])
    design = DESIGN if n == 24 else DESIGN[[0, 1, 18, 21]]
    held = 0
    for _ in range(2000):
        found = regression.fit(design, design @ truth + random.normal(0, 0.1, n))
        ends = [found.coefficient(i) for i in range(3)]
        held += sum(end.low <= b <= end.high for end, b in zip(ends, truth, strict=True))
    assert held / 6000 == pytest.approx(0.95, abs=0.01)


def test_a_line_is_numpys():
    y = np.random.default_rng(0).normal(size=24)
    (slope, level), covariance = np.polyfit(SIZES, y, 1, cov=True)
    found = regression.fit(np.column_stack([np.ones(24), SIZES]), y)
    assert found.coefficients == pytest.approx([level, slope])
    assert found.covariance == pytest.approx(covariance[::-1, ::-1])
    far = found.at([1, 10])  # beyond the points
    reach = t_quantile(22) * math.sqrt(np.array([10, 1]) @ covariance @ [10, 1])
    assert (far.value, far.high - far.value) == pytest.approx((level + 10 * slope, reach))


@pytest.mark.parametrize("design", [DESIGN[:3], DESIGN[:, [0, 0]]])
def test_too_few_points_are_refused(design):
    with pytest.raises(ValueError, match="a regression needs rank"):
        regression.fit(design, np.ones(len(design)))


def test_tails_of_f():
    """Against Student's t, and the closed forms with 2 degrees of freedom above or below."""
    for degrees in (1, 4, 21):
        assert regression.f_tail(t_quantile(degrees) ** 2, 1, degrees) == pytest.approx(
            0.05, rel=1e-4
        )
        for ratio in (0.3, 4.0, 90.0):
            above = (1 + 2 * ratio / degrees) ** (-degrees / 2)
            below = 1 - (degrees * ratio / (degrees * ratio + 2)) ** (degrees / 2)
            found = [regression.f_tail(ratio, *d) for d in ((2, degrees), (degrees, 2))]
            assert found == pytest.approx([above, below], rel=1e-4)


def test_one_response_is_the_usual_f_test():
    y = np.random.default_rng(1).normal(size=24)
    squares = [((y - d @ np.linalg.pinv(d) @ y) ** 2).sum() for d in (DESIGN[:, :1], DESIGN)]
    found = regression.nested(DESIGN, DESIGN[:, :1], y)
    ratio = (squares[0] - squares[1]) / 2 / (squares[1] / 21)
    assert found[:3] == pytest.approx((ratio, 2, 21))


def test_several_responses_are_hotellings_t():
    y = np.random.default_rng(2).normal(size=(24, 3)) @ [[1, 1, 0], [0, 1, 0], [0, 3, 1]]
    inverse = np.linalg.inv(DESIGN.T @ DESIGN)
    b = inverse @ DESIGN.T @ y
    error = y - DESIGN @ b
    squared = b[1] @ np.linalg.solve(error.T @ error / 21, b[1]) / inverse[1, 1]
    found = regression.nested(DESIGN, DESIGN[:, [0, 2]], y)
    assert found[:3] == pytest.approx((squared * (21 - 3 + 1) / (21 * 3), 3, 19))


@pytest.mark.parametrize("tested", [[0], [1], [1, 2]])
def test_equal_slopes_are_rejected_once_in_twenty(tested):
    """Three differences of one model are far from independent; different slopes are found."""
    random, part = np.random.default_rng(3), np.delete(DESIGN, tested, axis=1)
    mixed, p_values = np.array([[1.0, 0.9, 0.8], [0, 0.3, 0.1], [0, 0, 0.2]]), []
    for _ in range(1000):
        y = random.normal(size=(24, 3)) @ mixed
        p_values.append(regression.nested(DESIGN, part, y).p_value)
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.022)
    apart = y + DESIGN[:, tested[-1:]] * [0, 1.0, 0]
    assert regression.nested(DESIGN, part, apart).p_value < 0.001


def test_what_cannot_be_tested_is_none():
    y = np.random.default_rng(4).normal(size=(24, 30))
    assert regression.nested(DESIGN, DESIGN[:, :2], y) is None  # more responses than models
    assert regression.nested(DESIGN, DESIGN[:, :2], y[:, [0, 0]]) is None  # one twice
    assert regression.nested(DESIGN, DESIGN[:, :2], np.zeros(24)) is None
    assert regression.nested(DESIGN, DESIGN, y[:, 0]) is None  # nothing to test
