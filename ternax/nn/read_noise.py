"""`NoisyLinear`: a projection read with errors, drawn anew for every token."""

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.nn.linear import PackedLinear, enter, weight_of
from ternax.nn.norm import RMSNorm
from ternax.noise.reads import ReadNoise
from ternax.quant.inputs import INPUTS


class ReadLeaf(nnx.Variable):
    """A leaf of a noise at read time, with the layer axis of its stack."""


class NoisyLinear(nnx.Module):
    """`inner` under a noise on its inputs, or on its outputs in units of scale |x|.

    Attributes:
      inner: the projection, whose weights stay as they are and keep their kernels.
      noise: at strength 0; the strength is a leaf, so that a sweep compiles once.
      key: uint32 [L, 2], of each layer.
      strength: f32 [L]; 0 where a layer is read without errors.
    """

    def __init__(self, inner: PackedLinear, noise: ReadNoise, key: jax.Array, strength: jax.Array):
        self.inner = inner
        self.noise = noise.with_strength(0.0)
        self.key = ReadLeaf(key)
        self.strength = ReadLeaf(strength)
        self.parts, self.format, self.shape = inner.parts, inner.format, inner.shape
        self.inputs = inner.inputs

    @property
    def packed(self):
        return self.inner.packed

    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array | None = None,
        *,
        gate: str | None = None,
        norm: RMSNorm | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """As `PackedLinear`: residual + quantized(norm(gate(x))) W, with errors."""
        if gate is not None or norm is not None:
            x = enter(x, gate, *weight_of(norm))
        key, strength = self.key[...], self.strength[...]
        if self.noise.domain == "inputs":
            y = self.inner(self.noise.apply(key, x, strength)[0], layer)
        else:
            y, unit = self.inner(x, layer), self._unit(x, layer)
            steps = y / jnp.where(unit > 0, unit, 1)
            y += unit * (self.noise.apply(key, steps, strength)[0] - steps)
        return y if residual is None else residual + y

    def _unit(self, x: jax.Array, layer) -> jax.Array:
        """f32 [..., N]: sqrt(sum of (scale x)^2) of each output's weights, all planes together."""
        scale = self.packed.scale
        scale = scale[layer] if scale.ndim == 4 else scale
        squares = jnp.square(INPUTS[self.inner.inputs].fake_quant(x))
        power = squares.reshape(*x.shape[:-1], scale.shape[1], -1).sum(axis=-1)
        power = jnp.einsum("...g,pgn->...n", power, jnp.square(scale))
        return jnp.broadcast_to(jnp.sqrt(power), (*x.shape[:-1], self.shape[1]))
