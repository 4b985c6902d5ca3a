"""Grouped-query attention: full over a sequence, or over a KV cache block by block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ternax.config import ModelConfig
from ternax.nn.cache import KVCache, append, block_slots, read_block
from ternax.nn.linear import QuantLinear
from ternax.nn.norm import RMSNorm
from ternax.nn.rope import rotate

_MASKED = -1e30


def attend_full(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
    """Causal attention within one sequence. q: f32 [B, T, H, E]; k, v: f32 [B, T, G, E].

    Tokens before start [B] are padding: nothing attends to them. Returns f32 [B, T, H, E].
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("btgre,bsge->bgrts", q, k) * width**-0.5
    slot = jnp.arange(length)
    seen = (slot[None, :] <= slot[:, None]) & (slot[None, None, :] >= start[:, None, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _MASKED), axis=-1)
    return jnp.einsum("bgrts,bsge->btgre", weights, v).reshape(batch, length, heads, width)


def attend_cached(q: jax.Array, cache: KVCache, layer: jax.Array) -> jax.Array:
    """Attention of the newest T tokens over the cache, which already holds them.

    q: f32 [B, T, H, E], tokens at slots length .. length + T. Reads the blocks in use
    and no others, with a running softmax, so that cost follows the context in use and
    no block is copied before it is dequantized. Returns f32 [B, T, H, E].
    """
    batch, tokens, heads, width = q.shape
    groups, block = cache.k.shape[2], block_slots(cache.slots)
    q = jnp.moveaxis(q.reshape(batch, tokens, groups, heads // groups, width), 1, 3)
    q = q.reshape(batch, groups, -1, width) * width**-0.5  # [B, G, R T, E]
    own_slot = cache.length + jnp.tile(jnp.arange(tokens), heads // groups)

    def body(i, carry):
        peak, total, out = carry
        k, v = read_block(cache, layer, i * block)
        slot = i * block + jnp.arange(block)
        seen = (slot <= own_slot[:, None]) & (slot >= cache.start[:, None, None])  # [B, R T, block]
        scores = jnp.where(seen[:, None], jnp.einsum("bgqe,bgse->bgqs", q, k), _MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
        weights = jnp.where(seen[:, None], jnp.exp(scores - new_peak), 0.0)
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + weights.sum(-1, keepdims=True)
        return new_peak, total, out * shrink + jnp.einsum("bgqs,bgse->bgqe", weights, v)

    shape = q.shape[:-1]
    carry = (jnp.full((*shape, 1), _MASKED), jnp.zeros((*shape, 1)), jnp.zeros((*shape, width)))
    used = (cache.length + tokens + block - 1) // block
    _, total, out = lax.fori_loop(0, used, body, carry)
    out = out / jnp.maximum(total, 1e-30)
    out = out.reshape(batch, groups, heads // groups, tokens, width)
    return jnp.moveaxis(out, 3, 1).reshape(batch, tokens, heads, width)


class Attention(nnx.Module):
    """Projections q, k, v, o round the attention; packed, q, k and v are one `qkv`.

    BitNet puts a norm, `sub_norm`, in front of o.
    """

    def __init__(self, config: ModelConfig, *, sub_norm: bool, rngs: nnx.Rngs):
        def linear(in_features, out_features):
            return QuantLinear(in_features, out_features, scheme=config.scheme,
                               inputs=config.inputs, rngs=rngs)

        inner = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q = linear(config.hidden_size, inner)
        self.k = linear(config.hidden_size, kv_width)
        self.v = linear(config.hidden_size, kv_width)
        self.o = linear(inner, config.hidden_size)
        self.sub_norm = RMSNorm(inner, eps=config.norm_eps) if sub_norm else None
        self.head_dim = config.head_dim

    def __call__(self, x, layer, rope, start, cache: KVCache | None):
        """x: f32 [B, T, D] -> (f32 [B, T, D], cache). start: int32 [B], see KVCache."""
        if hasattr(self, "qkv"):
            parts = self.qkv(x, layer)
        else:
            parts = self.q(x, layer), self.k(x, layer), self.v(x, layer)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is None:
            out = attend_full(q, k, v, start)
        else:
            cache = append(cache, layer, k, v)
            out = attend_cached(q, cache, layer)
        out = out.reshape(*x.shape[:2], -1)
        if self.sub_norm is not None:
            out = self.sub_norm(out)
        return self.o(out, layer), cache
