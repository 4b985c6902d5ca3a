"""Embedding and head: one table [V, D], read by rows and as a matrix. Tied, it exists once."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ternax.kernels.packing import Packed, unpack_rows
from ternax.kernels.ternary_matmul import ternary_matmul
from ternax.nn.linear import PackedStack

TABLE_FORMATS = ("f32", "bf16", "int8", "int4")


class Table(nnx.Module):
    """A float table, f32 [V, D], drawn with standard deviation `std`."""

    def __init__(self, vocab_size: int, features: int, *, std: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, features)) * std)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens: int32 [...] -> f32 [..., D]."""
        return self.weight[...][tokens]

    def logits(self, x: jax.Array) -> jax.Array:
        """x: f32 [..., D] -> f32 [..., V]."""
        return x @ self.weight[...].T


class PackedTable(nnx.Module):
    """A packed table: rows of V, the canonical layout with K = D and N = V.

    As a head it multiplies 22-bit activations exactly (W8A22 for int8), see
    `kernels.ternary_matmul.to_digits`.

    Attributes:
      across: the mesh axis that V is split over, inside `shard_map`; None: it is whole here.
    """

    def __init__(self, packed: Packed, *, backend: str | None = None):
        self.across: str | None = None
        self.data = PackedStack(packed.data)
        self.scale = PackedStack(packed.scale)
        self.format, self.shape, self.parts = packed.format, packed.shape, packed.parts
        self.backend = backend

    @property
    def packed(self) -> Packed:
        return Packed(
            self.data.get_value(),
            self.scale.get_value(),
            None,
            self.format,
            shape=self.shape,
            parts=self.parts,
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens: int32 [...] -> f32 [..., D]."""
        if self.across is None:
            return unpack_rows(self.packed, tokens)
        rows = self.shape[1]
        here = tokens - lax.axis_index(self.across) * rows
        found = unpack_rows(self.packed, jnp.clip(here, 0, rows - 1))
        mine = (here >= 0) & (here < rows)
        return lax.psum(jnp.where(mine[..., None], found, 0.0), self.across)

    def logits(self, x: jax.Array) -> jax.Array:
        """x: f32 [..., D] -> f32 [..., V]."""
        y = ternary_matmul(x, self.packed, out_dtype=jnp.float32, backend=self.backend)
        if self.across is None:
            return y
        return lax.all_gather(y, self.across, axis=y.ndim - 1, tiled=True)
