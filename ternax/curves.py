"""What the points of a sweep say together: lines with their errors, extrapolations, multipliers.

Every function takes the measured Records of one axis, by value, all else alike.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

from ternax import estimate, sizes, sweep
from ternax.record import Record
from ternax.sizes import Timed
from ternax.sweep import Axis, Sweep

ByValue = dict[str, list[Record]]


def curves(study: Sweep, records: list[Record]) -> list[Record]:
    """For each axis, at each value of the other one, what its points say."""
    found: list[Record] = []
    for axis in study.axes:
        others = [a for a in study.axes if a is not axis]
        for fixed in others[0].values if others else ("",):
            by_value: ByValue = {}
            for point in study.points:
                at = dict(point)
                if others and at[others[0].name] != fixed:
                    continue
                measured = [r for r in sweep.of_point(records, point) if sweep.is_measured(r)]
                if measured:
                    by_value[at[axis.name]] = measured
            where = f"{others[0].name} {fixed}: " if others else ""
            if len(by_value) > 1:
                found += [
                    dataclasses.replace(record, note=f"{where}{record.note}")
                    for record in _ALONG[axis.name](axis, by_value)
                ]
    return found


def _median(records: list[Record], name: str) -> float:
    return statistics.median(record.metrics[name] for record in records)


def _step_s(records: list[Record]) -> list[float]:
    return [record.metrics["tpot_ms_p50"] / 1e3 for record in records]


def _summary(record: Record, metrics: dict, note: str, **changes) -> Record:
    """A Record of the same setting that sums up, without samples unless given."""
    given: dict[str, Any] = {"samples": (), "sample_unit": ""} | changes
    return dataclasses.replace(record, metrics=metrics, note=note, **given)


def _line(by_value: ByValue, x_of) -> estimate.Line:
    """Through the step time of every round of every value."""
    pairs = [(x_of(record), t) for rs in by_value.values() for record, t in _timed(rs)]
    return estimate.line([x for x, _ in pairs], [t for _, t in pairs])


def _fitted(fit: estimate.Line) -> dict[str, float]:
    """A line t = a + b x as metrics; two points fit exactly and tell no error."""
    found = {"fixed_ms": 1e3 * fit.fixed, "slope_ms": 1e3 * fit.slope}
    if fit.count > 2:
        found |= {
            "fixed_error_ms": 1e3 * fit.fixed_error,
            "slope_error_ms": 1e3 * fit.slope_error,
            "worst_residual_share": fit.worst_share,
        }
    return found


def _timed(records: list[Record]) -> list[tuple[Record, float]]:
    return list(zip(records, _step_s(records), strict=True))


def _layers(axis: Axis, by_value: ByValue) -> Iterator[Record]:
    """t = a + bytes / rate through all depths, and the full depth from those below it."""
    values = [value for value in axis.values if value in by_value]
    last = by_value[values[-1]][-1]
    if len(values) > 2:
        fit = _line(by_value, lambda record: record.metrics["bytes_per_step"])
        rates = [r.metrics["read_bandwidth_gb_per_s"] for rs in by_value.values() for r in rs]
        # Noise may turn a line that is nearly flat: it has no rate then.
        streaming = {"streaming_gb_per_s": 1e-9 / fit.slope} if fit.slope > 0 else {}
        yield _summary(
            last,
            {
                "fixed_ms": 1e3 * fit.fixed,
                "fixed_error_ms": 1e3 * fit.fixed_error,
                "worst_residual_share": fit.worst_share,
                "read_bandwidth_gb_per_s": statistics.median(rates),
                **streaming,
            },
            f"t = a + bytes / rate through layers {', '.join(values)} ({fit.count} steps)",
            samples=tuple(t for rs in by_value.values() for t in _step_s(rs)),
            sample_unit="s/token",
        )
    whole = int(axis.values[-1])
    below = {value: rs for value, rs in by_value.items() if int(value) < whole}
    if len(below) > 1:
        yield _extrapolated(below, whole, by_value.get(str(whole), []))


def _extrapolated(below: ByValue, whole: int, measured: list[Record]) -> Record:
    """The axis' largest depth by the line t = a + b L through the smaller ones."""
    fit = _line(below, lambda record: record.layers)
    found, basis = fit.at(whole), next(reversed(below.values()))[-1]
    metrics = {
        "tpot_ms_p50": 1e3 * found.value,
        **_fitted(fit),
    }
    if found.low is not None and found.high is not None:
        metrics |= {"tpot_ms_low": 1e3 * found.low, "tpot_ms_high": 1e3 * found.high}
    if found.value > 0:  # else the points are noise, and there is no rate
        metrics["tokens_per_s"] = basis.batch / found.value
    said = f"{whole} layers were not measured"
    if measured:
        metrics["reference_tokens_per_s"] = _median(measured, "tokens_per_s")
        if found.value > 0:
            error = metrics["tokens_per_s"] / metrics["reference_tokens_per_s"] - 1
            metrics["prediction_error"] = error
        said = f"the reference is the measured median of {whole} layers"
    depths = ", ".join(below)
    return _summary(
        basis,
        metrics,
        f"t = a + b layers through {depths}, extrapolated to {whole}; {said}",
        kind="extrapolated",
        layers=whole,
    )


