"""Attention over the cache equals full attention and a plain float64 softmax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax import configs
from ternax.kernels.attention import BLOCK_SLOTS, cache_attention, write
from ternax.nn import cache as kv
from ternax.nn.attention import attend_cached, attend_full
from ternax.nn.rope import rope_table, rotate

HEADS, GROUPS, WIDTH, LAYER = 4, 2, 8, 1
CONFIG = dataclasses.replace(
    configs.get_config("tiny-llama"),
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=GROUPS,
    head_dim=WIDTH,
)
GARBAGE = 1e4  # in every slot that must not be seen
FULL = jax.jit(attend_full)
STEP = jax.jit(attend_cached, static_argnames="backend")


def UNTURNED(q, k, v, cache, backend=None):
    """A whole step whose rotation turns nothing, over a cache that may hold its tokens already."""
    one = jnp.ones((*q.shape[:2], 1, WIDTH // 2))
    qkv = jnp.concatenate([x.reshape(*q.shape[:2], -1) for x in (q, k, v)], axis=-1)
    return STEP(qkv, (one, 0 * one), cache, jnp.int32(LAYER), backend=backend)[0]


@jax.jit
def APPEND(cache, layer, k, v):
    k, k_scale = write(cache.k, cache.k_scale, k, cache.length, layer)
    v, v_scale = write(cache.v, cache.v_scale, v, cache.length, layer)
    return dataclasses.replace(cache, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


# (length before, new tokens, first slot in use of each row)
CASES = {
    "decode, short": (20, 1, (0, 0)),
    "decode, ragged": (20, 1, (0, 17)),
    "decode, three blocks": (530, 1, (0, 300)),
    "decode, a block's last slot": (255, 1, (0, 5)),
    "decode, a block's first slot": (256, 1, (0, 5)),
    "prefill": (0, 33, (0, 12)),
    "continued by three": (254, 3, (0, 255)),
    "continued across a block": (250, 12, (0, 251)),
    "prefill of several blocks": (0, 520, (0, 400)),
}


def numpy_attention(q, k, v, first, start):
    """Query t, at position first + t, over keys start .. first + t. [T, H, E] from one row."""
    out = np.zeros(q.shape)
    for t in range(q.shape[0]):
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            keys = k[start : first + t + 1, g].astype(np.float64)
            scores = keys @ q[t, h].astype(np.float64) / np.sqrt(WIDTH)
            weights = np.exp(scores - scores.max()) if len(scores) else scores
            values = v[start : first + t + 1, g]
            out[t, h] = weights @ values / weights.sum() if len(scores) else np.nan
    return out


@functools.cache
def drawn(case: str):
    """q [B, T, H, E]; k, v [B, slots, G, E] with garbage where nothing may look."""
    length, new, start = CASES[case]
    rng = np.random.default_rng(len(case))
    q = rng.standard_normal((2, new, HEADS, WIDTH)).astype(np.float32) * 2
    k, v = rng.standard_normal((2, 2, length + new, GROUPS, WIDTH)).astype(np.float32)
    for row, first in enumerate(start):
        k[row, :first] = v[row, :first] = GARBAGE
    return q, k, v


def expected(case: str):
    """([B, T, H, E], which tokens are no padding [B, T])."""
    length, new, start = CASES[case]
    q, k, v = drawn(case)
    real = length + np.arange(new) >= np.array(start)[:, None]
    return np.stack(
        [numpy_attention(*row, length, first) for *row, first in zip(q, k, v, start, strict=True)]
    ), real


def filled(case: str, dtype: str) -> kv.KVCache:
    """A cache after the case's tokens, before `advance`; behind them NaN and garbage."""
    length, new, start = CASES[case]
    _, k, v = drawn(case)
    cache = kv.init_cache(CONFIG, 2, length + new + 300, dtype, jnp.array(start))
    if dtype == "f32":
        used = -(-(length + new) // BLOCK_SLOTS) * BLOCK_SLOTS
        behind = jnp.where(jnp.arange(cache.slots)[:, None] < used, GARBAGE, jnp.nan)
        cache = dataclasses.replace(cache, k=cache.k + behind, v=cache.v + behind)
    if length:
        cache = kv.advance(APPEND(cache, jnp.int32(LAYER), k[:, :length], v[:, :length]), length)
    return APPEND(cache, jnp.int32(LAYER), k[:, length:], v[:, length:])


# f32 sums in another order; bf16 and int8 keys shift scores of up to +-10 by about 1 %.
TOLERANCE = {"f32": 2e-5, "bf16": 0.05, "int8": 0.05}


@pytest.mark.parametrize(
    "case, dtype, backend",
    [
        *((case, "f32", None) for case in CASES),
        *((case, dtype, None) for case in CASES if "blocks" in case for dtype in ("bf16", "int8")),
        *((case, "f32", "reference") for case in ("decode, three blocks", "continued by three")),
    ],
)
def test_cached_equals_numpy(case, dtype, backend):
    length = CASES[case][0]
    q, k, v = drawn(case)
    found = np.asarray(UNTURNED(q, k[:, length:], v[:, length:], filled(case, dtype), backend))
    right, real = expected(case)
    assert np.isfinite(found).all(), "padding must not make NaN"
    assert np.abs(found - right)[real].max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", [case for case, (length, _, _) in CASES.items() if not length])
def test_full_equals_numpy(case):
    found = np.asarray(FULL(*drawn(case), jnp.array(CASES[case][2])))
    right, real = expected(case)
    assert np.isfinite(found).all()
    assert np.abs(found - right)[real].max() <= 2e-5


def test_full_equals_cached_token_by_token():
    """The last of T tokens with full attention is what one token sees over a cache of T - 1."""
    case = "decode, ragged"
    q, k, v = drawn(case)
    full = FULL(np.repeat(q, k.shape[1], axis=1), k, v, jnp.array(CASES[case][2]))
    length = CASES[case][0]
    cached = UNTURNED(q, k[:, length:], v[:, length:], filled(case, "f32"))
    np.testing.assert_allclose(full[:, -1:], cached, atol=1e-5)


@pytest.mark.parametrize("dtype", kv.KV_DTYPES)
@pytest.mark.parametrize(
    "case", ["decode, ragged", "decode, three blocks", "continued by three", "prefill"]
)
def test_a_step_rotates_appends_and_attends(case, dtype):
    """The whole step, on the platform's backend, against its parts one after another."""
    length, new, start = CASES[case]
    q, k, v = drawn(case)
    cache = kv.init_cache(CONFIG, 2, length + new + 40, dtype, jnp.array(start))
    if length:
        cache = kv.advance(APPEND(cache, jnp.int32(LAYER), k[:, :length], v[:, :length]), length)
    positions = jnp.maximum(length + jnp.arange(new) - jnp.array(start)[:, None], 0)
    rope = rope_table(CONFIG, positions)
    k, v = k[:, length:], v[:, length:]
    parts = APPEND(cache, jnp.int32(LAYER), rotate(k, rope), v)
    stores = parts.k, parts.v, parts.k_scale, parts.v_scale, parts.start, parts.length
    right = cache_attention(rotate(q, rope), *stores, jnp.int32(LAYER))
    qkv = jnp.concatenate([x.reshape(2, new, -1) for x in (q, k, v)], axis=-1)
    found, after = STEP(qkv, rope, cache, jnp.int32(LAYER))
    real = length + np.arange(new) >= np.array(start)[:, None]
    np.testing.assert_allclose(found[real], right[real], atol=2e-5)
    for name in ("k", "v", "k_scale", "v_scale"):
        one, two = getattr(after, name), getattr(parts, name)
        if one is None:
            assert two is None
        elif one.dtype == jnp.float32:
            np.testing.assert_allclose(one, two, atol=2e-6, err_msg=name)
        else:  # a rotation rounded the other way moves a stored value by one step at most
            apart = np.abs(np.asarray(one, np.int64) - np.asarray(two, np.int64))
            assert apart.max() <= 1 and (apart > 0).mean() < 0.01, name
