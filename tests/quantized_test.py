"""`Quantized`: its arithmetic against numpy, its bytes, and what `check` refuses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels.packing import FLOAT_FORMATS, float_to_bits, unpack_numpy
from ternax.quantized import CODEBOOKS, Quantized, check

K, N = 48, 5


def quantized(planes=1, groups=1, width=1, zero=False, format="trit2"):
    rng = np.random.default_rng(planes + groups + width)
    leaf = (planes, groups, width)
    return Quantized(
        jnp.asarray(rng.integers(-1, 2, (planes, K, N)), jnp.int8),
        jnp.asarray(rng.uniform(0.5, 2, leaf), jnp.float32),
        jnp.asarray(rng.normal(size=leaf), jnp.float32) if zero else None,
        format,
    )


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("planes, groups, width", [(1, 1, 1), (1, 3, N), (2, 1, N), (3, 3, 1)])
def test_dequantize_is_the_documented_sum(planes, groups, width, zero):
    q = quantized(planes, groups, width, zero)
    expected = np.zeros((K, N))
    for p in range(planes):
        for k in range(K):
            for n in range(N):
                at = p, k // (K // groups), n if width > 1 else 0
                shift = 0 if q.zero is None else float(q.zero[at])
                expected[k, n] += float(q.scale[at]) * (int(q.codes[p, k, n]) + shift)
    np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-6, atol=1e-6)
    check(q)


@pytest.mark.parametrize("format", FLOAT_FORMATS)
def test_float_formats_hold_the_values(format):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(K, N)), jnp.float32)
    q = Quantized(float_to_bits(w, format)[None], jnp.ones((1, 1, 1)), format=format)
    expected = w if format == "f32" else w.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(q.dequantize(), expected)
    packed = q.pack("w")
    assert packed.data.shape == (1, N, K) and packed.data.dtype == FLOAT_FORMATS[format]
    assert packed.nbytes == K * N * packed.data.dtype.itemsize + 4
    check(q)


def test_pack_keeps_leaves_and_name():
    q = quantized(2, 3, N, True)
    packed = q.pack("layers.0.mlp.up")
    assert packed.scale is q.scale and packed.zero is q.zero
    assert (packed.shape, packed.parts) == ((K, N), (("layers.0.mlp.up", N),))
    np.testing.assert_array_equal(unpack_numpy(np.asarray(packed.data), "trit2", K), q.codes)


def test_bits_per_weight_count_scales_and_padding():
    assert quantized().bits_per_weight == 2 + 32 / (K * N)
    assert quantized(1, 3, N, True).bits_per_weight == 2 + 2 * 32 * 3 * N / (K * N)
    assert quantized(2).bits_per_weight == 4 + 2 * 32 / (K * N)
    odd = Quantized(jnp.zeros((1, 17, 1), jnp.int8), jnp.ones((1, 1, 1)), format="int4")
    assert odd.bits_per_weight == (32 * 4 + 32) / 17  # 17 codes take two blocks of 16


def test_density_counts_non_zeros():
    codes = jnp.zeros((1, K, N), jnp.int8).at[0, :12].set(-1)
    assert float(dataclasses.replace(quantized(), codes=codes).density()) == 12 / K


@pytest.mark.parametrize(
    "format, bits", [("nf4", 4 + 32 / 16), ("nvfp4", 4 + 8 / 16 + 32 / (K * N))]
)
def test_codebook_formats_look_values_up(format, bits):
    values = CODEBOOKS[format].values
    codes = np.random.default_rng(0).integers(0, len(values), (1, K, N)).astype(np.int8)
    scale = np.random.default_rng(1).uniform(0.5, 2, (1, 3, N)).astype(np.float32)
    q = Quantized(jnp.asarray(codes), jnp.asarray(scale), format=format)
    expected = np.asarray(values)[codes[0]] * np.repeat(scale[0], 16, axis=0)
    np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-6)
    assert q.bits_per_weight == pytest.approx(bits)
    assert float(q.density()) == pytest.approx(np.mean(expected != 0))
    check(q)
    with pytest.raises(ValueError, match=rf"codes must lie in \[0, {len(values) - 1}\]"):
        check(dataclasses.replace(q, codes=q.codes.at[0, 0, 0].set(len(values))))


LEAF = jnp.ones((1, 1, 1))
REFUSED = {
    "format": (
        dict(format="trit9"),
        "format must be one of trit2, int4, int8, bf16, f32, nf4, nvfp4, found 'trit9'",
    ),
    "axes of scale": (
        dict(scale=jnp.ones((1, 1))),
        r"scale must be \[1, G, 1 or 5\], found \(1, 1\)",
    ),
    "planes of scale": (dict(scale=jnp.ones((2, 1, 1))), r"scale must be \[1, G, .*\(2, 1, 1\)"),
    "width of scale": (dict(scale=jnp.ones((1, 1, 3))), r"scale must be .*\(1, 1, 3\)"),
    "width of zero": (dict(zero=jnp.ones((1, 1, 3))), r"zero must be \[1, G, 1 or 5\]"),
    "zero unlike scale": (
        dict(zero=jnp.ones((1, 1, 5))),
        r"zero must be shaped like scale \(1, 1, 1\), found \(1, 1, 5\)",
    ),
    "groups that do not divide": (
        dict(scale=jnp.ones((1, 5, 1))),
        "scale has 5 groups, which do not divide K = 48",
    ),
    "groups too small": (dict(scale=jnp.ones((1, 6, 1))), "groups of 8 .* multiples of 16"),
    "scale not finite": (dict(scale=LEAF * jnp.inf), "scale holds a value that is not finite"),
    "zero not finite": (dict(zero=LEAF * jnp.nan), "zero holds a value that is not finite"),
    "dtype": (dict(codes=jnp.zeros((1, K, N), jnp.int32)), "codes must be int8, found int32"),
    "range": (
        dict(codes=jnp.full((1, K, N), 2, jnp.int8)),
        r"trit2 codes must lie in \[-1, 1\], found \[2, 2\]",
    ),
    "range of int4": (
        dict(codes=jnp.full((1, K, N), -8, jnp.int8), format="int4"),
        r"int4 codes must lie in \[-7, 7\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_check_refuses(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(quantized(), **changes))
