"""The band round undisturbed runs: what it lets pass, and what it does not."""

import numpy as np
import pytest

from ternax.loss_band import FALSE_ALARM, band_of

STEPS, STRETCH = 30, 10
# Drift that grows along the run, and batches of which every fifth is steep.
DRIFT = np.repeat([1e-4, 1e-3, 1e-2], STRETCH)
SLOPE = np.where(np.arange(STEPS) % 5 == 3, 9.0, 1.5)


def runs(random, count):
    noise = DRIFT * SLOPE * random.standard_normal((count, STEPS))
    return 3 - 0.01 * np.arange(STEPS) + noise


def band(losses, comparisons=STEPS):
    return band_of(losses, np.tile(SLOPE, (len(losses), 1)), STRETCH, comparisons)


def test_one_more_run_is_outside_as_seldom_as_promised():
    """2000 draws of four undisturbed runs and a fifth: independent losses, so nearly as often."""
    random, outside, draws = np.random.default_rng(0), 0, 2000
    for _ in range(draws):
        *known, another = runs(random, 5)
        outside += (band(np.stack(known)).shares(another) > 1).any()
    assert 0.3 * FALSE_ALARM < outside / draws < 1.7 * FALSE_ALARM


def test_reach_follows_drift_and_slope():
    reach = band(runs(np.random.default_rng(1), 4)).reach
    np.testing.assert_allclose(reach[3::5] / reach[2::5], 6)
    ratio = reach / (DRIFT * SLOPE)
    assert (3 < ratio).all() and (ratio < 7).all()


@pytest.mark.parametrize("at, jump", [(0, 2e-3), (15, 2e-2), (29, 2e-1)])
def test_a_jump_is_outside_from_where_it_begins(at, jump):
    known = runs(np.random.default_rng(2), 4)
    moved = known[0] + np.where(np.arange(STEPS) >= at, jump, 0)
    shares = band(known, 1000).shares(moved)
    assert shares[at] > 1 and (shares[:at] < 1).all()
    assert len(band(known, 1000).shares(moved, at)) == STEPS - at


def test_runs_that_do_not_differ_leave_no_room():
    same = band(np.ones((3, STEPS)))
    assert (same.shares(np.ones(STEPS)) == 0).all()
    assert (same.shares(np.ones(STEPS) + 1e-7) == np.inf).all()


def test_one_run_has_no_spread():
    with pytest.raises(ValueError, match="two at least, found 1"):
        band(np.ones((1, STEPS)))
