"""RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, across: str | None = None) -> jax.Array:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis. x: [..., D] -> f32 [..., D].

    across: the mesh axis that D is split over, inside `shard_map`: the mean is of all parts.
    """
    x = x.astype(jnp.float32)
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    mean = mean if across is None else jax.lax.pmean(mean, across)
    return weight * (x * jax.lax.rsqrt(mean + eps))


class RMSNorm(nnx.Module):
    """`rms_norm` with a learnt weight f32 [D]."""

    def __init__(self, features: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)
