"""A decode step as one call of a program a token, or as a call for each layer.

Every call costs the host a launch: what recording a whole step as one program saves is the
difference of the two. Both make the same tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax import engine
from ternax.edit import fit_kernels
from ternax.engine import DecodeState
from ternax.errors import UsageError
from ternax.kernels.memory import zeros
from ternax.models import Decoder
from ternax.nn.cache import KVCache, advance, init_cache
from ternax.nn.linear import PackedStack
from ternax.nn.rope import rope_table
from ternax.sampling import largest

DISPATCHES = ("program", "layer")


class Stepper:
    """Answers prompts greedily, a token at a time, each on the host before the next begins."""

    def __init__(self, model: Decoder, dispatch: str = "program", kv_dtype: str = "bf16"):
        if dispatch not in DISPATCHES:
            raise UsageError(
                f"--dispatch must be one of {', '.join(DISPATCHES)}, found {dispatch!r}"
            )
        self.config, self.kv_dtype = model.config, kv_dtype
        self._graph, self._leaves = nnx.split(fit_kernels(model))
        self._program = engine.Program(self._graph)
        self._step = self._layer_step(model) if dispatch == "layer" else self._program_step

    def answer(self, tokens: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
        """Yields int32 [B], max_tokens times.

        tokens: int32 [B, T], prompts of one length.
        """
        tokens = np.asarray(tokens, np.int32)
        engine.check_prompts(self.config, tokens, None, max_tokens)
        batch, length = tokens.shape
        cache = init_cache(self.config, batch, length + max_tokens, self.kv_dtype, zeros=zeros)
        keys = engine.row_keys(0, batch)
        state = engine.prefill(self._program, self._leaves, jnp.asarray(tokens), cache, keys)
        yield np.asarray(state.token)
        for _ in range(max_tokens - 1):
            state = self._step(state)
            yield np.asarray(state.token)

    def _program_step(self, state: DecodeState) -> DecodeState:
        _, state = engine.decode(self._program, self._leaves, state, jnp.int32(1), 1)
        return state

    def _layer_step(self, model: Decoder):
        """A step that calls one program in front, one a layer and one behind."""
        split: Any = nnx.split(model.layers, PackedStack, ...)
        graph, whole, rest = split
        parts = [
            jax.tree.map(lambda leaf, i=i: leaf[i], rest) for i in range(self.config.num_layers)
        ]

        def step(state: DecodeState) -> DecodeState:
            x, rope = _enter(
                self._graph, self._leaves, state.token, state.cache.length, state.cache.start
            )
            cache = state.cache
            for i, part in enumerate(parts):
                x, cache = _layer(graph, whole, part, x, jnp.int32(i), rope, cache)
            token, cache = _leave(self._graph, self._leaves, x, cache)
            return dataclasses.replace(state, token=token, cache=cache)

        return step


@functools.partial(jax.jit, static_argnums=0)
def _enter(graph, leaves, token, length, start):
    model = nnx.merge(graph, leaves)
    positions = length - start[:, None]
    return model.embedding.embed(token[:, None]), rope_table(model.config, positions)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=6)
def _layer(graph, whole, part, x, layer, rope, cache: KVCache):
    block = nnx.merge(graph, whole, part)
    return block(x, layer, rope, cache.start, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _leave(graph, leaves, x, cache: KVCache):
    model = nnx.merge(graph, leaves)
    head = model.embedding if model.config.tie_embeddings else model.head
    logits = head.logits(model.norm(x))[:, -1]
    return largest(logits), advance(cache, 1)
