"""Noise at read time: on what a projection multiplies, and on what it sums up.

Drawn anew for every token, from the signs of the token's own values: the same token in the same
layer meets the same noise whatever batch, order or cache it comes in, and another token another.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ternax.counter_hash import GOLDEN, mix
from ternax.noise.model import NoiseModel
from ternax.noise.words import WHAT, draws, key_words


@dataclasses.dataclass(frozen=True)
class ReadNoise(NoiseModel):
    """A noise on f32 [..., K]; counts nothing, since it changes all."""

    when: ClassVar[str] = "read"
    domain: ClassVar[str] = "inputs"
    bounded: ClassVar[bool] = False

    def noisy(self, key, value, strength):
        """The values under noise. key: uint32 [2]."""
        raise NotImplementedError

    def read_moments(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What comes of inputs f64 [T, K]: their mean [T, K], and a variance a token [T].

        The variance is that of an input, or in domain "accumulator" of an output.
        """
        key = jnp.zeros(2, jnp.uint32)
        return np.asarray(self.noisy(key, jnp.asarray(x), self.strength)), np.zeros(len(x))

    def apply(self, key, value, strength):
        noisy = jnp.where(strength > 0, self.noisy(key_words(key), value, strength), value)
        return noisy, jnp.sum(noisy != value, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class InputGaussian(ReadNoise):
    """x + sigma max|x| e for each token, e standard normal."""

    sigma: float

    def noisy(self, key, value, strength):
        return value + strength * _peak(value) * normal(key, value, value.shape[-1])

    def read_moments(self, x):
        return x, np.square(self.sigma * np.abs(x).max(axis=-1))


@dataclasses.dataclass(frozen=True)
class InputClip(ReadNoise):
    """A converter of too small a range: x beyond (1 - cut) max|x| of its token ends there."""

    cut: float
    bounded: ClassVar[bool] = True

    def noisy(self, key, value, strength):
        limit = (1 - strength) * _peak(value)
        return jnp.clip(value, -limit, limit)


@dataclasses.dataclass(frozen=True)
class InputGrid(ReadNoise):
    """A converter of few bits: x rounded to multiples of step max|x| of its token.

    b bits are a step of 2 / (2^b - 1): 0.0079 for 8, 0.133 for 4.
    """

    step: float

    def noisy(self, key, value, strength):
        grid = jnp.where(strength > 0, strength, 1) * _peak(value)
        grid = jnp.where(grid > 0, grid, 1)
        return jnp.round(value / grid) * grid


@dataclasses.dataclass(frozen=True)
class ReadGaussian(ReadNoise):
    """Independent Gaussian errors of all weights at each read, as the output sees them.

    Weights w + sigma e have outputs y + sigma |x| e' (times the scale), e' standard normal: so no
    weight is touched, and the product keeps its speed.
    """

    sigma: float
    domain: ClassVar[str] = "accumulator"

    def noisy(self, key, value, strength):
        return value + strength * normal(key, value, value.shape[-1])

    def read_moments(self, x):
        return x, np.square(self.sigma) * np.square(x).sum(axis=-1)

    def moments(self, density):
        return np.array([-1.0, 0.0, 1.0]), np.full(3, self.sigma**2)


def _peak(x):
    return jnp.max(jnp.abs(x), axis=-1, keepdims=True)


def token_hash(x: jax.Array) -> jax.Array:
    """uint32 [..., 1] of the signs of each token's values, [..., K].

    Of signs, since all else differs between batches and compilations by rounding.
    """
    signs = (jnp.sign(x) + 1).astype(jnp.uint32)
    places = jnp.arange(x.shape[-1], dtype=jnp.uint32) * jnp.uint32(GOLDEN)
    return jnp.sum(mix(signs ^ mix(places)), axis=-1, keepdims=True, dtype=jnp.uint32)


def normal(key: jax.Array, token: jax.Array, count: int) -> jax.Array:
    """Standard normals f32 [..., count], drawn from each token [..., K]'s own values."""
    place = mix(token_hash(token)) + jnp.arange(count, dtype=jnp.uint32)
    first, second = (draws(key, place, lane, WHAT) for lane in (0, 1))
    # Box and Muller; the first uniform is never 0.
    radius = jnp.sqrt(-2 * jnp.log((first >> 8).astype(jnp.float32) * 2**-24 + 2**-25))
    return radius * jnp.cos(2 * jnp.pi * (second >> 8).astype(jnp.float32) * 2**-24)
