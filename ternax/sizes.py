"""A decode step of one model, foretold by those of other models on the same machine.

    t = bytes / (efficiency * bandwidth) + layers * layer_s

Bytes over the bandwidth measured beside a run is that run's bound, so a memory that changes its
speed between runs moves both sides. `efficiency` is the share of the bandwidth that streams
reach, `layer_s` what a layer costs whatever its width: its calls, and threads that meet.
"""

import dataclasses
import statistics
from collections.abc import Sequence

from ternax import estimate


@dataclasses.dataclass(frozen=True)
class Timed:
    """A measured step.

    Attributes:
      step_s: what it took.
      bound_s: its bytes at the bandwidth measured beside it.
      layers: of the model.
    """

    step_s: float
    bound_s: float
    layers: int


@dataclasses.dataclass(frozen=True)
class Law:
    """What steps have in common. layer_s: 0 where they do not tell it."""

    efficiency: float
    layer_s: float

    def step_s(self, bound_s: float, layers: int) -> float:
        return bound_s / self.efficiency + layers * self.layer_s


def fit(steps: Sequence[Timed]) -> Law:
    """The law through steps, each weighing by its share, not by its seconds.

    One step, or several with as many bytes a layer, say nothing of a layer's own time, and
    noise may make it negative: then the median share of the bound alone is the law. ValueError
    without a step.
    """
    wide = [step.bound_s / step.layers for step in steps]
    if len(set(wide)) > 1:
        line = estimate.line(wide, [step.step_s / step.layers for step in steps])
        if line.fixed >= 0 and line.slope > 0:
            return Law(1 / line.slope, line.fixed)
    return Law(statistics.median(step.bound_s / step.step_s for step in steps), 0.0)


def leave_one_out(steps: dict[str, list[Timed]]) -> dict[str, Law]:
    """Model -> the law through the other models' steps; {} for fewer than two models."""
    return {
        model: fit([step for other, found in steps.items() if other != model for step in found])
        for model in (steps if len(steps) > 1 else ())
    }
