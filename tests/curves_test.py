"""What points say together, on made steps whose answer is known."""

import numpy as np
import pytest

from ternax import curves
from ternax.experiments.scaling import screen
from ternax.record import Record
from ternax.sweep import Axis, Sweep, label

SPREAD = (0.99, 1.0, 1.02)  # of three rounds


def point(at, step_s, number, **changes) -> Record:
    batch = changes.get("batch", 1)
    metrics = {
        "tokens_per_s": batch / step_s,
        "tpot_ms_p50": 1e3 * step_s,
        "bound_tokens_per_s": changes.pop("bound", 2 / step_s),
        "bytes_per_step": changes.pop("nbytes", 1000),
        "read_bandwidth_gb_per_s": 40.0,
        "planned_memory_bytes": 1030,
        "peak_memory_bytes": 1000,
        "round": number,
    }
    metrics["share_of_bound"] = metrics["tokens_per_s"] / metrics["bound_tokens_per_s"]
    given = dict(config="8b", layers=4, batch=1, context=34) | changes
    return Record(
        experiment="scaling",
        scheme="absmean",
        inputs="int8",
        backend="cpu",
        device="a device",
        phase="decode",
        kind="measured",
        samples=(step_s,),
        sample_unit="s/token",
        metrics=metrics,
        note=f"{label(at)}; made",
        **given,
    )


def sweep(*axes) -> Sweep:
    return Sweep(tuple(Axis(name, values) for name, values in axes), ())


def rounds(name, value, step_s, **changes):
    return [
        point(((name, str(value)),), step_s * spread, i, **changes)
        for i, spread in enumerate(SPREAD, 1)
    ]


def test_layers_are_extrapolated_from_part_beside_the_whole():
    """t = 3 ms + 2 ms a layer, but the whole model takes 170 ms instead of 163."""
    depths = {4: 11e-3, 8: 19e-3, 10: 23e-3, 80: 170e-3}
    records = [
        r for n, t in depths.items() for r in rounds("layers", n, t, layers=n, nbytes=n * 10**6)
    ]
    line, beyond = curves.curves(sweep(("layers", ("4", "8", "10", "80"))), records)
    assert line.kind == "measured" and len(line.samples) == 12
    x = np.repeat([4e6, 8e6, 10e6, 80e6], 3)
    t = np.outer(list(depths.values()), SPREAD).ravel()
    slope, fixed = np.polyfit(x, t, 1, w=1 / t)
    assert line.metrics["fixed_ms"] == pytest.approx(1e3 * fixed)
    assert line.metrics["streaming_gb_per_s"] == pytest.approx(1e-9 / slope)
    m = beyond.metrics
    assert (beyond.kind, beyond.layers, beyond.samples) == ("extrapolated", 80, ())
    layers, t = np.repeat([4, 8, 10], 3), t[:9]
    slope, fixed = np.polyfit(layers, t, 1, w=1 / t)
    assert m["slope_ms"] == pytest.approx(1e3 * slope)
    assert m["tpot_ms_p50"] == pytest.approx(1e3 * (fixed + 80 * slope))
    assert m["tpot_ms_low"] < m["tpot_ms_p50"] < m["tpot_ms_high"]
    assert m["reference_tokens_per_s"] == pytest.approx(1 / 170e-3)
    expected = m["tokens_per_s"] / m["reference_tokens_per_s"] - 1
    assert m["prediction_error"] == pytest.approx(expected)
    assert expected == pytest.approx(170 / 163 - 1, abs=0.02)


def test_a_depth_that_was_not_run_has_no_reference_and_noise_no_rate():
    study = sweep(("layers", ("4", "8", "80")))
    records = [r for n, t in {4: 9e-3, 8: 2e-3}.items() for r in rounds("layers", n, t, layers=n)]
    (beyond,) = curves.curves(study, records)
    assert "reference_tokens_per_s" not in beyond.metrics
    assert "tokens_per_s" not in beyond.metrics and beyond.metrics["tpot_ms_p50"] < 0
    assert "80 layers were not measured" in beyond.note


