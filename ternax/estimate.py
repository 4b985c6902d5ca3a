"""What samples say: a median with its exact interval, and the line through times and bytes."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Median:
    """A median and the interval that holds the true one with at least 95 % confidence.

    Attributes:
      value: median of the samples.
      low, high: ends of the interval; None where the samples are too few for one.
      count: number of samples.
    """

    value: float
    low: float | None
    high: float | None
    count: int


def named(name: str, found: "Median | Interval") -> dict[str, float]:
    """As metrics of a record: the estimate, and its interval's ends where it has them."""
    values = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return {key: value for key, value in values.items() if value is not None}


def median(samples: Sequence[float], confidence: float = CONFIDENCE) -> Median:
    """The median with its order-statistic interval, which assumes nothing but independence.

    The k-th smallest and the k-th largest of n samples miss the true median with
    probability 2 P(Binomial(n, 1/2) < k); k is the largest that keeps this at
    1 - confidence. Five samples are too few for 95 %: six give their whole range.
    """
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples to take the median of")
    n, missed, k = len(ordered), 0.0, 0
    while k < n // 2:
        missed += 2 * math.comb(n, k) / 2**n
        if missed > 1 - confidence:
            break
        k += 1
    low, high = (ordered[k - 1], ordered[n - k]) if k else (None, None)
    return Median(statistics.median(ordered), low, high, n)


@dataclasses.dataclass(frozen=True)
class Line:
    """t = fixed + slope * x by least squares.

    Attributes:
      fixed, slope: of the line.
      fixed_error, slope_error: standard errors; zero for two points, which fit exactly
        and tell none.
      worst_share: largest |residual| / t.
      center: the x round which both errors are independent, and `center_error` that of the
        line there.
      count: points it goes through.
    """

    fixed: float
    slope: float
    fixed_error: float
    slope_error: float
    worst_share: float
    center: float
    center_error: float
    count: int

    def at(self, x: float) -> "Interval":
        """The line at x, also beyond its points, with its 95 % interval (Student's t)."""
        middle = self.fixed + self.slope * x
        if self.count < 3:
            return Interval(middle, None, None, self.count)
        error = math.hypot(self.center_error, (x - self.center) * self.slope_error)
        reach = t_quantile(self.count - 2) * error
        return Interval(middle, middle - reach, middle + reach, self.count)


def line(x: Sequence[float], t: Sequence[float]) -> Line:
    """Fits t = fixed + slope * x; every point weighs by 1/t, since times err by shares."""
    if len(x) != len(t):
        raise ValueError(f"a line needs as many x as t, found {len(x)} and {len(t)}")
    if len(set(x)) < 2:
        raise ValueError(f"a line needs two different x at least, found {sorted(set(x))}")
    if min(t) <= 0:
        raise ValueError(f"a line needs times above zero, found {min(t)}")
    weights = [1 / value**2 for value in t]
    total = sum(weights)
    mean_x = sum(w * v for w, v in zip(weights, x, strict=True)) / total
    mean_t = sum(w * v for w, v in zip(weights, t, strict=True)) / total
    spread = sum(w * (v - mean_x) ** 2 for w, v in zip(weights, x, strict=True))
    slope = sum(w * (u - mean_x) * (v - mean_t) for w, u, v in zip(weights, x, t, strict=True))
    slope /= spread
    fixed = mean_t - slope * mean_x
    residuals = [v - fixed - slope * u for u, v in zip(x, t, strict=True)]
    free = len(x) - 2
    noise = sum(w * r**2 for w, r in zip(weights, residuals, strict=True)) / free if free else 0.0
    return Line(
        fixed,
        slope,
        math.sqrt(noise * (1 / total + mean_x**2 / spread)),
        math.sqrt(noise / spread),
        max(abs(r) / v for r, v in zip(residuals, t, strict=True)),
        mean_x,
        math.sqrt(noise / total),
        len(x),
    )


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval.

    Attributes:
      value: the estimate.
      low, high: ends of the interval; None where the samples are too few for one.
      count: independent samples behind it: values, or groups of values.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    def map(self, function) -> "Interval":
        """The same under a rising function, such as exp."""
        low = None if self.low is None else function(self.low)
        high = None if self.high is None else function(self.high)
        return Interval(function(self.value), low, high, self.count)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t that |Student's t| of `degrees` degrees of freedom exceeds once in 1/(1 - confidence).

    By bisection of the distribution's finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs a degree of freedom at least, found {degrees}")

    def inside(t):  # P(|T| < t)
        angle = math.atan(t / math.sqrt(degrees))
        cosine = math.cos(angle) ** 2
        odd = degrees % 2
        term = math.cos(angle) if odd else 1.0
        total = term if degrees > 1 else 0.0
        for j in range(2 + odd, degrees - 1, 2):
            term *= cosine * (j - 1) / j
            total += term
        if odd:
            return 2 / math.pi * (angle + math.sin(angle) * total)
        return math.sin(angle) * total

    low, high = 0.0, 1.0
    while inside(high) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return high


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of independent, roughly normal values, such as the results of several seeds."""
    if not values:
        raise ValueError("no values to take the mean of")
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    reach = t_quantile(n - 1, confidence) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach, n)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """The mean of ours - theirs, pair by pair: what both share, such as a seed, drops out."""
    if len(ours) != len(theirs):
        raise ValueError(f"pairs need as many of each, found {len(ours)} and {len(theirs)}")
    return t_interval([a - b for a, b in zip(ours, theirs, strict=True)], confidence)


def wilson(share: float, count: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` independent trials: its two ends."""
    if not 0 <= share <= 1 or count <= 0:
        raise ValueError(f"expected a share in [0, 1] of trials, found {share} of {count}")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)
