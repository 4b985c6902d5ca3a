"""How the next token is drawn: greedy, temperature, top-k, top-p."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ternax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 takes the largest logit.
      top_k: only the k largest logits; 0 keeps all.
      top_p: only the smallest set whose probability reaches p; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature must be finite, 0 or more, found {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"top_k must be 0 or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], found {self.top_p}")


def largest(logits: jax.Array) -> jax.Array:
    """logits: f32 [B, V] -> int32 [B]: the first of the largest, or the first NaN, as argmax.

    argmax carries pairs and stays scalar on a CPU, 0.6 ms for 128,256 logits; a maximum and the
    first place that holds it are two vector passes, 0.13 ms.
    """
    most = jnp.max(logits, axis=-1, keepdims=True)
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    here = (logits == most) | jnp.isnan(logits)
    return jnp.min(jnp.where(here, places, logits.shape[-1]), axis=-1)


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """logits: f32 [B, V]; keys: one a row -> int32 [B]. A row's draw depends on its key alone."""
    if sampling.temperature == 0:
        return largest(logits)
    logits = logits / sampling.temperature
    falling = -jnp.sort(-logits, axis=-1)
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = jnp.where(logits < falling[:, sampling.top_k - 1, None], -jnp.inf, logits)
        falling = jnp.where(jnp.arange(logits.shape[-1]) < sampling.top_k, falling, -jnp.inf)
    if sampling.top_p < 1:
        before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
        before -= jax.nn.softmax(falling, axis=-1)
        kept = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True)
        logits = jnp.where(
            logits < jnp.take_along_axis(falling, kept - 1, axis=-1), -jnp.inf, logits
        )
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
