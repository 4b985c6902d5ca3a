"""What a trit noise does to a product y = x W, before it is tried: the cosine of y and noisy y.

`closed_form` knows the density of non-zeros alone, and is right for weights whose signs are
independent of the inputs. `plug_in` knows the weights and the inputs, and holds for inputs with
a mean as well.
"""

import math

import numpy as np

from ternax.noise.model import NoiseModel

_TRITS = np.array([-1.0, 0.0, 1.0])


def moments(noise: NoiseModel, density: float) -> tuple[np.ndarray, np.ndarray]:
    """(mean, variance) of a noisy trit given the clean one, -1, 0 or +1: f64 [3] each."""
    table = noise.transition(density)
    mean = table @ _TRITS
    return mean, table @ _TRITS**2 - mean**2


def closed_form(noise: NoiseModel, density: float) -> float:
    """E[w w'] / sqrt(E[w^2] E[w'^2]) of symmetric trits w, non-zero with probability `density`.

    Raises:
      ValueError: a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], found {density}")
    weights = np.array([density / 2, 1 - density, density / 2])
    mean, variance = moments(noise, density)
    power = weights @ (mean**2 + variance)
    return float(weights @ (_TRITS * mean) / math.sqrt(density * power)) if power > 0 else 0.0


def plug_in(noise: NoiseModel, codes: np.ndarray, x: np.ndarray) -> float:
    """y . m(W)x / sqrt(|y|^2 (|m(W)x|^2 + sum v(w) x^2)) over all tokens and outputs.

    Args:
      codes: int8 [K, N], trits of one matrix; its scale, one for all, drops out.
      x: float [T, K], what the product multiplies.

    Returns:
      The cosine expected; 0 where the clean or the noisy output has no power.
    """
    x = np.asarray(x, np.float64)
    mean, variance = moments(noise, float(np.mean(codes != 0)))
    place = codes.astype(np.int64) + 1
    clean, moved = x @ codes.astype(np.float64), x @ mean[place]
    spread = float((np.square(x).sum(axis=0) @ variance[place]).sum())
    power = float(np.square(clean).sum()) * (float(np.square(moved).sum()) + spread)
    return float((clean * moved).sum() / math.sqrt(power)) if power > 0 else 0.0
