"""What a noise does to a product y = x W, before it is tried.

`closed_form` knows the density of non-zeros alone, and is right for weights whose signs are
independent of the inputs. `plug_in` knows the weights and the inputs, and holds for inputs with
a mean as well.
"""

import dataclasses
import math

import numpy as np

from ternax.noise.model import NoiseModel
from ternax.noise.reads import ReadNoise
from ternax.noise.trits import TritNoise


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Expected of noisy outputs, over all tokens and outputs together.

    Attributes:
      cosine: of the clean and the noisy outputs; 0 where either has no power.
      error_power: of their difference, over the clean outputs' power.
    """

    cosine: float
    error_power: float


def has_moments(noise: NoiseModel) -> bool:
    """Whether the mean and variance of a weight under the noise are known."""
    return type(noise).moments is not NoiseModel.moments and noise.has_law


def closed_form(noise: NoiseModel, density: float) -> float:
    """E[w w'] / sqrt(E[w^2] E[w'^2]) of symmetric trits w, non-zero with probability `density`.

    Raises:
      ValueError: a density outside (0, 1].
      NotImplementedError: a noise that is not on weights.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], found {density}")
    weights = np.array([density / 2, 1 - density, density / 2])
    mean, variance = noise.moments(density)
    power = weights @ (mean**2 + variance)
    shared = weights @ (np.array([-1.0, 0.0, 1.0]) * mean)
    return float(shared / math.sqrt(density * power)) if power > 0 else 0.0


def plug_in(noise: NoiseModel, codes: np.ndarray, x: np.ndarray) -> Prediction:
    """cos = y . m(W)x / sqrt(|y|^2 (|m(W)x|^2 + sum v(w) x^2)), m and v the moments of W or x.

    Args:
      codes: int8 [K, N], trits of one matrix; its scale, one for all, drops out.
      x: float [T, K], what the product multiplies.

    Raises:
      NotImplementedError: a noise on neither weights nor inputs.
    """
    x, w = np.asarray(x, np.float64), codes.astype(np.float64)
    clean = x @ w
    if isinstance(noise, ReadNoise):
        noisy_x, spread = noise.read_moments(x)
        moved = noisy_x @ w
        on_inputs = noise.domain == "inputs"
        variance = float(spread.sum()) * (float(np.square(w).sum()) if on_inputs else w.shape[1])
    elif isinstance(noise, TritNoise) and noise.span(len(w)) > 1:
        moved, variance = _grouped(noise, codes, x, clean)
    else:
        mean, of_code = noise.moments(float(np.mean(codes != 0)))
        place = codes.astype(np.int64) + 1
        moved = x @ mean[place]
        variance = float((np.square(x).sum(axis=0) @ of_code[place]).sum())
    power, noisy = float(np.square(clean).sum()), float(np.square(moved).sum()) + variance
    if power * noisy <= 0:
        return Prediction(0.0, noisy / power if power > 0 else 0.0)
    return Prediction(
        float((clean * moved).sum() / math.sqrt(power * noisy)),
        (float(np.square(moved - clean).sum()) + variance) / power,
    )


def _grouped(noise: TritNoise, codes, x, clean):
    """(mean outputs, summed variance) where `span` weights of an output fail together."""
    density = float(np.mean(codes != 0))
    mean, of_code = noise.with_strength(1.0).moments(density)
    place, rate, span = codes.astype(np.int64) + 1, noise.rate, noise.span(len(codes))
    struck = mean[place]
    moved = (1 - rate) * clean + rate * (x @ struck)
    variance = rate * float((np.square(x).sum(axis=0) @ of_code[place]).sum())
    for first in range(0, len(codes), span):
        part = slice(first, first + span)
        gap = x[:, part] @ (codes[part] - struck[part])
        variance += rate * (1 - rate) * float(np.square(gap).sum())
    return moved, variance
