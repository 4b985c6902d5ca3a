"""How far losses of one run may lie from those of others that differ by the order of sums alone.

Sums in another order round otherwise, a trit on an edge tips over, and two runs on two meshes
drift apart. What they drift is the noise; a band round their mean says what is more than that.
A drift of the weights changes a loss by its product with the gradient, so losses of steep batches
differ more: distances are taken in units of the step's gradient norm.
"""

import dataclasses

import numpy as np

from ternax.estimate import t_quantile

# Chance that a run within noise is found outside of it, all comparisons together, were the
# losses of its steps independent.
FALSE_ALARM = 0.01


@dataclasses.dataclass(frozen=True)
class Band:
    """Where the losses of one more run lie, step by step.

    Attributes:
      mean: f64 [S], nats a token; of the runs it was made from, at each step.
      reach: f64 [S], nats a token; how far from it.
    """

    mean: np.ndarray
    reach: np.ndarray

    def shares(self, losses: np.ndarray, first: int = 0) -> np.ndarray:
        """Distance from the mean over the reach, f64 [S - first], of the steps behind `first`.

        Above 1 is outside. Equal losses have share 0 also where the runs do not differ at all.
        """
        off = np.abs(losses[first:] - self.mean[first:])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(off > 0, off / self.reach[first:], 0.0)


def band_of(losses: np.ndarray, gradient_norms: np.ndarray, stretch: int, comparisons: int) -> Band:
    """The prediction interval of one more run, by Student's t.

    The standard deviation about each step's mean, over its gradient norm, is pooled over stretches
    of steps, in which it is taken as one; of w steps and n runs it has w (n - 1) degrees of
    freedom, were steps independent. A drift of the weights lasts, so that false alarms are more.

    Args:
      losses: f64 [n, S] of n >= 2 undisturbed runs, nats a token.
      gradient_norms: f64 [n, S]; a step's is the mean of its runs'.
      stretch: steps that share a standard deviation.
      comparisons: losses that will be held against it; together they exceed it by chance with
        probability FALSE_ALARM at most (Bonferroni), if they are independent.
    """
    runs, steps = losses.shape
    if runs < 2:
        raise ValueError(f"the spread of runs needs two at least, found {runs}")
    mean, slope, reach = losses.mean(axis=0), gradient_norms.mean(axis=0), np.empty(steps)
    drifts = (losses - mean) / slope
    for first in range(0, steps, stretch):
        part = slice(first, first + stretch)
        degrees = drifts[:, part].shape[1] * (runs - 1)
        deviation = np.sqrt(np.square(drifts[:, part]).sum() / degrees)
        t = t_quantile(degrees, 1 - FALSE_ALARM / comparisons)
        reach[part] = t * deviation * slope[part] * np.sqrt(1 + 1 / runs)
    return Band(mean, reach)
