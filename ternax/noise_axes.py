"""What several studies say of their models, a trained model an observation, and its place on axes.

Responses are the clean loss, the rise in loss at a strength, and the logarithm of the strength that
a loss is reached at; of a model's draws the mean counts.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ternax import noise_meta
from ternax.errors import UsageError
from ternax.noise_point import HOW
from ternax.noise_summary import LOSSES, TOLERATED
from ternax.record import Record

AXES = ("parameters", "trained_tokens", "tokens_per_parameter")
# Doublings that an axis extends over at least: updates are whole, so budgets are never quite equal.
LEAST_SPAN = 0.1


class Response(NamedTuple):
    """What is regressed. noise: "" for the clean loss; strength: of a rise; loss: of a tolerated
    strength, whose log2 it is; else bits per byte."""

    noise: str = ""
    strength: float | None = None
    loss: float | None = None

    @property
    def unit(self) -> str:
        return "bits/byte" if self.loss is None else "log2 of strength"

    def __str__(self) -> str:
        if self.loss is not None:
            return f"{self.noise}: strength that costs {self.loss:g} bits per byte"
        if self.strength is not None:
            return f"{self.noise} at {self.strength:g}: rise in loss"
        return "clean loss"


@dataclasses.dataclass(frozen=True)
class Model:
    """What one study says of its model.

    Attributes:
      record: its headline, the last.
      axes: name in AXES -> its value.
      responses: what is to be regressed.
      text: what was read, and what struck: equal for all that are taken together.
    """

    record: Record
    axes: dict[str, float]
    responses: dict[Response, float]
    text: str


def parse(text: str) -> tuple[str, ...]:
    """Axes of `--along`. UsageError for others."""
    axes = tuple(text.split(","))
    if not set(axes) <= set(AXES) or len(set(axes)) < len(axes) or len(axes) > 2:
        raise UsageError(f"--along: expected one or two of {', '.join(AXES)}, found {text!r}")
    return axes


def model(folder: str, along: Sequence[str]) -> Model:
    """A finished study's model. UsageError where it does not tell its place on the axes."""
    records = noise_meta.read(folder)
    points = noise_meta.draws(records, folder)
    heads = {_noise(r): r for r in records if r.note.split(HOW, 1)[0].endswith(TOLERATED)}
    if not heads:
        raise UsageError(f"--combine: {folder} holds no finished study: run its command again")
    last = list(heads.values())[-1]
    select = last.note.partition(" on ")[2].partition(f": {TOLERATED}")[0]
    points = {
        title: draws
        for title, draws in points.items()
        if title.partition(" on ")[2] == select and _noise(draws[0]) in heads
    }  # others are of projections alone
    first = next(iter(points.values()))
    responses = {Response(): noise_meta.clean(first)}
    for noise, head in heads.items():
        for name, loss in LOSSES.items():
            strength = head.metrics.get(f"tolerated_{name}")
            if strength is not None:
                responses[Response(noise, loss=loss)] = math.log2(strength)
    for draws in points.values():
        if all(draw.samples for draw in draws):  # else some are not finite
            key = Response(_noise(draws[0]), strength=draws[0].metrics["noise_strength"])
            responses[key] = noise_meta.mean(draws, "bits_per_byte_rise")
    _, _, text = first[0].note.split(HOW, 1)[-1].partition("; ")
    return Model(last, _axes(last, folder, along), responses, text)


def _noise(record: Record) -> str:
    """ "bitflip" of "bitflip at 0.01 on ..." or of "bitflip on ..."."""
    return record.note.partition(" at ")[0].partition(" on ")[0]


def _axes(head: Record, folder: str, along: Sequence[str]) -> dict[str, float]:
    metrics = dict(head.metrics)
    if "parameters" not in metrics:
        raise UsageError(
            f"--along: {folder} does not tell its model's size: run its command again, which "
            "measures nothing anew"
        )
    if "trained_tokens" in metrics:
        metrics["tokens_per_parameter"] = metrics["trained_tokens"] / metrics["parameters"]
    for axis in along:
        if axis not in metrics:
            raise UsageError(
                f"--along={axis}: {folder} does not tell what its model was trained on: models "
                "saved by experiments.train do"
            )
    return {axis: metrics[axis] for axis in AXES if axis in metrics}


def logarithms(models: Sequence[Model], along: Sequence[str]) -> np.ndarray:
    """f64 [n, axes]: log2 of each model's place."""
    return np.log2([[one.axes[axis] for axis in along] for one in models])


def design(models: Sequence[Model], along: Sequence[str]) -> np.ndarray:
    """f64 [n, 1 + axes]: ones, and log2 of each axis less its mean. UsageError for too few."""
    places = logarithms(models, along)
    for axis, column in zip(along, places.T, strict=True):
        if np.ptp(column) < LEAST_SPAN:
            low, high = 2 ** column.min(), 2 ** column.max()
            raise UsageError(
                f"--along={axis}: a slope needs models whose {axis} differ, found "
                f"{len(models)} of {low:g} to {high:g}"
            )
    columns = np.column_stack([np.ones(len(models)), places - places.mean(axis=0)])
    need = columns.shape[1] + 1
    if len(models) < need:
        raise UsageError(
            f"--along: a level and {len(along)} slopes with intervals need {need} models, found "
            f"{len(models)}: add sizes or seeds"
        )
    if np.linalg.matrix_rank(columns) < columns.shape[1]:
        raise UsageError(
            f"--along: {' and '.join(along)} change together in these {len(models)} models: add "
            "some where one differs and the other does not"
        )
    return columns
