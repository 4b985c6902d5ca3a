"""Rotary position embedding, half-split layout, with Llama 3.1 frequency scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ternax.config import ModelConfig, RopeScaling
from ternax.kernels.attention import rotate

__all__ = ["frequencies", "rope_table", "rotate"]


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position for each rotary pair: f32 [E / 2].

    Source of the scaling: transformers modeling_rope_utils.py, `llama3`.
    """
    base = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        wavelength = 2 * math.pi / base
        ratio = scaling.original_context / wavelength
        keep = (ratio - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = np.clip(keep, 0.0, 1.0)
        base = keep * base + (1 - keep) * base / scaling.factor
    return base.astype(np.float32)


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin at `positions` int32 [B, T]: two f32 [B, T, 1, E / 2]."""
    rates = jnp.asarray(frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
    angles = positions[..., None, None].astype(jnp.float32) * rates
    return jnp.cos(angles), jnp.sin(angles)
