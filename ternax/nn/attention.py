"""Grouped-query attention: full over a sequence, or over a KV cache block by block."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.config import ModelConfig
from ternax.kernels.attention import rotate, step_attention
from ternax.nn.cache import KVCache
from ternax.nn.linear import QuantLinear
from ternax.nn.norm import RMSNorm

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
    qkv: jax.Array, rope, cache: KVCache, layer: jax.Array, backend: str | None = None
) -> tuple[jax.Array, KVCache]:
    """Appends the newest T tokens to one layer of the cache and attends.

    qkv: f32 [B, T, (H + 2 G) E], not yet rotated. Returns (f32 [B, T, H, E], the cache);
    its `length` moves once a step, not once a layer: see `advance`.
    """
    stores = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    out, k, v, k_scale, v_scale = step_attention(
        qkv, rope, *stores, cache.start, cache.length, layer, backend=backend
    )
    return out, dataclasses.replace(cache, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


class Attention(nnx.Module):
    """Projections q, k, v, o round the attention; packed, q, k and v are one `qkv`.

    BitNet puts a norm, `sub_norm`, in front of o. `backend` names the kernels of
    `step_attention`, None the platform's fastest.
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
        self.head_dim, self.num_kv_heads = config.head_dim, config.num_kv_heads
        self.backend: str | None = None

    def __call__(self, x, layer, rope, start, cache: KVCache | None, *, norm: RMSNorm):
        """x + attention(norm x).

        x: f32 [B, T, D] -> (f32 [B, T, D], cache). start: int32 [B], see KVCache.
        """
        if hasattr(self, "qkv"):
            qkv = self.qkv(x, layer, norm=norm)
        else:
            parts = [linear(x, layer, norm=norm) for linear in (self.q, self.k, self.v)]
            qkv = jnp.concatenate(parts, axis=-1)
        if cache is None:
            heads = qkv.reshape(*x.shape[:2], -1, self.head_dim)
            groups = self.num_kv_heads
            q, k, v = jnp.split(
                heads, [heads.shape[2] - 2 * groups, heads.shape[2] - groups], axis=2
            )
            out = attend_full(rotate(q, rope), rotate(k, rope), v, start)
        else:
            out, cache = attend_cached(qkv, rope, cache, layer, self.backend)
        out = out.reshape(*x.shape[:2], -1)
        return self.o(out, layer, norm=self.sub_norm, residual=x), cache
