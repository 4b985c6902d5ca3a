"""`NoisyLinear`: a projection read with errors, drawn anew for every token.

Where devices share what is read, a token's values are gathered and struck whole on each of them,
and each keeps its own: the errors are those of one device by construction, for every noise.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ternax.counter_hash import GOLDEN
from ternax.errors import UsageError
from ternax.nn.linear import PackedLinear, enter, weight_of
from ternax.nn.norm import RMSNorm
from ternax.noise.reads import ReadNoise
from ternax.quant.inputs import INPUTS
from ternax.row_order import Rows, rows_in
from ternax.sharding import Layout


class ReadLeaf(nnx.Variable):
    """A leaf of a noise at read time, with the layer axis of its stack."""


class NoisyCache(nnx.Module):
    """A noise on the keys and values that attention has stored.

    Attributes: as `NoisyLinear`'s of these names.
    """

    def __init__(self, noise: ReadNoise, key: jax.Array, strength: jax.Array):
        self.noise = noise.with_strength(0.0)
        self.key = ReadLeaf(key)
        self.strength = ReadLeaf(strength)

    def __call__(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """k, rotated, and v: f32 [B, T, G, E] -> the same as they are read."""
        key, strength = self.key[...], self.strength[...]
        salts = jnp.uint32(0), jnp.uint32(GOLDEN)
        found = [
            self.noise.apply(key ^ salt, value, strength)[0]
            for salt, value in zip(salts, (k, v), strict=True)
        ]
        return found[0], found[1]


class NoisyLinear(nnx.Module):
    """`inner` under a noise on its inputs, or on its outputs in units of scale |x|.

    Attributes:
      inner: the projection, whose weights stay as they are and keep their kernels.
      noise: at strength 0; the strength is a leaf, so that a sweep compiles once.
      key: uint32 [L, 2], of each layer.
      strength: f32 [L]; 0 where a layer is read without errors.
      layout: how the model is split over `tensor`; None: it is not.
    """

    def __init__(
        self,
        inner: PackedLinear,
        noise: ReadNoise,
        key: jax.Array,
        strength: jax.Array,
        layout: Layout | None = None,
    ):
        self.inner, self.layout = inner, layout
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
        across = self.inner.across
        if gate is not None or norm is not None:
            x = enter(x, gate, *weight_of(norm), across)
        if self.noise.domain == "inputs":
            y = self.inner(self._struck(x, across), layer)
        else:
            y, unit = self.inner(x, layer), self._unit(x, layer)
            steps = y / jnp.where(unit > 0, unit, 1)
            if self.layout is None or across is not None:
                noisy = self._struck(steps, None)
            else:
                noisy = self._struck(steps, self.layout.across, rows_in(self.layout, self.parts))
            y += unit * (noisy - steps)
        return y if residual is None else residual + y

    def _struck(self, values: jax.Array, across: str | None, rows: Rows | None = None):
        """Values [..., N] under the noise.

        across: the mesh axis that N is split over, inside `shard_map`; None: it is whole here.
        rows: in which order; None: as the devices stand.
        """

        def apply(whole):
            return self.noise.apply(self.key[...], whole, self.strength[...])[0]

        if across is None:
            return apply(values)
        whole, width = _gathered(values, across, -1), values.shape[-1]
        noisy = apply(whole) if rows is None else apply(whole[..., rows.order])[..., rows.source]
        first = lax.axis_index(across) * width
        return lax.dynamic_slice_in_dim(noisy, first, width, axis=-1)

    def _unit(self, x: jax.Array, layer) -> jax.Array:
        """f32 [..., N]: sqrt(sum of (scale x)^2) of each output's weights, all planes together."""
        scale, across = self.packed.scale, self.inner.across
        scale = scale[layer] if scale.ndim == 4 else scale
        if across is not None:
            x = _gathered(x, across, -1)
            scale = scale if self.inner.one_scale else _gathered(scale, across, 1)
        squares = jnp.square(INPUTS[self.inner.inputs].fake_quant(x))
        power = squares.reshape(*x.shape[:-1], scale.shape[1], -1).sum(axis=-1)
        power = jnp.einsum("...g,pgn->...n", power, jnp.square(scale))
        return jnp.broadcast_to(jnp.sqrt(power), (*x.shape[:-1], self.shape[1]))


def _gathered(value: jax.Array, across: str, axis: int) -> jax.Array:
    """What all devices along the mesh axis `across` hold, side by side."""
    return lax.all_gather(value, across, axis=axis % value.ndim, tiled=True)


def check_storable(model: nnx.Module) -> None:
    """UsageError where something is read with noise, which no stored model has."""
    for path, node in nnx.iter_modules(model):
        if isinstance(node, NoisyLinear | NoisyCache):
            raise UsageError(
                f"{'.'.join(map(str, path))} is read with noise, which no stored model has: save "
                "the model it was made from"
            )
