"""The decode attention kernels against float64 in numpy, on the GPU that is to run them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import attention

# (cache, head size, query heads to a key head, splits, slots of a tile); tiles are in use, not
# in use, and half so.
CASES = ((jnp.uint16, 128, 8, 3, 64), (jnp.uint16, 64, 5, 1, 128), (jnp.int8, 128, 2, 2, 64))
# Of the largest value. Exact products, sums in float32; a term of bf16 lost would be 2^-16.
TOLERANCE = 1e-5
_GROUPS, _SLOTS, _LENGTH, _LAYER = 2, 512, 200, 1
# The last row has no slot in use, not even that of the new token.
_START = np.asarray([0, 70, _LENGTH, _LENGTH + 1], np.int32)


def self_test(interpret: bool = False) -> str | None:
    """None where every case is right; else one line that says what differs."""
    for case in CASES:
        try:
            wrong = _differs(*case, interpret)
        except Exception as error:  # whatever compiler or driver say
            line = str(error).partition("\n")[0]
            return f"its self-test raised {type(error).__name__}: {line}"
        if wrong:
            dtype, width, shared, splits, tile = case
            return (
                f"its self-test failed: {wrong} with a cache of {np.dtype(dtype)}, heads of "
                f"{width}, {shared} to a key head, {splits} splits, tiles of {tile}"
            )
    return None


def _differs(dtype, width, shared, splits, tile, interpret) -> str | None:
    random = np.random.default_rng(0)
    batch, heads = len(_START), shared * _GROUPS
    shape = (2, batch, _GROUPS, _SLOTS, width)
    qkv = random.normal(size=(batch, 1, (heads + 2 * _GROUPS) * width)).astype(np.float32)
    angle = random.uniform(-3, 3, (batch, 1, 1, width // 2))
    rope = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    scales: list[np.ndarray | None]
    floats = random.normal(size=(2, *shape)).astype(np.float32)
    if dtype == jnp.uint16:
        stores = floats.astype(jnp.bfloat16).view(np.uint16)
        scales = [None, None]
    else:
        stores = random.integers(-127, 128, (2, *shape)).astype(np.int8)
        scales = list(random.uniform(0.005, 0.02, (2, *shape[:-1])).astype(np.float32))
    config = {"splits": splits, "tile": tile, "stages": 2}
    step = jax.jit(functools.partial(attention.step, config=config, interpret=interpret))
    place = jnp.asarray(_START), jnp.int32(_LENGTH), jnp.int32(_LAYER)
    found, *after = step(qkv, rope, *stores, *scales, *place)
    found = np.asarray(found, np.float64)[:, 0]
    after = [None if x is None else np.asarray(x) for x in after]

    q, new_k, new_v = np.split(
        qkv.reshape(batch, -1, width).astype(np.float64), [heads, heads + _GROUPS], axis=1
    )
    q, new_k = (_rotated(x, *(table[:, 0] for table in rope)) for x in (q, new_k))
    caches = []
    whole = zip(("keys", "values"), (new_k, new_v), stores, after[:2], after[2:], strict=True)
    for name, new, before, now, scale in whole:
        untouched = np.delete(now, _LENGTH, 3), np.delete(before, _LENGTH, 3)
        if not np.array_equal(*untouched) or not np.array_equal(now[0], before[0]):
            return f"{name} beside the new one changed"
        cache = _floats(now, scale)[_LAYER]
        # Half a step of what it is stored as: 8 bits of significand, or 127 codes.
        step_size = np.abs(new) / 256 if scale is None else scale[_LAYER, :, :, _LENGTH, None] / 2
        if (np.abs(cache[:, :, _LENGTH] - new) > 1.001 * step_size).any():
            return f"new {name} are not what they should be"
        caches.append(np.repeat(cache, shared, axis=1))
    scores = np.einsum("bhe,bhse->bhs", q, caches[0]) * width**-0.5
    slot = np.arange(_SLOTS)
    seen = (slot >= _START[:, None, None]) & (slot <= _LENGTH)
    weights = np.where(seen, np.exp(np.minimum(scores, 80)), 0.0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    expected = np.einsum("bhs,bhse->bhe", weights, caches[1])
    error = np.abs(found - expected).max()
    if not error <= TOLERANCE * np.abs(expected).max():
        return f"outputs differ by {error:.2g}"
    return None


def _rotated(x, cos, sin):
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _floats(store, scale):
    if scale is None:
        return store.view(jnp.bfloat16).astype(np.float64)
    return store * scale.astype(np.float64)[..., None]
