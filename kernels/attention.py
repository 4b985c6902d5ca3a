"""Attention of the newest tokens over a KV cache, on any backend.

The cache holds all layers; the layer's index goes in, and no block is copied before it
is dequantized. Cost follows the context in use, not the cache's size.
"""

import jax
import jax.numpy as jnp
from jax import lax

from . import target
from .backends import choose
from .cpu import backend as cpu
from .packing import bits_to_float, float_to_bits
from .pallas import backend as mosaic

# Slots the reference reads and dequantizes at a time; a cache holds whole blocks.
BLOCK_SLOTS = 256
_MASKED = -1e30


def block_slots(slots: int) -> int:
    """Slots in one block of a cache of `slots` slots."""
    return min(BLOCK_SLOTS, slots)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (x[i], x[i + E/2]). x: [B, T, H, E]; table: cosines and sines
    [B, T, 1, E / 2]."""
    cos, sin = table
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def write(store, scale_store, new, length, layer):
    """Puts new keys or values f32 [B, T, G, E] into slots length .. length + T of a layer.

    Returns the updated (store, scale_store), as for `step_attention`.
    """
    new = jnp.swapaxes(new, 1, 2)  # [B, G, T, E]
    at = (layer, 0, 0, length, 0)
    if scale_store is None:
        format = "bf16" if store.dtype == jnp.uint16 else "f32"
        return lax.dynamic_update_slice(store, float_to_bits(new, format)[None], at), None
    scale = jnp.maximum(jnp.max(jnp.abs(new), axis=-1), 1e-8) / 127
    codes = jnp.round(new / scale[..., None]).astype(jnp.int8)
    return (
        lax.dynamic_update_slice(store, codes[None], at),
        lax.dynamic_update_slice(scale_store, scale[None], at[:-1]),
    )


def step_attention(
    qkv, rope, k, v, k_scale, v_scale, start, length, layer, *, backend: str | None = None
):
    """Rotates new queries and keys, appends keys and values to the cache, and attends.

    Args:
      qkv: f32 [B, T, (H + 2 G) E]: queries, keys and values side by side, not yet rotated.
      rope: cosines and sines at the tokens' positions, two f32 [B, T, 1, E / 2].
      k, v: [L, B, G, S, E]: uint16 (the bits of bf16), int8 or f32; S is a whole number
        of `block_slots(S)`.
      k_scale, v_scale: f32 [L, B, G, S] for int8 (value = code * scale), else None.
      start: int32 [B], first slot in use of each row.
      length: int32 [], slots in use before these tokens.
      layer: int32 [].
      backend: a name in BACKENDS; None takes the platform's fastest. Where its own kernels
        cannot, as with more than one token on a GPU, XLA's way is taken.

    Returns:
      (f32 [B, T, H, E], k, v, k_scale, v_scale), the cache with T tokens more; zero for a
      query whose row has no slot in use yet.
    """
    chosen = choose(target.current().platform, name=backend).name
    if chosen == "cpu":
        return cpu.step(qkv, rope, k, v, k_scale, v_scale, start, length, layer)
    if chosen == "mosaic" and mosaic.why_not_attend(qkv, k) is None:
        return mosaic.attend(qkv, rope, k, v, k_scale, v_scale, start, length, layer)
    groups, width = k.shape[2], k.shape[4]
    x = qkv.reshape(*qkv.shape[:2], -1, width)
    q, new_k, new_v = jnp.split(x, [x.shape[2] - 2 * groups, x.shape[2] - groups], axis=2)
    k, k_scale = write(k, k_scale, rotate(new_k, rope), length, layer)
    v, v_scale = write(v, v_scale, new_v, length, layer)
    out = cache_attention(rotate(q, rope), k, v, k_scale, v_scale, start, length, layer)
    return out, k, v, k_scale, v_scale


def cache_attention(q, k, v, k_scale, v_scale, start, length, layer) -> jax.Array:
    """f32 [B, T, H, E]: `running_softmax` over the whole cache, at its end."""
    _, total, out = running_softmax(q, k, v, k_scale, v_scale, start, length, layer)
    return heads_of(out / jnp.maximum(total, 1e-30), q.shape[1])


def heads_of(out: jax.Array, tokens: int) -> jax.Array:
    """[B, G, R T, E], R heads of each group, -> [B, T, H, E]."""
    batch, groups, rows, width = out.shape
    out = out.reshape(batch, groups, rows // tokens, tokens, width)
    return jnp.moveaxis(out, 3, 1).reshape(batch, tokens, -1, width)


def running_softmax(q, k, v, k_scale, v_scale, start, length, layer, first=None):
    """Causal attention in XLA over a cache that holds the new tokens already.

    Args:
      q: f32 [B, T, H, E], rotated, tokens at slots length .. length + T; the rest as for
        `step_attention`.
      first: int32 [], the slot that k and v begin with, where they hold a stretch; None: 0.

    Returns:
      (largest score [B, G, R T, 1], sum of exp(score - largest) [B, G, R T, 1], values so
      weighted [B, G, R T, E]), f32, over the blocks in use, for R T queries of a group.
    """
    batch, tokens, heads, width = q.shape
    groups, block = k.shape[2], block_slots(k.shape[3])
    q = jnp.moveaxis(q.reshape(batch, tokens, groups, heads // groups, width), 1, 3)
    q = q.reshape(batch, groups, -1, width) * width**-0.5  # [B, G, R T, E]
    own_slot = length + jnp.tile(jnp.arange(tokens), heads // groups)

    def read(store, scale_store, first):
        part = lax.dynamic_slice(store, (layer, 0, 0, first, 0), (1, batch, groups, block, width))[
            0
        ]
        if scale_store is None:
            return bits_to_float(part)
        scale = lax.dynamic_slice(scale_store, (layer, 0, 0, first), (1, batch, groups, block))[0]
        return part.astype(jnp.float32) * scale[..., None]

    def body(i, carry):
        peak, total, out = carry
        keys, values = read(k, k_scale, i * block), read(v, v_scale, i * block)
        slot = i * block + jnp.arange(block)
        slot = slot if first is None else slot + first
        seen = (slot <= own_slot[:, None]) & (slot >= start[:, None, None])  # [B, R T, block]
        scores = jnp.where(seen[:, None], jnp.einsum("bgqe,bgse->bgqs", q, keys), _MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
        weights = jnp.where(seen[:, None], jnp.exp(scores - new_peak), 0.0)
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + weights.sum(-1, keepdims=True)
        return new_peak, total, out * shrink + jnp.einsum("bgqs,bgse->bgqe", weights, values)

    shape = q.shape[:-1]
    carry = (jnp.full((*shape, 1), _MASKED), jnp.zeros((*shape, 1)), jnp.zeros((*shape, width)))
    used = length + tokens
    if first is not None:
        used = jnp.clip(used - first, 0, k.shape[3])
    return lax.fori_loop(0, (used + block - 1) // block, body, carry)
