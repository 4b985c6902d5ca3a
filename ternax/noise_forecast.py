"""Rises in loss foreseen for any noise and, turned round, how strong a noise may be.

What gradients say (`ternax.response`) is right for small errors; where errors are large, the loss
rises faster. How much faster is read off one noise's measured rises, Gaussian weights.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from ternax.noise import NoiseModel
from ternax.noise.analog import Gaussian
from ternax.response import Response

# The noise that the curve is measured with, and its strengths.
PROBE, CURVE = "gaussian", (0.2, 0.3, 0.45, 0.6)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a model's loss is expected to do.

    Attributes:
      response: how it answers to small errors.
      curve: (rise to second order, measured rise) of the probe, rising.
    """

    response: Response
    curve: tuple[tuple[float, float], ...] = ()

    def rise(self, noise: NoiseModel, names: Sequence[str]) -> float | None:
        """Bits per byte for `names`, projections, under the noise; None where nothing is known.

        Of the probe itself it is the rise to second order: the curve is its own.
        """
        if not self.response.foresees(noise):
            return None
        small = self.response.under(noise, names).rise
        if isinstance(noise, Gaussian) and noise.kind == "additive":
            return small
        return curved(self.curve, small)

    def largest(
        self,
        noise_at: Callable[[float], NoiseModel],
        names: Sequence[str],
        loss: float,
        most: float,
    ) -> float | None:
        """The largest number up to `most` at which `noise_at` of it costs at most `loss`.

        The rise is taken to grow with the number. None where more than `most` is allowed, or none.
        """

        def costs(number):
            found = self.rise(noise_at(number), names)
            return math.inf if found is None else found

        low, high = most * 1e-9, most
        if costs(high) <= loss or costs(low) > loss:
            return None
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if costs(middle) <= loss else (low, middle)
        return low


def curved(curve: Sequence[tuple[float, float]], small: float) -> float | None:
    """The rise where gradients foresee `small`; None beyond the curve.

    The logarithm of measured over foreseen goes in straight lines from 0, where both agree.
    """
    known = [(x, y) for x, y in curve if x > 0 < y]
    if small > max([x for x, _ in known], default=0):
        return None
    ratios = [math.log(y / x) for x, y in known]
    return small * math.exp(float(np.interp(small, [0, *(x for x, _ in known)], [0, *ratios])))


# A word of memory under SECDED: 64 bits of data, 8 of check.
SECDED_BITS = 72


def behind_secded(rate: float) -> float:
    """The rate of bit errors that SECDED leaves of independent ones: of every bit that errs, those
    that have company among the other 71 of the word."""
    return rate * (1 - (1 - rate) ** (SECDED_BITS - 1))


def before_secded(rate: float) -> float:
    """The inverse: the raw rate of which `rate` is left."""
    low, high = rate, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if behind_secded(middle) < rate else (low, middle)
    return low
