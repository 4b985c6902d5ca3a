"""Noise on analog weights, in units of the largest: the trits, or codes over the largest code.

In a crossbar a weight w is the difference of two conductances, max(w, 0) and max(-w, 0), each
programmed, drifting and read with errors of its own; a trit's are 0 or the largest.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ternax.noise.model import NoiseModel, check_choice

_QUADRATURE = 64


@dataclasses.dataclass(frozen=True)
class AnalogNoise(NoiseModel):
    """A noise on f32 weights in [-1, 1]; any of them may change."""

    domain: ClassVar[str] = "weights"
    bounded: ClassVar[bool] = False

    def noisy(self, key, value, strength):
        """f32, the weights under noise."""
        raise NotImplementedError

    def apply(self, key, value, strength):
        noisy = jnp.where(strength > 0, self.noisy(key, value, strength), value)
        return noisy, jnp.sum(noisy != value, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Gaussian(AnalogNoise):
    """w + sigma e, e standard normal; "multiplicative": w (1 + sigma e).

    Attributes:
      sigma: in units of the largest weight, which for trits is their scale.
    """

    sigma: float
    kind: str = "additive"

    def __post_init__(self):
        super().__post_init__()
        check_choice("gaussian", "kind", self.kind, ("additive", "multiplicative"))

    def noisy(self, key, value, strength):
        size = 1.0 if self.kind == "additive" else value
        return value + strength * size * jax.random.normal(key, value.shape)

    def moments(self, density):
        trits = np.array([-1.0, 0.0, 1.0])
        size = 1.0 if self.kind == "additive" else trits
        return trits, np.broadcast_to(np.square(self.sigma * size), 3)


@dataclasses.dataclass(frozen=True)
class _Pairs(AnalogNoise):
    """Differential pairs of conductances, in units of the largest."""

    def conductance(self, normals, target, strength):
        """What is read of a cell programmed to `target` in [0, 1]; normals: one array a source."""
        raise NotImplementedError

    sources: ClassVar[int] = 1

    def noisy(self, key, value, strength):
        pair = []
        for i, target in enumerate((jnp.maximum(value, 0), jnp.maximum(-value, 0))):
            drawn = jax.random.normal(jax.random.fold_in(key, i), (self.sources, *value.shape))
            pair.append(self.conductance(drawn, target, strength))
        return self.compensated(pair[0] - pair[1], value, pair)

    def compensated(self, noisy, value, pair):
        return noisy

    def moments(self, density):
        cell = [_cell_moments(self, target) for target in (0.0, 1.0)]
        (low, low_var), (high, high_var) = cell
        gain = self.gain(density, low, high)
        mean = np.array([low - high, 0.0, high - low]) * gain
        variance = np.array([low_var + high_var, 2 * low_var, low_var + high_var]) * gain**2
        return mean, variance

    def gain(self, density, low, high):
        return 1.0


@functools.lru_cache(maxsize=64)  # a study asks for every matrix; the grid has 64^3 points
def _cell_moments(noise: _Pairs, target: float) -> tuple[float, float]:
    """(mean, variance) of one cell, by Gauss-Hermite quadrature over all sources."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE)
    grids = np.meshgrid(*[nodes] * noise.sources, indexing="ij")
    law = functools.reduce(np.multiply.outer, [weights / weights.sum()] * noise.sources)
    found = np.asarray(
        noise.conductance(
            jnp.asarray(np.stack(grids), jnp.float32),
            jnp.full(grids[0].shape, target, jnp.float32),
            noise.strength,
        ),
        np.float64,
    )
    mean = float((law * found).sum())
    return mean, float((law * found**2).sum()) - mean**2


@dataclasses.dataclass(frozen=True)
class Pcm(_Pairs):
    """Phase-change memory: programming, drift and read noise of differential pairs.

    Deviation of a programmed cell of x = g / gmax, gmax 25 uS: .26348 + 1.9650 x - 1.1731 x^2 uS.
    Drift: g (t / 20 s)^-nu, nu normal with mean clip(-.0155 ln x + .0244, .049, .1) and deviation
    clip(-.0125 ln x - .0059, .008, .045). Read noise: g Q sqrt(ln((t + tr) / 2 tr)), Q =
    min(.0088 / x^.65, .2), tr = 250 ns. Source: aihwkit, inference/noise/pcm.py, after
    Nandakumar et al., ICECS 2019.

    Attributes:
      size: 1 is the device as measured; it multiplies every deviation.
      seconds: since 20 s after programming; 0 has no drift.
      compensate: drift compensation, one factor for the whole matrix: the sum of all conductances
        now is made what it was meant to be.
    """

    size: float
    seconds: float = 0.0
    compensate: bool = True
    sources: ClassVar[int] = 3

    def conductance(self, normals, target, strength):
        programming, drift, read = normals
        sigma = (0.26348 + 1.9650 * target - 1.1731 * target**2) / 25.0
        g = jnp.maximum(target + strength * sigma * programming, 0)
        log_x = jnp.log(jnp.maximum(target, 1e-7))
        mu = jnp.clip(-0.0155 * log_x + 0.0244, 0.049, 0.1)
        spread = jnp.clip(-0.0125 * log_x - 0.0059, 0.008, 0.045)
        nu = jnp.abs(mu + strength * spread * drift)
        elapsed = self.seconds + 20.0
        later = g * (elapsed / 20.0) ** -nu
        q = jnp.minimum(0.0088 / jnp.maximum(g**0.65, 1e-3), 0.2)
        grown = math.sqrt(math.log((elapsed + 250e-9) / 500e-9))
        return jnp.maximum(later * (1 + strength * q * grown * read), 0)

    def compensated(self, noisy, value, pair):
        if not self.compensate:
            return noisy
        now = jnp.sum(pair[0] + pair[1])
        return noisy * jnp.sum(jnp.abs(value)) / jnp.where(now > 0, now, 1)

    def gain(self, density, low, high):
        now = density * high + (2 - density) * low
        return density / now if self.compensate else 1.0


# Deviation in uS over x = g / 40 uS, from the constant up, by seconds after programming.
_RERAM = {
    1: (0.348, 16.030, -43.853, 45.393, -16.815),
    86400: (0.701, 22.086, -50.773, 47.095, -16.458),
    172800: (0.782, 20.274, -43.507, 37.062, -11.934),
}


@dataclasses.dataclass(frozen=True)
class Reram(_Pairs):
    """Resistive memory: deviation of a cell, a polynomial of degree 4 in its conductance.

    Source: aihwkit, inference/noise/reram.py, fitted to Wan et al., Nature 608 (2022), 504.

    Attributes:
      size: 1 is the device as measured.
      seconds: after programming: 1, a day (86400) or two (172800).
    """

    size: float
    seconds: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_choice("reram", "seconds", self.seconds, tuple(_RERAM))

    def conductance(self, normals, target, strength):
        sigma = sum(c * target**i for i, c in enumerate(_RERAM[self.seconds])) / 40.0
        return jnp.maximum(target + strength * sigma * normals[0], 0)
