"""Grouped-query attention: full over a sequence, or over a KV cache block by block."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.config import ModelConfig
from ternax.errors import UsageError
from ternax.kernels.attention import rotate, step_attention
from ternax.kernels.attention_across import step_attention_across
from ternax.nn.cache import KVCache
from ternax.nn.linear import QuantLinear, side_by_side
from ternax.nn.norm import RMSNorm

_MASKED = -1e30
_BLOCK, _MOST_BLOCKS = 64, 8


def attend_full(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
    """Causal attention within one sequence. q: f32 [B, T, H, E]; k, v: f32 [B, T, G, E].

    Tokens before start [B] are padding: nothing attends to them. Returns f32 [B, T, H, E].
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    shared = heads // groups
    # The heads that share a key are rows of one product.
    q = (q * width**-0.5).reshape(batch, length, groups, shared, width).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, groups, length * shared, width)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    # Block by block, each against the keys up to its end: most of what the mask would hide is
    # never computed. A few blocks, since the program grows with them.
    block = max(_BLOCK, -(-length // _MOST_BLOCKS))
    out = []
    for first in range(0, length, block):
        end = min(first + block, length)
        keys, values = k[:, :, :end], v[:, :, :end]
        scores = jnp.einsum("bgte,bgse->bgts", q[:, :, first * shared : end * shared], keys)
        slot, token = jnp.arange(end), jnp.repeat(jnp.arange(first, end), shared)
        seen = (slot <= token[:, None]) & (slot >= start[:, None, None])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, _MASKED), axis=-1)
        out.append(jnp.einsum("bgts,bgse->bgte", weights, values))
    joined = jnp.concatenate(out, axis=2).reshape(batch, groups, length, shared, width)
    return joined.transpose(0, 2, 1, 3, 4).reshape(batch, length, heads, width)


def attend_cached(
    qkv: jax.Array,
    rope,
    cache: KVCache,
    layer: jax.Array,
    backend: str | None = None,
    across: str | None = None,
) -> tuple[jax.Array, KVCache]:
    """Appends the newest T tokens to one layer of the cache and attends.

    qkv: f32 [B, T, (H + 2 G) E], not yet rotated. Returns (f32 [B, T, H, E], the cache);
    its `length` moves once a step, not once a layer: see `advance`.
    """
    stores = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    place = (cache.start, cache.length, layer)
    if across is None:
        found = step_attention(qkv, rope, *stores, *place, backend=backend)
    else:
        found = step_attention_across(qkv, rope, *stores, *place, across)
    out, k, v, k_scale, v_scale = found
    return out, dataclasses.replace(cache, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


class Attention(nnx.Module):
    """Projections q, k, v, o round the attention; packed, q, k and v are one `qkv`.

    BitNet puts a norm, `sub_norm`, in front of o. `backend` names the kernels of
    `step_attention`, None the platform's fastest. `across` is the mesh axis that the cache's slots
    are split over, inside `shard_map`; None: they are whole here. `memory` is what a full pass
    reads keys and values through, (k, v) -> (k, v), f32 [B, T, G, E], k rotated; None: as they are.
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
        self.across: str | None = None
        self.memory: Callable | None = None

    def __call__(self, x, layer, rope, start, cache: KVCache | None, *, norm: RMSNorm):
        """x + attention(norm x).

        x: f32 [B, T, D] -> (f32 [B, T, D], cache). start: int32 [B], see KVCache.
        """
        if hasattr(self, "qkv"):
            qkv = self.qkv(x, layer, norm=norm)
        else:
            qkv = side_by_side([self.q, self.k, self.v], x, norm=norm)
        if cache is None:
            heads = qkv.reshape(*x.shape[:2], -1, self.head_dim)
            groups = self.num_kv_heads
            q, k, v = jnp.split(
                heads, [heads.shape[2] - 2 * groups, heads.shape[2] - groups], axis=2
            )
            k = rotate(k, rope)
            if self.memory is not None:
                k, v = self.memory(k, v)
            out = attend_full(rotate(q, rope), k, v, start)
        elif self.memory is not None:
            raise UsageError(
                "noise on the cache is in full passes, model(tokens), not in generate's steps"
            )
        else:
            out, cache = attend_cached(qkv, rope, cache, layer, self.backend, self.across)
        out = out.reshape(*x.shape[:2], -1)
        return self.o(out, layer, norm=self.sub_norm, residual=x), cache
