"""The two compiled programs of a decode run, and what goes into them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax import engine
from ternax.counter_hash import mix
from ternax.edit import fit_kernels
from ternax.kernels.memory import zeros
from ternax.models import Decoder
from ternax.nn.cache import KVCache, init_cache
from ternax.sharding import fetch
from ternax.workload import Workload


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random(shape: tuple[int, ...], dtype) -> jax.Array:
    """Keys or values as a cache stores them, of magnitude 0.5 to 2, or codes of either sign."""
    dtype = jnp.dtype(dtype)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[dtype.itemsize]
    index = jnp.uint32(0)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = mix(index).astype(width)
    if dtype == jnp.uint16:
        bits = (bits & width(0x80FF)) | width(0x3F00)
    elif dtype == jnp.float32:
        bits = (bits & width(0x80FFFFFF)) | width(0x3F000000)
    return jax.lax.bitcast_convert_type(bits, dtype)


class Steps:
    """Prefill and decode of one model and workload, on one device or on the model's mesh.

    Attributes:
      leaves: of the model.
      tokens: int32 [B, T], the prompts.
      keys: one random key a row.
      chunk: tokens that one call of decode makes, at most.
    """

    def __init__(self, model: Decoder, workload: Workload, chunk: int = engine.CHUNK_TOKENS):
        graph, self.leaves = nnx.split(fit_kernels(model))
        self._config, self._layout, self._workload = model.config, model.layout, workload
        self.chunk = chunk
        self._program = engine.Program(graph, layout=model.layout)
        self.tokens = engine.rows_on(model.layout, workload.tokens(model.config))
        self.keys = engine.row_keys(workload.seed, workload.batch)

    def new_cache(self, of: engine.DecodeState | None = None) -> KVCache:
        """An empty cache. On one device `of`'s, which is then used up, since malloc would keep the
        memory of one that is let go; what lies in slots that are not in use nobody reads."""
        filled = jnp.int32(self._workload.filled)
        if of is not None and self._layout is None:
            return dataclasses.replace(of.cache, length=filled)
        if not self._workload.filled:
            return self._made(zeros)
        return dataclasses.replace(self._made(_random), length=filled)

    def _made(self, zeros=jnp.zeros) -> KVCache:
        work = self._workload
        return init_cache(
            self._config,
            work.batch,
            work.context,
            work.kv_dtype,
            zeros=zeros,
            layout=self._layout,
        )

    @functools.cached_property
    def _abstract_cache(self) -> KVCache:
        """As both programs take it. Where the parts of a split one lie only a real one tells."""
        if self._layout is None:
            return jax.eval_shape(self._made)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            self._made(zeros),
        )

    def compile_prefill(self) -> None:
        cache = self._abstract_cache
        lowered = engine.prefill.lower(self._program, self.leaves, self.tokens, cache, self.keys)
        self._prefill = lowered.compile()

    def compile_decode(self) -> None:
        batch = self._workload.batch
        token = engine.rows_on(self._layout, np.zeros(batch, np.int32))
        done = engine.rows_on(self._layout, np.zeros(batch, bool))
        state = engine.DecodeState(self._abstract_cache, token, done, self.keys)
        lowered = engine.decode.lower(self._program, self.leaves, state, np.int32(1), self.chunk)
        self._decode = lowered.compile()

    def program_text(self) -> str:
        """Optimized HLO of decode."""
        return self._decode.as_text() or ""

    def prefill(self, cache: KVCache) -> engine.DecodeState:
        """Reads the prompts and draws the first tokens."""
        return self._prefill(self.leaves, self.tokens, cache, self.keys)

    def decode(
        self, state: engine.DecodeState, steps: int
    ) -> tuple[np.ndarray, engine.DecodeState]:
        """(tokens int32 [B, steps], the state after)."""
        out, state = self._decode(self.leaves, state, np.int32(steps))
        return fetch(out)[:, :steps], state