def _sizes(axis: Axis, by_value: ByValue) -> Iterator[Record]:
    """Each size by the law through the others: none takes part in its own."""
    middle = {value: _middle_round(records) for value, records in by_value.items()}
    laws = sizes.leave_one_out({value: [_timed_step(r)] for value, r in middle.items()})
    for value, law in laws.items():
        record, found = middle[value], _timed_step(middle[value])
        step_s = law.step_s(found.bound_s, found.layers)
        others = ", ".join(other for other in by_value if other != value)
        yield _summary(
            record,
            {
                "tokens_per_s": record.batch / step_s,
                "bound_tokens_per_s": record.metrics["bound_tokens_per_s"],
                "share_of_bound": found.bound_s / step_s,
                "efficiency_share": law.efficiency,
                "fixed_ms": 1e3 * law.layer_s * found.layers,
                "reference_tokens_per_s": record.metrics["tokens_per_s"],
                "prediction_error": found.step_s / step_s - 1,
            },
            f"t = bytes / (efficiency bandwidth) + layers a, through {others}; the reference is "
            f"the middle one of {len(by_value[value])} rounds",
            kind="predicted",
        )


def _middle_round(records: list[Record]) -> Record:
    """The one whose share of its bound is the median: rate and bandwidth belong together."""
    return sorted(records, key=lambda r: r.metrics["share_of_bound"])[len(records) // 2]


def _timed_step(record: Record) -> Timed:
    m = record.metrics
    return Timed(
        record.batch / m["tokens_per_s"], record.batch / m["bound_tokens_per_s"], record.layers
    )


def _multipliers(axis: Axis, by_value: ByValue) -> Iterator[Record]:
    """tokens/s of each value over the smallest one's, round by round."""
    values = [value for value in axis.values if value in by_value]
    first = {r.metrics["round"]: r.metrics["tokens_per_s"] for r in by_value[values[0]]}
    for value in values[1:]:
        ratios = [
            record.metrics["tokens_per_s"] / first[record.metrics["round"]]
            for record in by_value[value]
            if record.metrics["round"] in first
        ]
        if ratios:
            yield _summary(
                by_value[value][-1],
                {
                    "multiplier": statistics.median(ratios),
                    "tokens_per_s": _median(by_value[value], "tokens_per_s"),
                    "tpot_ms_p50": _median(by_value[value], "tpot_ms_p50"),
                },
                f"{axis.name} {value} over {axis.name} {values[0]}, {len(ratios)} rounds",
                samples=tuple(ratios),
                sample_unit="ratio",
            )


def _batches(axis: Axis, by_value: ByValue) -> Iterator[Record]:
    """Multipliers, and the line t = a + b rows, whose knee is a / b."""
    yield from _multipliers(axis, by_value)
    record = _slope(axis, by_value, lambda record: record.batch)
    m = record.metrics
    rising = min(m["slope_ms"], m["fixed_ms"]) > 0  # else the steps are noise: no knee
    knee = {"knee_batch": m["fixed_ms"] / m["slope_ms"]} if rising else {}
    yield dataclasses.replace(record, metrics=m | knee)


def _contexts(axis: Axis, by_value: ByValue) -> Iterator[Record]:
    yield _slope(axis, by_value, lambda record: record.context)


def _slope(axis: Axis, by_value: ByValue, x_of) -> Record:
    fit = _line(by_value, x_of)
    return _summary(
        next(reversed(by_value.values()))[-1],
        _fitted(fit),
        f"t = a + b {axis.name} through {', '.join(by_value)} ({fit.count} steps)",
        samples=tuple(t for rs in by_value.values() for t in _step_s(rs)),
        sample_unit="s/token",
    )


def _prompts(axis: Axis, by_value: ByValue) -> Iterator[Record]:
    """Reading a prompt is in the points' own records: nothing to draw a line through."""
    yield from ()


_ALONG = {
    "layers": _layers,
    "size": _sizes,
    "batch": _batches,
    "context": _contexts,
    "threads": _multipliers,
    "prompt": _prompts,
}


def memory_error(records: list[Record]) -> dict[str, float]:
    """Point -> planned over measured peak memory, less 1; points without a peak are left out."""
    found: dict[str, list[float]] = {}
    for record in records:
        m = record.metrics
        if sweep.is_measured(record) and "peak_memory_bytes" in m:
            error = m["planned_memory_bytes"] / m["peak_memory_bytes"] - 1
            found.setdefault(record.note.partition("; ")[0], []).append(error)
    return {point: statistics.median(errors) for point, errors in found.items()}
