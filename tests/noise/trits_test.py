"""Noise on trits against counts and tables that numpy takes."""

import jax
import numpy as np
import pytest

from ternax.errors import UsageError
from ternax.noise import make_noise

CODES = np.random.default_rng(0).choice([-1, 0, 1], p=[0.3, 0.4, 0.3], size=(400, 500)).astype("i1")
SPECS = ("sign_flip", "trit_other", "trit_resample", "trit_resample,density=uniform", "stuck")
RATE = 0.2


def noisy(spec, rate, seed=0, codes=CODES):
    found, changed = make_noise(f"{spec},rate={rate}")(jax.random.key(seed), codes)
    return np.asarray(found), int(changed)


def table(found):
    """Share of each new trit given the old one: [old + 1, new + 1]."""
    return np.array(
        [[np.mean(found[old == CODES] == new) for new in (-1, 0, 1)] for old in (-1, 0, 1)]
    )


@pytest.mark.parametrize("spec", SPECS)
def test_counts_are_true_and_trits_stay_trits(spec):
    found, changed = noisy(spec, RATE)
    assert changed == (found != CODES).sum() > 0
    assert found.dtype == np.int8 and set(np.unique(found)) <= {-1, 0, 1}


@pytest.mark.parametrize("spec", SPECS)
def test_rate_zero_is_the_identity(spec):
    found, changed = noisy(spec, 0.0)
    np.testing.assert_array_equal(found, CODES)
    assert changed == 0


@pytest.mark.parametrize("spec", SPECS)
def test_a_key_gives_one_draw(spec):
    np.testing.assert_array_equal(noisy(spec, RATE)[0], noisy(spec, RATE)[0])
    assert (noisy(spec, RATE)[0] != noisy(spec, RATE, seed=1)[0]).any()


@pytest.mark.parametrize("spec", SPECS)
def test_jit_changes_nothing(spec):
    noise = make_noise(f"{spec},rate={RATE}")
    eager, jitted = noise(jax.random.key(0), CODES), jax.jit(noise)(jax.random.key(0), CODES)
    np.testing.assert_array_equal(eager[0], jitted[0])
    assert int(eager[1]) == int(jitted[1])


def test_transition_tables():
    keep, p = 1 - RATE, RATE
    drawn = np.array([0.3, 0.4, 0.3])
    expected = {
        "sign_flip": [[keep, 0, p], [0, 1, 0], [p, 0, keep]],
        "trit_other": [[keep, p / 2, p / 2], [p / 2, keep, p / 2], [p / 2, p / 2, keep]],
        "trit_resample": keep * np.eye(3) + p * drawn,
        "trit_resample,density=uniform": keep * np.eye(3) + p / 3,
        "stuck": keep * np.eye(3) + p * np.array([0, 1, 0]),
        "stuck,at=-1": keep * np.eye(3) + p * np.array([1, 0, 0]),
    }
    # 60,000 trits of each kind at least: five standard errors of a share are 0.008.
    for spec, wanted in expected.items():
        np.testing.assert_allclose(table(noisy(spec, RATE)[0]), wanted, atol=0.009, err_msg=spec)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("sign_flip", "expected a rate"),
        ("sign_flip,rate=2", r"\[0, 1\], found 2"),
        ("sign_flip,rate=x", "found 'x'"),
        ("sign_flip,speed=1", "key=value with key among rate"),
        ("flip,rate=0.1", "expected one of sign_flip"),
        ("stuck,rate=0.1,at=2", "at must be one of -1, 0, 1"),
        ("trit_resample,rate=0.1,density=odd", "one of same, uniform"),
    ],
)
def test_bad_noise_is_one_line(spec, words):
    with pytest.raises(UsageError, match=words):
        make_noise(spec)
