"""The gated MLP: down(norm(act(gate x) * up x)), the norm in BitNet only."""

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.config import ModelConfig
from ternax.nn.linear import QuantLinear
from ternax.nn.norm import RMSNorm

ACTIVATIONS = {"silu": jax.nn.silu, "relu2": lambda x: jnp.square(jax.nn.relu(x))}


class MLP(nnx.Module):
    """Projections gate, up, down; packed, gate and up are one `gate_up`."""

    def __init__(self, config: ModelConfig, *, sub_norm: bool, rngs: nnx.Rngs):
        def linear(in_features, out_features):
            return QuantLinear(
                in_features, out_features, scheme=config.scheme, inputs=config.inputs, rngs=rngs
            )

        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)
        self.sub_norm = RMSNorm(config.intermediate_size, eps=config.norm_eps) if sub_norm else None
        self.activation = config.activation

    def __call__(self, x: jax.Array, layer: jax.Array) -> jax.Array:
        """x: f32 [B, T, D] -> f32 [B, T, D]."""
        if hasattr(self, "gate_up"):
            gate, up = self.gate_up(x, layer)
        else:
            gate, up = self.gate(x, layer), self.up(x, layer)
        hidden = ACTIVATIONS[self.activation](gate) * up
        if self.sub_norm is not None:
            hidden = self.sub_norm(hidden)
        return self.down(hidden, layer)
