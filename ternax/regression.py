"""Linear regression: coefficients with intervals, and whether a smaller model says as much."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from ternax.estimate import Interval, t_quantile


@dataclasses.dataclass(frozen=True)
class Fit:
    """y = X b + e by least squares, e independent and of one variance.

    Attributes:
      coefficients: f64 [p], b.
      covariance: f64 [p, p], of b.
      deviation: of the residuals, from their n - p degrees of freedom.
      degrees: n - p.
    """

    coefficients: np.ndarray
    covariance: np.ndarray
    deviation: float
    degrees: int

    def at(self, row) -> Interval:
        """row @ b, with its 95 % interval (Student's t). row: [p]; a unit vector: one of b."""
        row = np.asarray(row, float)
        middle = float(row @ self.coefficients)
        reach = t_quantile(self.degrees) * float(np.sqrt(row @ self.covariance @ row))
        return Interval(middle, middle - reach, middle + reach, self.degrees + len(row))

    def coefficient(self, index: int) -> Interval:
        return self.at(np.eye(len(self.coefficients))[index])


def fit(design: np.ndarray, y: np.ndarray) -> Fit:
    """design: f64 [n, p] of rank p < n. y: f64 [n]."""
    n, p = design.shape
    if not np.linalg.matrix_rank(design) == p < n:
        raise ValueError(f"a regression needs rank {p} and more than {p} points, found {n}")
    b = np.linalg.lstsq(design, y, rcond=None)[0]
    variance = float(((y - design @ b) ** 2).sum()) / (n - p)
    inverse = np.linalg.inv(design.T @ design)
    return Fit(b, variance * inverse, variance**0.5, n - p)


class FTest(NamedTuple):
    """A ratio that has the F distribution where the smaller model holds.

    Attributes:
      ratio: the statistic.
      degrees, error_degrees: of its numerator and denominator.
      p_value: how often a ratio this large comes by chance.
    """

    ratio: float
    degrees: float
    error_degrees: float
    p_value: float


def nested(full: np.ndarray, part: np.ndarray, y: np.ndarray) -> FTest | None:
    """Whether y needs what `full` has beyond `part`, whose columns it spans.

    With several responses, which may be correlated as those of one model are, this is Wilks'
    lambda, the determinants' ratio of the residuals, by Rao's F (Rao 1951, An asymptotic
    expansion of the distribution of Wilks' criterion), exact where responses or the columns
    in question are at most two. With one response it is the usual F test.

    Args:
      full, part: f64 [n, p] and [n, p - q].
      y: f64 [n] or [n, k].

    Returns:
      None where the points are too few, or responses are functions of each other.
    """
    y = y.reshape(len(y), -1)
    k, q = y.shape[1], np.linalg.matrix_rank(full) - np.linalg.matrix_rank(part)
    left = len(y) - np.linalg.matrix_rank(full)
    # Scaled, so that what remains is told from rounding whatever the unit.
    spread = np.where(y.std(axis=0) > 0, y.std(axis=0), 1.0)
    errors = _residuals(full, y / spread)
    if q < 1 or left < k or np.linalg.matrix_rank(errors, tol=1e-9 * len(y)) < k:
        return None
    sizes = [np.linalg.slogdet(e.T @ e)[1] for e in (errors, _residuals(part, y / spread))]
    several = k**2 + q**2 - 5
    root = np.sqrt((k**2 * q**2 - 4) / several) if several > 0 else 1.0
    degrees = float(k * q)
    error_degrees = float((left - (k - q + 1) / 2) * root - (degrees - 2) / 2)
    ratio = float(np.expm1((sizes[1] - sizes[0]) / root)) * error_degrees / degrees
    return FTest(ratio, degrees, error_degrees, f_tail(ratio, degrees, error_degrees))


def _residuals(design: np.ndarray, y: np.ndarray) -> np.ndarray:
    return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]


def f_tail(ratio: float, degrees: float, error_degrees: float) -> float:
    """P(F > ratio), by the incomplete beta function in f32: four digits hold."""
    x = error_degrees / (error_degrees + degrees * max(ratio, 0.0))
    return float(jax.scipy.special.betainc(error_degrees / 2, degrees / 2, x))
