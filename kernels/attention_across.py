"""Attention over a KV cache whose slots are split over devices, for use inside `shard_map`.

Each device holds a stretch of slots, and attends with every query over those. What they find,
largest score, sum of weights and weighted values, is put together as if one device had gone on
where another left off (flash decoding; Dao et al., 2023). It is XLA's on every platform.
"""

import jax.numpy as jnp
from jax import lax

from .attention import heads_of, rotate, running_softmax
from .packing import float_to_bits


def write_across(store, scale_store, new, slots, layer):
    """Puts new keys or values f32 [B, T, G, E] into `slots` of a layer, int32 [T], where they are
    here: what lies outside of the store is another device's. Returns (store, scale_store)."""
    slots = jnp.where(slots < 0, store.shape[3], slots)

    def put(into, value):  # [B, T, G, ...]
        value = jnp.moveaxis(value, 1, 0)
        return into.at[layer, :, :, slots].set(value, mode="drop", unique_indices=True)

    if scale_store is None:
        return put(store, float_to_bits(new, "bf16" if store.dtype == jnp.uint16 else "f32")), None
    scale = jnp.maximum(jnp.max(jnp.abs(new), axis=-1), 1e-8) / 127
    codes = jnp.round(new / scale[..., None]).astype(jnp.int8)
    return put(store, codes), put(scale_store, scale)


def step_attention_across(
    qkv, rope, k, v, k_scale, v_scale, start, length, layer, axis: str
) -> tuple:
    """`attention.step_attention` of a cache that this device has a stretch of slots of.

    Args:
      k, v, k_scale, v_scale: the stretch; devices along the mesh axis `axis` have one after the
        other.
      start, length: of the whole cache.

    Returns:
      (f32 [B, T, H, E], the same on every device, k, v, k_scale, v_scale).
    """
    groups, held, width = k.shape[2:]
    tokens = qkv.shape[1]
    x = qkv.reshape(*qkv.shape[:2], -1, width)
    q, new_k, new_v = jnp.split(x, [x.shape[2] - 2 * groups, x.shape[2] - groups], axis=2)
    first = lax.axis_index(axis) * held
    slots = length - first + jnp.arange(tokens)
    k, k_scale = write_across(k, k_scale, rotate(new_k, rope), slots, layer)
    v, v_scale = write_across(v, v_scale, new_v, slots, layer)
    stores = (k, v, k_scale, v_scale)
    peak, total, out = running_softmax(rotate(q, rope), *stores, start, length, layer, first)
    share = jnp.exp(peak - lax.pmax(peak, axis))
    both = lax.psum(jnp.concatenate([out, total], axis=-1) * share, axis)
    out, total = both[..., :-1], both[..., -1:]
    return heads_of(out / jnp.maximum(total, 1e-30), tokens), *stores
