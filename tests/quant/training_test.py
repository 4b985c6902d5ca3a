"""Schemes round a scheme: values, gradients, and that packing does not see them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ternax
from ternax import edit
from ternax.errors import UsageError
from ternax.noise import make_noise
from ternax.quant import make_scheme
from ternax.quant.training import (
    GRADIENTS,
    Annealed,
    Clipped,
    Noisy,
    Stochastic,
    Tanh,
    with_gradient,
)

W = jax.random.normal(jax.random.key(0), (64, 48))
G = jax.random.normal(jax.random.key(1), (64, 48))


def one_layer(wrapper):
    """The wrapper as a layer of a stack sees it: its step inputs cut to one layer."""
    for name in ("strength", "key"):
        if hasattr(wrapper, name):
            leaf = getattr(wrapper, name)
            leaf.set_value(leaf[...][0])
    return wrapper


def gradient(scheme):
    return np.asarray(jax.grad(lambda w: jnp.sum(scheme.fake_quant(w) * G))(W))


INNER = make_scheme("absmean", W.shape)
QUANTIZED = np.asarray(INNER.fake_quant(W))


def test_annealed_goes_from_float_to_quantized():
    scheme = one_layer(Annealed(INNER, 1))
    for strength, wanted in ((0.0, W), (0.25, W + 0.25 * (QUANTIZED - W)), (1.0, QUANTIZED)):
        scheme.strength.set_value(jnp.float32(strength))
        np.testing.assert_allclose(scheme.fake_quant(W), wanted, atol=1e-6)
    np.testing.assert_array_equal(scheme.fake_quant(W), QUANTIZED)
    np.testing.assert_allclose(gradient(scheme), G, atol=1e-6)


def test_noisy_strikes_codes_and_keeps_the_gradient():
    scheme = one_layer(Noisy(INNER, 1, make_noise("sign_flip,rate=0.3")))
    found, scale = np.asarray(scheme.fake_quant(W)), float(jnp.abs(W).mean())
    struck = ~np.isclose(found, QUANTIZED)
    share = struck.sum() / (np.abs(QUANTIZED) > 0).sum()
    assert 0.25 < share < 0.35
    np.testing.assert_allclose(found[struck], -QUANTIZED[struck], atol=1e-5)
    np.testing.assert_allclose(np.unique(np.abs(found).round(5)), [0, round(scale, 5)], atol=2e-5)
    np.testing.assert_allclose(gradient(scheme), G, atol=1e-6)


def test_clipped_cuts_the_gradient_of_the_far_weights_alone():
    scheme = Clipped(INNER)
    np.testing.assert_array_equal(scheme.fake_quant(W), QUANTIZED)
    inside = np.abs(W) <= 3 * np.abs(W).mean()
    assert 0 < (~inside).sum() < inside.sum()
    np.testing.assert_allclose(gradient(scheme), np.where(inside, G, 0), atol=1e-6)


def test_tanh_has_the_slope_of_tanh():
    scheme, scale = Tanh(INNER), np.abs(W).mean()
    np.testing.assert_allclose(scheme.fake_quant(W), QUANTIZED, atol=1e-5)
    slope = 1 - np.tanh(np.asarray(W) / scale) ** 2
    np.testing.assert_allclose(gradient(scheme), slope * np.asarray(G), atol=1e-4)


def test_stochastic_is_right_on_average():
    scale = float(jnp.abs(W).mean())
    scheme = one_layer(Stochastic(INNER, 1))

    def draw(key):
        scheme.key.set_value(key)
        return scheme.fake_quant(W)

    mean = np.mean([draw(key) for key in jax.random.split(jax.random.key(3), 300)], axis=0)
    inside = np.abs(W) < scale
    # The scale moves a little with the dither; 300 draws leave 0.03 of standard error.
    assert np.abs(mean - W)[inside].mean() < 0.05 * scale
    assert np.abs(QUANTIZED - np.asarray(W))[inside].mean() > 0.2 * scale


@pytest.mark.parametrize("name", GRADIENTS)
def test_packing_sees_the_scheme_inside(name):
    plain = ternax.load("tiny-bitnet", packed=False, seed=2)
    wrapped = edit.wrap_schemes(
        ternax.load("tiny-bitnet", packed=False, seed=2),
        lambda scheme: Annealed(with_gradient(scheme, name, 3), 3),
    )
    tokens = jnp.arange(12).reshape(2, 6)
    expected = ternax.pack_model(plain)(tokens)
    np.testing.assert_array_equal(ternax.pack_model(wrapped)(tokens), expected)


def test_an_unknown_gradient_is_refused():
    with pytest.raises(UsageError, match="expected one of identity"):
        with_gradient(INNER, "straight", 1)
