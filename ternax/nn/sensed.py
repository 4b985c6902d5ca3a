"""`SensedLinear`: a projection whose input and output can be nudged, to see what the loss does."""

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.nn.linear import PackedLinear, enter, weight_of
from ternax.nn.norm import RMSNorm


class Nudge(nnx.Variable):
    """What is added somewhere, zero; the loss is differentiated by it."""


class SensedLinear(nnx.Module):
    """`inner`, with a nudge added to what it multiplies and one to what comes out.

    Attributes:
      inner: the projection, packed; its quantizer passes gradients straight through.
      at_input, at_output: f32 [L, B, T, K] and [L, B, T, N].
    """

    def __init__(self, inner: PackedLinear, layers: int, batch: int, length: int):
        self.inner = inner
        self.parts, self.format, self.shape = inner.parts, inner.format, inner.shape
        k_size, n = inner.shape
        self.at_input = Nudge(jnp.zeros((layers, batch, length, k_size), jnp.float32))
        self.at_output = Nudge(jnp.zeros((layers, batch, length, n), jnp.float32))

    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array | None = None,
        *,
        gate: str | None = None,
        norm: RMSNorm | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """As `PackedLinear`."""
        if gate is not None or norm is not None:
            x = enter(x, gate, *weight_of(norm))
        y = self.inner(x + self.at_input[...], layer) + self.at_output[...]
        return y if residual is None else residual + y
