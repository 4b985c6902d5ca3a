"""Rotary embedding against its closed form and the formula of transformers."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ternax import configs
from ternax.config import RopeScaling
from ternax.nn.rope import frequencies, rope_table, rotate

CONFIG = configs.get_config("tiny-llama")


def hf_frequencies(head_dim, theta, scaling):
    """transformers modeling_rope_utils._compute_llama3_parameters, in float64."""
    inv_freq = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return inv_freq
    low_wavelength = scaling.original_context / scaling.low_freq_factor
    high_wavelength = scaling.original_context / scaling.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    scaled = np.where(wavelength > low_wavelength, inv_freq / scaling.factor, inv_freq)
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smoothed = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    medium = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
    return np.where(medium, smoothed, scaled)


@pytest.mark.parametrize("name", ["1b", "70b", "13b", "bitnet-3b", "tiny-llama"])
def test_frequencies(name):
    config = configs.get_config(name)
    found = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    right = hf_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    assert found.shape == (config.head_dim // 2,) and found.dtype == np.float32
    np.testing.assert_allclose(found, right, rtol=1e-6)


def test_70b_keeps_blends_and_stretches():
    """All three bands exist at 8192 positions: else the scaling would go untested."""
    config = configs.get_config("70b")
    ratio = frequencies(128, config.rope_theta, config.rope_scaling) / frequencies(
        128, config.rope_theta, None
    )
    assert ratio[0] == 1 and ratio[-1] == 1 / 8
    assert ((ratio > 0.13) & (ratio < 0.99)).sum() >= 3
    assert (np.diff(ratio) <= 1e-6).all()


@pytest.mark.parametrize("scaling", [None, CONFIG.rope_scaling, RopeScaling(32.0, 1.0, 4.0, 64)])
def test_rotation(scaling):
    """As complex numbers: pair i, (x[i], x[i + E/2]), times exp(1j position rate_i)."""
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, config.head_dim)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 200], [7, 8, 9, 10, 11]])
    rates = hf_frequencies(config.head_dim, config.rope_theta, scaling)
    half = config.head_dim // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[..., None, None] * rates)
    found = rotate(jnp.asarray(x), rope_table(config, jnp.asarray(positions)))
    right = np.concatenate([turned.real, turned.imag], axis=-1)
    # The angle, up to 200 radians, is rounded to f32.
    np.testing.assert_allclose(found, right, atol=200 * 2**-22)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 1, CONFIG.head_dim)).astype(np.float32)

    def score(at_q, at_k):
        turned = [
            rotate(x, rope_table(CONFIG, jnp.array([[at]]))) for x, at in ((q, at_q), (k, at_k))
        ]
        return float(jnp.vdot(*turned))

    assert score(3, 1) == pytest.approx(score(90, 88), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 0.1
