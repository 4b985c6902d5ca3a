"""`cache_attention`: attention of the newest tokens over a KV cache, on any backend.

The cache holds all layers; the layer's index goes in, and no block is copied before it
is dequantized. Cost follows the context in use, not the cache's size.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .backends import choose
from .cpu import backend as cpu
from .packing import bits_to_float

# Slots the reference reads and dequantizes at a time; a cache holds whole blocks.
BLOCK_SLOTS = 256
# More new tokens than this are a matrix product, which XLA does well.
_MOST_KERNEL_TOKENS = 4
_MASKED = -1e30


def block_slots(slots: int) -> int:
    """Slots in one block of a cache of `slots` slots."""
    return min(BLOCK_SLOTS, slots)


def cache_attention(
    q, k, v, k_scale, v_scale, start, length, layer, *, backend: str | None = None
) -> jax.Array:
    """Causal attention of T new tokens, whose keys and values the cache holds already.

    Args:
      q: f32 [B, T, H, E], tokens at slots length .. length + T.
      k, v: [L, B, G, S, E]: uint16 (the bits of bf16), int8 or f32; S is a whole number
        of `block_slots(S)`.
      k_scale, v_scale: f32 [L, B, G, S] for int8 (value = code * scale), else None.
      start: int32 [B], first slot in use of each row.
      length: int32 [], slots in use before these tokens.
      layer: int32 [].
      backend: a name in BACKENDS; None takes the platform's fastest.

    Returns:
      f32 [B, T, H, E]; zero for a query whose row has no slot in use yet.
    """
    chosen = choose(jax.default_backend(), name=backend).name
    if chosen == "cpu" and q.shape[1] <= _MOST_KERNEL_TOKENS:
        return cpu.attend(q, k, v, k_scale, v_scale, start, length, layer)
    return reference(q, k, v, k_scale, v_scale, start, length, layer)


def reference(q, k, v, k_scale, v_scale, start, length, layer) -> jax.Array:
    """`cache_attention` in XLA: a running softmax over the blocks in use."""
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
        seen = (slot <= own_slot[:, None]) & (slot >= start[:, None, None])  # [B, R T, block]
        scores = jnp.where(seen[:, None], jnp.einsum("bgqe,bgse->bgqs", q, keys), _MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
        weights = jnp.where(seen[:, None], jnp.exp(scores - new_peak), 0.0)
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + weights.sum(-1, keepdims=True)
        return new_peak, total, out * shrink + jnp.einsum("bgqs,bgse->bgqe", weights, values)

    shape = q.shape[:-1]
    carry = (jnp.full((*shape, 1), _MASKED), jnp.zeros((*shape, 1)), jnp.zeros((*shape, width)))
    _, total, out = lax.fori_loop(0, (length + tokens + block - 1) // block, body, carry)
    out = out / jnp.maximum(total, 1e-30)
    out = out.reshape(batch, groups, heads // groups, tokens, width)
    return jnp.moveaxis(out, 3, 1).reshape(batch, tokens, heads, width)
