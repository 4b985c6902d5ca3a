"""Random bits as a pure function of (key, place): gigabytes of them in seconds.

Every place hashes its own number, so that draws do not depend on layout, order, mesh or on what
else is drawn. threefry would need minutes for the weights of a 70b.
"""

import jax
import jax.numpy as jnp

GOLDEN = 0x9E3779B9


def mix(x: jax.Array) -> jax.Array:
    """A permutation of uint32 with good avalanche (lowbias32, C. Wellons)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def lane_draw(base: jax.Array, word: jax.Array, lane) -> jax.Array:
    """uint32 of one lane of a place whose own hash is `base`, under the key word `word`.

    lane: an int, or a uint32 array.
    """
    if isinstance(lane, int):
        return mix(base ^ (word + jnp.uint32((GOLDEN * (lane + 1)) & 0xFFFFFFFF)))
    return mix(base ^ (word + jnp.uint32(GOLDEN) * (lane + jnp.uint32(1))))


def below(draw: jax.Array, probability) -> jax.Array:
    """bool: true with this probability, for uniform uint32 draws; never at 0, always at 1.

    probability: float or f32 [], also traced; resolved to 2^-32 and to 24 bits of itself.
    """
    probability = jnp.asarray(probability, jnp.float32)
    threshold = (jnp.minimum(probability, 1 - 2**-24) * 2.0**32).astype(jnp.uint32)
    return (draw < threshold) | (probability >= 1)
