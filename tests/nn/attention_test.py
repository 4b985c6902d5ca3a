"""Attention over the cache equals full attention and a plain float64 softmax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax import configs
from ternax.kernels.attention import BLOCK_SLOTS
from ternax.nn import cache as kv
from ternax.nn.attention import attend_cached, attend_full

HEADS, GROUPS, WIDTH, LAYER = 4, 2, 8, 1
CONFIG = dataclasses.replace(
    configs.get_config("tiny-llama"),
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=GROUPS,
    head_dim=WIDTH,
)
GARBAGE = 1e4  # in every slot that must not be seen
ATTEND = jax.jit(attend_cached, static_argnames="backend")
FULL, APPEND = jax.jit(attend_full), jax.jit(kv.append)

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
    cache = filled(case, dtype)
    found = np.asarray(ATTEND(drawn(case)[0], cache, jnp.int32(LAYER), backend=backend))
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
    cached = ATTEND(q, filled(case, "f32"), jnp.int32(LAYER))
    np.testing.assert_allclose(full[:, -1:], cached, atol=1e-5)
