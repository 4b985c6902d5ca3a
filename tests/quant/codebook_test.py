"""NF4 against the published table, NVFP4 against ml_dtypes' e2m1 and E4M3."""

import statistics

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ternax.quant import make_scheme
from ternax.quant.codebook import nearest_code, round_to_e4m3
from ternax.quantized import CODEBOOKS

# arXiv:2305.14314, appendix E, as printed there.
PUBLISHED = (
    "-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, "
    "-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, "
    "0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, "
    "0.7229568362236023, 1.0"
)


def weights(shape, seed=0):
    return np.random.default_rng(seed).standard_t(4, shape).astype(np.float32) * np.float32(0.02)


def test_nf4_table_is_the_published_one():
    assert CODEBOOKS["nf4"].values == tuple(float(word) for word in PUBLISHED.split(","))


def test_nf4_table_follows_its_definition():
    """Means of neighbouring quantiles of a Gaussian, 8 positive and 7 negative ones beside 0."""
    quantile = statistics.NormalDist().inv_cdf
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    up = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    down = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    found = np.sort([*down, 0.0, *up]) / max(up)
    np.testing.assert_allclose(CODEBOOKS["nf4"].values, found, atol=2e-6)


def test_nf4_takes_the_nearest_value_of_each_block():
    w = weights((192, 5))
    found = np.asarray(make_scheme("nf4", w.shape).quantize(w).dequantize())
    table = np.array([float(word) for word in PUBLISHED.split(",")])
    for first in range(0, 192, 64):
        for n in range(5):
            block = w[first : first + 64, n].astype(np.float64)
            peak = np.abs(block).max()
            best = table[np.abs(block[:, None] / peak - table).argmin(1)] * peak
            np.testing.assert_allclose(found[first : first + 64, n], best, rtol=1e-6)


def test_e2m1_rounds_as_ml_dtypes_does():
    values = np.concatenate([np.arange(-28, 29) / 4, np.linspace(-7, 7, 997)]).astype(np.float32)
    codes = np.asarray(nearest_code(values, "nvfp4"))
    found = np.asarray(CODEBOOKS["nvfp4"].values, np.float32)[codes]
    expected = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_e4m3_rounds_as_ml_dtypes_does():
    every = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    between = (every[1:] + every[:-1]) / 2
    random = np.exp(np.random.default_rng(0).uniform(-9, 6.1, 5000)).astype(np.float32)
    x = np.concatenate([every, between, random])
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(round_to_e4m3(x), expected)
    assert float(round_to_e4m3(np.float32(460.0))) == 448


@pytest.mark.parametrize("seed", range(3))
def test_nvfp4_is_its_definition(seed):
    w = weights((96, 4), seed) * np.exp(np.arange(4, dtype=np.float32) * 2)
    whole = np.abs(w).max() / np.float32(6 * 448)
    expected = np.empty_like(w)
    for first in range(0, 96, 16):
        block = w[first : first + 16]
        scale = np.abs(block).max(0) / np.float32(6) / whole
        scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
        expected[first : first + 16] = (block / scale).astype(ml_dtypes.float4_e2m1fn).astype(
            np.float32
        ) * scale
    found = make_scheme("nvfp4", w.shape).quantize(w)
    np.testing.assert_allclose(found.dequantize(), expected, rtol=2e-6)
    assert found.bits_per_weight == 4.5 + 32 / w.size


@pytest.mark.parametrize("name, bits", [("nf4", 4.5), ("nvfp4", 4.5)])
def test_bits_of_a_large_matrix(name, bits):
    shape = (4096, 4096)
    scheme = make_scheme(name, shape)
    found = jax.eval_shape(scheme.quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert found.bits_per_weight == pytest.approx(bits, abs=1e-5)


def test_tiny_blocks_beside_a_large_one_become_zero():
    w = np.full((32, 1), 1e-9, np.float32)
    w[:16] = 1.0
    found = np.asarray(make_scheme("nvfp4", w.shape).quantize(w).dequantize())
    np.testing.assert_allclose(found[:16], 1, rtol=1e-6)
    assert (found[16:] == 0).all()
