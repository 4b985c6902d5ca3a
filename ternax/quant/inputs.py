"""Quantizers of activations. Separate from weight schemes, since they survive packing."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from ternax.quant.scheme import EPS, straight_through


class InputQuant(Protocol):
    """A quantizer of activations: a frozen object, static in the linear that uses it."""

    def __call__(
        self, x: jax.Array, across: str | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """x: float [..., K] -> (int8 [..., K], f32 [..., 1]), or (x, None).

        across: the mesh axis that K is split over, inside `shard_map`: the scale is of all parts.
        """

    def fake_quant(self, x: jax.Array, across: str | None = None) -> jax.Array:
        """x as the quantizer leaves it, in floats, gradient straight through."""


@dataclasses.dataclass(frozen=True)
class Int8PerToken:
    """BitNet's W1.58A8 input: each token scaled by its own absolute maximum.

    q = clip(round(127 x / max|x|), -128, 127), rounding half to even; the maximum is
    clamped to 1e-5. Source: arXiv:2402.17764; transformers integrations/bitnet.py,
    whose order of operations (reciprocal, then times 127) this follows to the bit.
    """

    def __call__(self, x: jax.Array, across: str | None = None) -> tuple[jax.Array, jax.Array]:
        """x: float [..., K] -> (int8 [..., K], f32 [..., 1]) with x ~ q * scale."""
        x = x.astype(jnp.float32)
        peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        peak = peak if across is None else jax.lax.pmax(peak, across)
        inverse = (1.0 / jnp.maximum(peak, EPS)) * 127.0
        return jnp.clip(jnp.round(x * inverse), -128, 127).astype(jnp.int8), 1.0 / inverse

    def fake_quant(self, x: jax.Array, across: str | None = None) -> jax.Array:
        """x rounded as above, f32, gradient straight through."""
        q, scale = self(x, across)
        return straight_through(x, q.astype(jnp.float32) * scale)


@dataclasses.dataclass(frozen=True)
class Unquantized:
    """Activations stay floats (W2A16)."""

    def __call__(self, x: jax.Array, across: str | None = None) -> tuple[jax.Array, None]:
        return x, None

    def fake_quant(self, x: jax.Array, across: str | None = None) -> jax.Array:
        return x


INPUTS: dict[str, InputQuant] = {"int8": Int8PerToken(), "none": Unquantized()}
