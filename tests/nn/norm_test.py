"""RMSNorm against numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from ternax.nn.norm import RMSNorm, rms_norm


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_rms_norm(size, eps):
    """At size 1e-3 the mean square is 1e-6, so eps decides."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((3, 5, 64)) * size).astype(np.float32), rng.standard_normal(64)
    right = weight * x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps)
    found = rms_norm(jnp.asarray(x), jnp.asarray(weight, jnp.float32), eps)
    np.testing.assert_allclose(found, right, rtol=2e-6, atol=1e-7)


def test_bf16_is_normed_in_f32():
    x = jnp.linspace(-3, 5, 512).astype(jnp.bfloat16)
    found = rms_norm(x, jnp.ones(512), 1e-5)
    assert found.dtype == jnp.float32
    assert np.array_equal(found, rms_norm(x.astype(jnp.float32), jnp.ones(512), 1e-5))


def test_zeros_stay_zero():
    assert not np.asarray(rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-5)).any()


def test_module_reads_its_weight_and_eps():
    x = jnp.full((1, 4), 0.001)
    norm = RMSNorm(4, eps=1e-2)
    norm.weight[...] = jnp.arange(4.0)
    np.testing.assert_allclose(norm(x), rms_norm(x, jnp.arange(4.0), 1e-2), rtol=1e-6)
