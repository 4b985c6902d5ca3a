"""Noise on trits: int8 codes in {-1, 0, +1} of any shape."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ternax.errors import UsageError
from ternax.noise.model import NoiseModel


def _kept(rate: float, struck) -> np.ndarray:
    """A transition table: rows of `struck` at the rate, else the trit as it was."""
    return (1 - rate) * np.eye(3) + rate * np.broadcast_to(np.asarray(struck, float), (3, 3))


def _strike(key, codes, rate: float, replace: Callable[[jax.Array], jax.Array]):
    """`codes` with each element replaced at the rate: (codes, elements that differ)."""
    where, what = jax.random.split(key)
    struck = jax.random.bernoulli(where, rate, codes.shape)
    noisy = jnp.where(struck, replace(what).astype(codes.dtype), codes)
    return noisy, jnp.sum(noisy != codes, dtype=jnp.int32)


class SignFlip(NoiseModel):
    """A struck trit changes its sign; a zero stays one."""

    def __call__(self, key, value):
        return _strike(key, value, self.rate, lambda _: -value)

    def transition(self, density):
        return _kept(self.rate, np.eye(3)[::-1])


class TritOther(NoiseModel):
    """A struck trit becomes one of the two others, either as likely."""

    def __call__(self, key, value):
        def other(key):
            step = jax.random.randint(key, value.shape, 1, 3, jnp.int8)
            return (value + 1 + step) % 3 - 1

        return _strike(key, value, self.rate, other)

    def transition(self, density):
        return _kept(self.rate, (1 - np.eye(3)) / 2)


@dataclasses.dataclass(frozen=True)
class TritResample(NoiseModel):
    """A struck trit is drawn anew: uniformly, or with the density of non-zeros it had.

    Attributes:
      density: "same" draws non-zeros as often as the value has them, either sign as
        likely; "uniform" draws each of the three as often.
    """

    density: str = "same"

    def __post_init__(self):
        super().__post_init__()
        if self.density not in ("same", "uniform"):
            raise UsageError(
                f"trit_resample: density must be same or uniform, found {self.density!r}"
            )

    def __call__(self, key, value):
        share = jnp.mean(value != 0, dtype=jnp.float32) if self.density == "same" else 2 / 3

        def draw(key):
            kept, sign = jax.random.split(key)
            signs = 2 * jax.random.bernoulli(sign, 0.5, value.shape).astype(jnp.int8) - 1
            return jnp.where(jax.random.bernoulli(kept, share, value.shape), signs, 0)

        return _strike(key, value, self.rate, draw)

    def transition(self, density):
        share = density if self.density == "same" else 2 / 3
        return _kept(self.rate, [share / 2, 1 - share, share / 2])


@dataclasses.dataclass(frozen=True)
class Stuck(NoiseModel):
    """A struck cell holds one value for ever: `at` is -1, 0 or +1."""

    at: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.at not in (-1, 0, 1):
            raise UsageError(f"stuck: at must be -1, 0 or 1, found {self.at!r}")

    def __call__(self, key, value):
        return _strike(key, value, self.rate, lambda _: jnp.full(value.shape, self.at))

    def transition(self, density):
        return _kept(self.rate, np.eye(3)[self.at + 1])
