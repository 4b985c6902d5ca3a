"""The KV cache: what is appended is read back, each dtype within its own error, in place."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ternax import configs
from ternax.kernels.attention import block_slots, write
from ternax.nn import cache as kv

CONFIG = dataclasses.replace(configs.get_config("tiny-llama"), num_layers=3)
BATCH, GROUPS, WIDTH = 2, CONFIG.num_kv_heads, CONFIG.head_dim


def appended(cache, layer, k, v):
    """The cache with k, v [B, T, G, E] behind what it holds; `length` stays."""
    k, k_scale = write(cache.k, cache.k_scale, k, cache.length, layer)
    v, v_scale = write(cache.v, cache.v_scale, v, cache.length, layer)
    return dataclasses.replace(cache, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def tokens(seed: int, count: int) -> np.ndarray:
    """Keys or values [B, T, G, E] of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-3, 3, (BATCH, count, GROUPS, 1))
    return (rng.standard_normal((BATCH, count, GROUPS, WIDTH)) * sizes).astype(np.float32)


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """What a cache of `dtype` makes of x, in numpy."""
    if dtype == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)
    if dtype == "int8":
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        return np.round(x / scale) * scale
    return x


def everything(cache, layer):
    """Keys and values of every slot of a layer, by the format's own words: [B, S, G, E] each."""
    out = []
    for store, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        part = np.asarray(store)[layer]
        if part.dtype == np.uint16:
            part = part.view(ml_dtypes.bfloat16).astype(np.float32)
        if scale is not None:
            part = part * np.asarray(scale)[layer][..., None]
        out.append(np.swapaxes(part, 1, 2))
    return out


@pytest.mark.parametrize("dtype", kv.KV_DTYPES)
def test_append_then_read(dtype):
    """Twice, to one layer: earlier slots stay, other layers stay empty."""
    cache = kv.init_cache(CONFIG, BATCH, 40, dtype)
    k, v = tokens(0, 9), tokens(1, 9)
    append = jax.jit(appended)
    for first, last in ((0, 5), (5, 9)):
        cache = append(cache, jnp.int32(1), k[:, first:last], v[:, first:last])
        cache = kv.advance(cache, last - first)
    assert int(cache.length) == 9
    for read, written in zip(everything(cache, 1), (k, v), strict=True):
        np.testing.assert_allclose(read[:, :9], stored(written, dtype), rtol=1e-6, atol=0)
    for layer in (0, 2):
        assert all(not part.any() for part in everything(cache, layer))
    assert all(not part[:, 9:].any() for part in everything(cache, 1))


# Largest error over the largest |x| of the vector: none; half of 2^-7; half a step of 127.
@pytest.mark.parametrize("dtype, bound", [("f32", 0.0), ("bf16", 2**-8), ("int8", 0.5001 / 127)])
def test_round_trip_error(dtype, bound):
    x = tokens(2, 16)
    x[0, 0] = 0  # an all-zero vector has no scale of its own
    cache = appended(kv.init_cache(CONFIG, BATCH, 16, dtype), jnp.int32(0), x, x)
    read, _ = everything(cache, 0)
    error = np.abs(np.asarray(read) - x).max(-1)
    assert np.isfinite(read).all() and (error <= bound * np.abs(x).max(-1)).all()
    assert dtype == "f32" or error.max() > 0, "a cache that rounds nothing is not of this dtype"


@pytest.mark.parametrize("dtype, nbytes", [("f32", 4), ("bf16", 2), ("int8", 1)])
def test_bytes(dtype, nbytes):
    cache = kv.init_cache(CONFIG, BATCH, 300, dtype)
    assert cache.k.shape == (3, BATCH, GROUPS, 512, WIDTH) == cache.v.shape
    assert cache.k.dtype.itemsize == nbytes == cache.v.dtype.itemsize
    scales = None if dtype != "int8" else (3, BATCH, GROUPS, 512)
    assert getattr(cache.k_scale, "shape", None) == getattr(cache.v_scale, "shape", None) == scales
    assert int(cache.length) == 0 and cache.start.tolist() == [0, 0]


@pytest.mark.parametrize(
    "context, slots",
    [(1, 16), (16, 16), (17, 32), (255, 256), (256, 256), (257, 512), (600, 768), (131072, 131072)],
)
def test_padded_slots(context, slots):
    assert kv.padded_slots(context) == slots
    assert slots % block_slots(slots) == 0, "blocks are whole"


def test_advance_moves_the_length_alone():
    cache = kv.init_cache(CONFIG, BATCH, 16, start=jnp.array([3, 0]))
    moved = kv.advance(cache, 5)
    assert int(moved.length) == 5 and moved.start.tolist() == [3, 0]
    assert moved.k is cache.k and moved.v is cache.v
