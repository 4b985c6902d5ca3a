"""Intervals of a mean over a text, whose parts are not independent, by a bootstrap of groups.

What a text holds is a ratio: nats over bytes, agreements over tokens. Sequences of one file
are alike, so whole groups of them are drawn, never single ones.
"""

import numpy as np

from ternax.estimate import CONFIDENCE, Interval, wilson

RESAMPLES = 4000
# Fewer groups say too little of how groups differ.
MIN_GROUPS = 8
_AT_ONCE = 500


def bootstrap_mean(values, *, groups=None, confidence: float = CONFIDENCE, seed: int = 0):
    """`bootstrap_ratio` of the plain mean of values [n]."""
    values = np.asarray(values, np.float64)
    return bootstrap_ratio(
        values, np.ones(len(values)), groups=groups, confidence=confidence, seed=seed
    )


def bootstrap_ratio(
    numerators,
    denominators,
    *,
    groups=None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """sum(numerators) / sum(denominators), with the studentized bootstrap's interval.

    Groups are drawn with replacement, `resamples` times. Each draw's ratio R* has a standard
    error s* of its own, by linearization; the interval is R - q s for the quantiles q of
    (R* - R) / s*. It covers the ratio of the population that the groups were drawn from.

    Args:
      numerators, denominators: [n] each; the latter above zero.
      groups: int [n], equal within a group; None: each alone.
      seed: of the draws; the same arguments give the same interval.

    Returns:
      An Interval whose count is that of the groups; no ends under MIN_GROUPS of them.
    """
    sums = _by_group(numerators, denominators, groups)
    ratio, error = _ratio(sums[None])
    value, count = float(ratio[0]), sums.shape[0]
    if count < MIN_GROUPS:
        return Interval(value, None, None, count)
    if error[0] <= 1e-12 * abs(value):  # all alike, but for rounding
        return Interval(value, value, value, count)
    random = np.random.Generator(np.random.Philox(key=[seed, count]))
    found = []
    for first in range(0, resamples, _AT_ONCE):
        drawn = random.integers(count, size=(min(_AT_ONCE, resamples - first), count))
        ratios, errors = _ratio(sums[drawn])
        # A draw of one group again and again has no error; at MIN_GROUPS that is 1 in 2 million.
        found.append((ratios - value) / np.where(errors > 0, errors, np.inf))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(value, float(value - high * error[0]), float(value - low * error[0]), count)


def clustered_share(successes, trials, *, groups=None, confidence: float = CONFIDENCE) -> Interval:
    """sum(successes) / sum(trials) with Wilson's interval at the effective number of trials.

    That number is p (1 - p) / s^2, s being the ratio's standard error over groups: as many
    independent trials would tell as much. It is never above the true number, which also
    stands in where all trials ended alike.
    """
    sums = _by_group(successes, trials, groups)
    ratio, error = _ratio(sums[None])
    share, count, total = float(ratio[0]), sums.shape[0], float(sums[:, 1].sum())
    if count < MIN_GROUPS:
        return Interval(share, None, None, count)
    variance = float(error[0]) ** 2
    if variance > 0:
        total = min(total, share * (1 - share) / variance)
    return Interval(share, *wilson(share, total, confidence), count)


def _by_group(numerators, denominators, groups) -> np.ndarray:
    """f64 [groups, 2]: both sums of each group."""
    pairs = np.stack([np.asarray(numerators, float), np.asarray(denominators, float)], axis=-1)
    if pairs.ndim != 2 or not len(pairs) or pairs[:, 1].min() <= 0:
        raise ValueError(f"expected rows above zero in the denominator, found {pairs.shape}")
    if groups is None:
        return pairs
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((index.max() + 1, 2))
    np.add.at(sums, index, pairs)
    return sums


def _ratio(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio and standard error [R] of sums [R, groups, 2]; the error is 0 for one group."""
    count = sums.shape[1]
    top, bottom = sums[..., 0].sum(axis=1), sums[..., 1].sum(axis=1)
    ratio = top / bottom
    squares = np.square(sums[..., 0] - ratio[:, None] * sums[..., 1]).sum(axis=1)
    return ratio, np.sqrt(squares * count / max(count - 1, 1)) / bottom
