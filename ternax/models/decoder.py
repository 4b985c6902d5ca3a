"""The decoder both families share: embedding, a stack of blocks, final norm, head.

The blocks are one `Block` whose leaves carry a leading layer axis. The forward pass
loops over the layer index, so compile time does not grow with depth. Packed leaves
go into the loop whole, with the index; all other leaves are cut to one layer.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ternax.config import ModelConfig
from ternax.nn import chained
from ternax.nn.attention import Attention
from ternax.nn.cache import KVCache, advance
from ternax.nn.linear import PackedStack
from ternax.nn.mlp import MLP
from ternax.nn.norm import RMSNorm
from ternax.nn.rope import rope_table
from ternax.nn.table import PackedTable, Table
from ternax.sharding import Layout, spread


class Block(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: ModelConfig, *, sub_norms: bool, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config, sub_norm=sub_norms, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config, sub_norm=sub_norms, rngs=rngs)

    def __call__(self, x, layer, rope, start, cache: KVCache | None):
        """x: f32 [B, T, D] -> (f32 [B, T, D], cache)."""
        x, cache = self.attn(x, layer, rope, start, cache, norm=self.attn_norm)
        return self.mlp(x, layer, norm=self.mlp_norm), cache


def table_std(config: ModelConfig, name: str) -> float:
    """Standard deviation of a random table: a head gives logits of order one, tied or not."""
    is_head = name == "head" or config.tie_embeddings
    return config.hidden_size**-0.5 if is_head else 1.0


class Decoder(nnx.Module):
    """A decoder-only model. Subclasses say whether their blocks have sub-norms.

    Attributes:
      embedding: the table tokens are looked up in.
      layers: one Block, every leaf with a leading axis of num_layers.
      norm: the final RMSNorm.
      head: the table logits are read from; absent when tied to the embedding.
      first_layer: the number of its first layer, where it is a part of a deeper model.
      layout: how its variables lie on a mesh; its modules are then those of one device, and run
        inside `sharding.spread`. None: they are whole.
    """

    sub_norms = False

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.first_layer = 0
        self.layout: Layout | None = None
        self.embedding: Table | PackedTable = Table(
            config.vocab_size, config.hidden_size, rngs=rngs, std=table_std(config, "embedding")
        )
        self.layers = self._stack(config, rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head: Table | PackedTable = Table(
                config.vocab_size, config.hidden_size, rngs=rngs, std=table_std(config, "head")
            )

    def _stack(self, config, rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(config, sub_norms=self.sub_norms, rngs=rngs)

        return make(rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens: int32 [B, T] -> logits f32 [B, T, V]; full causal forward, no cache."""
        graph, state = nnx.split(self)
        return _logits(graph, state, tokens)

    def forward(
        self,
        tokens: jax.Array,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        remat: bool = False,
    ):
        """The forward pass, for use inside a jitted function.

        Args:
          tokens: int32 [B, T]; with a cache, they continue it.
          cache: None for a full causal pass.
          last_only: logits of the last position alone.
          remat: a backward pass computes each layer's inner activations again.

        Returns:
          (logits f32 [B, T or 1, V], the cache with T tokens more, or None).
        """
        batch, length = tokens.shape
        first = jnp.int32(0) if cache is None else cache.length
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.start
        positions = first + jnp.arange(length) - start[:, None]
        x, cache = self._run_layers(self.embedding.embed(tokens), positions, start, cache, remat)
        if last_only:
            x = x[:, -1:]
        head = self.embedding if self.config.tie_embeddings else self.head
        logits = head.logits(self.norm(x))
        return logits, None if cache is None else advance(cache, length)

    def _run_layers(self, x, positions, start, cache, remat):
        rope = rope_table(self.config, jnp.maximum(positions, 0))
        if cache is not None and x.shape[1] == 1 and chained.why_not(self.layers, len(x)) is None:
            return chained.run(self.layers, x, rope, cache)
        graph, whole, sliced = nnx.split(self.layers, PackedStack, ...)

        def body(carry, step):
            x, cache = carry
            layer, leaves = step
            block = nnx.merge(graph, whole, leaves)
            return block(x, layer, rope, start, cache), None

        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x, cache), _ = lax.scan(
            jax.checkpoint(body) if remat else body, (x, cache), (layers, sliced)
        )
        return x, cache


def logits_of(graph, state, tokens: jax.Array) -> jax.Array:
    """Full causal logits f32 [B, T, V] of a model as `nnx.split` gives it; for use inside jit."""
    model = nnx.merge(graph, state)
    layout = model.layout
    if layout is None:
        return model.forward(tokens)[0]
    # A batch that does not divide is computed whole on every part.
    rows = layout.partition(["batch"] if tokens.shape[0] % layout.batch == 0 else [None])

    def body(state, tokens):
        return nnx.merge(graph, state).forward(tokens)[0]

    return spread(layout, body, (layout.specs(state), rows), rows)(state, tokens)


_logits = jax.jit(logits_of, static_argnums=0)