def test_a_size_is_predicted_by_the_others():
    """Steps of bytes at 80 % of the bandwidth and 0.1 ms a layer; 70b is measured 5 % slower."""
    made = {"1b": (8e-3, 16), "8b": (40e-3, 32), "70b": (300e-3, 80)}
    records = []
    for name, (bound, layers) in made.items():
        t = (bound / 0.8 + 1e-4 * layers) * (1.05 if name == "70b" else 1)
        records += rounds("size", name, t, config=name, bound=1 / bound, layers=layers)
    small, middle, large = curves.curves(sweep(("size", tuple(made))), records)
    # Steps of a round are off by its spread, the bound is not: the middle round counts.
    m = large.metrics
    assert m["efficiency_share"] == pytest.approx(0.8) and m["fixed_ms"] == pytest.approx(8)
    assert m["prediction_error"] == pytest.approx(0.05)
    assert m["tokens_per_s"] == pytest.approx(1 / (0.3 / 0.8 + 8e-3))
    for found in (small, middle, large):
        m = found.metrics
        assert found.kind == "predicted" and abs(m["prediction_error"]) < 0.1
        assert m["share_of_bound"] == pytest.approx(m["tokens_per_s"] / m["bound_tokens_per_s"])
        expected = m["tokens_per_s"] / m["reference_tokens_per_s"] - 1
        assert m["prediction_error"] == pytest.approx(expected)


def test_batches_have_multipliers_and_a_knee():
    """t = 40 ms + 2 ms a row: four rows cost 48 ms, and from 20 on rows cost more."""
    records = [r for b in (1, 4, 16) for r in rounds("batch", b, 40e-3 + 2e-3 * b, batch=b)]
    *ratios, line = curves.curves(sweep(("batch", ("1", "4", "16"))), records)
    assert [r.metrics["multiplier"] for r in ratios] == pytest.approx([4 * 42 / 48, 16 * 42 / 72])
    assert all(len(r.samples) == 3 and r.sample_unit == "ratio" for r in ratios)
    assert line.metrics["fixed_ms"] == pytest.approx(40, rel=0.05)
    assert line.metrics["knee_batch"] == pytest.approx(20, rel=0.1)


def test_two_steps_tell_no_error():
    """A line through two points fits them whatever they are."""
    records = [point((("batch", b),), t, 1, batch=int(b)) for b, t in (("1", 0.02), ("4", 0.05))]
    *_, line = curves.curves(sweep(("batch", ("1", "4"))), records)
    assert line.metrics["slope_ms"] == pytest.approx(10)
    assert {"fixed_ms", "slope_ms", "knee_batch"} == line.metrics.keys()
    said = " ".join(" ".join(screen(sweep(("batch", ("1", "4"))), [line])).split())
    assert "b = 10 ms, of two steps, which tell no error" in said and "standard error" not in said


def test_a_line_from_below_zero_has_no_knee():
    records = [point((("batch", b),), t, 1, batch=int(b)) for b, t in (("1", 0.01), ("4", 0.08))]
    *_, line = curves.curves(sweep(("batch", ("1", "4"))), records)
    assert line.metrics["fixed_ms"] < 0 and "knee_batch" not in line.metrics


def test_a_grid_is_read_along_both_axes():
    study = sweep(("batch", ("1", "4")), ("context", ("32", "64")))
    records = [
        point(
            (("batch", b), ("context", c)),
            0.01 * int(b) ** 0.5 + 1e-4 * int(c),
            i,
            batch=int(b),
            context=int(c),
        )
        for b in ("1", "4")
        for c in ("32", "64")
        for i in (1, 2, 3)
    ]
    found = curves.curves(study, records)
    notes = [r.note for r in found]
    assert sum(note.startswith("context 32: ") for note in notes) == 2
    slopes = {r.note.partition(":")[0]: r.metrics.get("slope_ms") for r in found[-2:]}
    assert slopes == {"batch 1": pytest.approx(0.1), "batch 4": pytest.approx(0.1)}


def test_memory_errors_are_by_point():
    errors = curves.memory_error(rounds("batch", 1, 1e-3) + rounds("batch", 4, 1e-3))
    assert errors == {"batch 1": pytest.approx(0.03), "batch 4": pytest.approx(0.03)}
