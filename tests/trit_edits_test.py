"""Trits moved about by name, against counts on plain arrays."""

import jax
import numpy as np
import pytest

import ternax
from ternax.errors import UsageError
from ternax.noise import make_noise
from ternax.trit_edits import protected, relocated, shuffled, trits

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def clean():
    return ternax.load("tiny-bitnet")


def transitions(before, after):
    return np.array(
        [[((before == a) & (after == b)).sum() for b in (-1, 0, 1)] for a in (-1, 0, 1)]
    )


def test_changes_elsewhere_are_the_same_changes(clean):
    noisy, _ = ternax.perturb(clean, make_noise("bitflip,rate=0.05"), KEY, copy=True)
    before, struck = trits(clean), trits(noisy)
    moved = trits(relocated(clean, noisy, KEY))
    for name, old in before.items():
        assert (transitions(old, struck[name]) == transitions(old, moved[name])).all(), name
        assert ((old != struck[name]) & (old != moved[name])).sum() < (old != moved[name]).sum()
    raw, _ = ternax.perturb(clean, make_noise("bitflip,rate=0.1,policy=raw"), KEY, copy=True)
    with pytest.raises(UsageError, match="found a noise that left them"):
        relocated(clean, raw, KEY)


def test_shuffled_matrices_hold_the_same_trits(clean):
    before, after = trits(clean), trits(shuffled(clean, KEY, r".*mlp\.up"))
    for name, old in before.items():
        same = np.array_equal(old, after[name])
        assert same == (not name.endswith("mlp.up"))
        assert np.array_equal(np.sort(old, axis=None), np.sort(after[name], axis=None))
    for name, codes in trits(clean).items():
        np.testing.assert_array_equal(codes, before[name])


@pytest.mark.parametrize("spec", ["sign_flip,rate=0.3", "gaussian,sigma=0.3"])
def test_protected_outputs_are_the_clean_models(clean, spec):
    noisy, _ = ternax.perturb(clean, make_noise(spec), KEY, copy=True)
    everything = {name: np.ones(codes.shape[1], bool) for name, codes in trits(clean).items()}
    tokens = np.arange(24, dtype=np.int32).reshape(1, -1)
    logits = np.asarray(clean(tokens))
    left = np.asarray(protected(clean, noisy, everything)(tokens)) - logits
    struck = np.asarray(noisy(tokens)) - logits
    # Floats sum in another order than integers, and a rounded input may then be the next one.
    assert np.square(left).sum() < 1e-3 * np.square(struck).sum()
    assert spec.startswith("gaussian") or not left.any()
    assert np.array_equal(protected(clean, noisy, {})(tokens), noisy(tokens))
