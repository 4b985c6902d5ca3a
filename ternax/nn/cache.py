"""The KV cache: preallocated, bf16 or int8, one array for all layers, updated in place."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ternax.config import ModelConfig
from ternax.kernels.attention import BLOCK_SLOTS
from ternax.kernels.packing import FLOAT_FORMATS
from ternax.sharding import CACHE, Layout

KV_DTYPES = ("bf16", "int8", "f32")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers.

    Rows of a batch end at the same slot: a shorter prompt is padded on the left and
    begins at its own `start`. Slot s of row b is at position s - start[b].

    Attributes:
      k, v: [L, B, G, S, E]; uint16 (the bits of bf16), f32 or int8.
      k_scale, v_scale: f32 [L, B, G, S] for int8 (value = code * scale), else None.
      start: int32 [B], first slot in use.
      length: int32 [], slots in use; the next token goes to slot `length`.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    start: jax.Array
    length: jax.Array

    @property
    def slots(self) -> int:
        return self.k.shape[3]


def padded_slots(context: int) -> int:
    """Slots allocated for `context` tokens: whole blocks, of at least 16 slots."""
    block = min(BLOCK_SLOTS, math.ceil(context / 16) * 16)
    return math.ceil(context / block) * block


def init_cache(
    config: ModelConfig,
    batch: int,
    context: int,
    dtype: str = "bf16",
    start: jax.Array | np.ndarray | None = None,
    zeros: Callable[..., jax.Array] = jnp.zeros,
    layout: Layout | None = None,
) -> KVCache:
    """An empty cache for `context` tokens a row; `zeros` makes its memory.

    With a layout it is made split: rows over data, kv heads over tensor, slots over sequence.
    """
    if layout is not None:
        return _split_cache(config, batch, context, dtype, start, layout)
    return _of_slots(config, batch, padded_slots(context), dtype, start, zeros)


def _of_slots(config, batch, slots, dtype, start, zeros) -> KVCache:
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    start = jnp.zeros((batch,), jnp.int32) if start is None else jnp.asarray(start)
    length = jnp.int32(0)
    if dtype == "int8":
        k, v = (zeros(shape, jnp.int8) for _ in "kv")
        k_scale, v_scale = (jnp.zeros(shape[:-1], jnp.float32) for _ in "kv")
        return KVCache(k, v, k_scale, v_scale, start, length)
    k, v = (zeros(shape, FLOAT_FORMATS[dtype]) for _ in "kv")
    return KVCache(k, v, None, None, start, length)


def _split_cache(config, batch, context, dtype, start, layout: Layout) -> KVCache:
    wide = dataclasses.replace(config, num_heads=layout.kv_heads, num_kv_heads=layout.kv_heads)
    slots = layout.sequence * padded_slots(layout.local_context(context))
    like = jax.eval_shape(lambda: _of_slots(wide, batch, slots, dtype, None, jnp.zeros))
    specs = cache_specs(layout, like)
    cache = jax.tree.map(
        lambda leaf, spec: layout.full(leaf.shape, 0, leaf.dtype, spec), like, specs
    )
    if start is None:
        return cache
    return dataclasses.replace(cache, start=layout.put(start, ["batch"]))


def cache_specs(layout: Layout, cache: KVCache) -> KVCache:
    """The PartitionSpec of each leaf of a cache."""
    codes: Any = layout.partition(CACHE)
    scales: Any = None if cache.k_scale is None else layout.partition(CACHE[:-1])
    start: Any = layout.partition(["batch"])
    length: Any = layout.partition([])
    return KVCache(codes, codes, scales, scales, start, length)


def advance(cache: KVCache, tokens: int) -> KVCache:
    """The cache after a step of `tokens` tokens."""
    return dataclasses.replace(cache, length=cache.length + tokens)
