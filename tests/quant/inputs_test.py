"""Quantizers of activations, to the bit of their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.quant.inputs import INPUTS


def definition(x):
    """BitNet's order of operations in f32, one rounding a step."""
    peak = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    inverse = (np.float32(1) / peak) * np.float32(127)
    return np.clip(np.rint(x * inverse), -128, 127).astype(np.int8), np.float32(1) / inverse


def tokens():
    x = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    x[:100] *= np.float32(1e4)
    x[100:200] *= np.float32(1e-4)
    x[200] = 0
    x[201] = 1e-7  # below the clamp: the codes shrink instead of the scale
    x[202] = -3
    return x


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_int8_per_token_is_its_definition(wrap):
    x = tokens()
    q, scale = wrap(INPUTS["int8"].__call__)(jnp.asarray(x))
    expected, expected_scale = definition(x)
    assert q.dtype == jnp.int8 and scale.shape == (500, 1)
    np.testing.assert_array_equal(q, expected)
    np.testing.assert_array_equal(scale, expected_scale)
    assert expected[200].tolist() == [0] * 64 and np.abs(expected[201]).max() <= 2
    assert expected[202].tolist() == [-127] * 64


def test_rounds_half_to_even():
    x = jnp.array([[127.0, 0.5, 1.5, -0.5, -2.5]])
    q, scale = INPUTS["int8"](x)
    assert q.tolist() == [[127, 0, 2, 0, -2]] and scale[0, 0] == 1


def test_error_is_half_a_step():
    x = tokens()
    q, scale = INPUTS["int8"](jnp.asarray(x))
    assert (np.abs(np.asarray(q) * np.asarray(scale) - x) <= 0.5001 * np.asarray(scale)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_widened_first(dtype):
    x = jnp.asarray(tokens()[:100] / 1e4, dtype)
    for found, expected in zip(
        INPUTS["int8"](x), INPUTS["int8"](x.astype(jnp.float32)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", INPUTS)
def test_fake_quant_is_the_value_with_the_gradient_through(name):
    x = jnp.asarray(tokens()[:8])
    q, scale = INPUTS[name](x)
    expected = q if scale is None else q.astype(jnp.float32) * scale
    np.testing.assert_array_equal(INPUTS[name].fake_quant(x), expected)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(weight * INPUTS[name].fake_quant(x)))(x)
    np.testing.assert_array_equal(gradient, weight)


def test_no_quantizer_leaves_x_alone():
    x = jnp.asarray(tokens())
    assert INPUTS["none"](x)[0] is x and INPUTS["none"](x)[1] is None
