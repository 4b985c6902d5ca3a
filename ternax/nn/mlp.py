"""The gated MLP: x + down(norm(act(gate) * up)), the norm in BitNet only."""

import jax
from flax import nnx

from ternax.config import ModelConfig
from ternax.nn.linear import QuantLinear, side_by_side
from ternax.nn.norm import RMSNorm


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

    def __call__(self, x: jax.Array, layer: jax.Array, *, norm: RMSNorm) -> jax.Array:
        """x + mlp(norm x). x: f32 [B, T, D] -> f32 [B, T, D]."""
        if hasattr(self, "gate_up"):
            both = self.gate_up(x, layer, norm=norm)
        else:
            both = side_by_side([self.gate, self.up], x, norm=norm)
        return self.down(both, layer, gate=self.activation, norm=self.sub_norm, residual=x)
