"""Grouped-query attention: full over a sequence, or over a KV cache block by block."""

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.config import ModelConfig
from ternax.kernels.attention import cache_attention
from ternax.nn.cache import KVCache, append
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


def attend_cached(
    q: jax.Array, cache: KVCache, layer: jax.Array, backend: str | None = None
) -> jax.Array:
    """Attention of the newest T tokens over the cache, which already holds them.

    q: f32 [B, T, H, E], tokens at slots length .. length + T. Returns f32 [B, T, H, E].
    """
    return cache_attention(
        q,
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        cache.start,
        cache.length,
        layer,
        backend=backend,
    )


class Attention(nnx.Module):
    """Projections q, k, v, o round the attention; packed, q, k and v are one `qkv`.

    BitNet puts a norm, `sub_norm`, in front of o. `backend` names the kernels of
    `cache_attention`, None the platform's fastest.
    """

    def __init__(self, config: ModelConfig, *, sub_norm: bool, rngs: nnx.Rngs):
        def linear(in_features, out_features):
            return QuantLinear(
                in_features, out_features, scheme=config.scheme, inputs=config.inputs, rngs=rngs
            )

        inner = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q = linear(config.hidden_size, inner)
        self.k = linear(config.hidden_size, kv_width)
        self.v = linear(config.hidden_size, kv_width)
        self.o = linear(inner, config.hidden_size)
        self.sub_norm = RMSNorm(inner, eps=config.norm_eps) if sub_norm else None
        self.head_dim = config.head_dim
        self.backend: str | None = None

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
            out = attend_cached(q, cache, layer, self.backend)
        out = out.reshape(*x.shape[:2], -1)
        if self.sub_norm is not None:
            out = self.sub_norm(out)
        return self.o(out, layer), cache
