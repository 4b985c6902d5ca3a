"""From small rises to large ones, back to strengths, and what error correction leaves."""

import numpy as np
import pytest

from ternax import noise_forecast
from ternax.noise import make_noise
from ternax.noise_forecast import Forecast, before_secded, behind_secded, curved
from ternax.response import Response, Weights


def answering(cost: float) -> Response:
    """A projection whose every trit of any value costs `cost` for a variance of one."""
    each = {"element": np.diag([cost, cost, cost])}
    zero = np.zeros((1, 3))
    return Response({"layers.0.mlp.up": Weights(4, 0.5, np.zeros(3), zero, each, zero)}, {})


def test_a_curve_agrees_at_zero_and_where_it_was_measured():
    curve = ((0.1, 0.11), (0.2, 0.3))
    assert curved(curve, 0.1) == pytest.approx(0.11) and curved(curve, 0.2) == pytest.approx(0.3)
    assert curved(curve, 1e-6) == pytest.approx(1e-6, rel=1e-4)
    assert 0.11 < curved(curve, 0.15) < 0.3 and curved(curve, 0.21) is None
    assert curved((), 0.1) is None


def test_the_largest_strength_costs_the_loss():
    forecast = Forecast(answering(0.5), ((1.0, 1.0),))
    names = ["layers.0.mlp.up"]

    def at(rate):
        return make_noise("trit_other", strength=rate)

    found = forecast.largest(at, names, 0.05, 0.2)
    assert forecast.rise(at(found), names) == pytest.approx(0.05, rel=0.01)
    assert forecast.largest(at, names, 10.0, 0.2) is None
    assert forecast.rise(make_noise("scale_bits,rate=0.1"), names) is None
    # The probe's own curve says nothing of it: half the variances of three kinds of trit.
    assert forecast.rise(make_noise("gaussian,sigma=0.1"), names) == pytest.approx(0.01 * 1.5 / 2)


def test_secded_by_trial():
    random, rate = np.random.default_rng(0), 0.004
    errors = random.random((200_000, noise_forecast.SECDED_BITS)) < rate
    left = errors & (errors.sum(axis=1, keepdims=True) > 1)
    assert behind_secded(rate) == pytest.approx(left.mean(), rel=0.03)
    assert behind_secded(before_secded(1e-4)) == pytest.approx(1e-4)
