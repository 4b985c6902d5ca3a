"""Steps of a GPU's day on whatever device this is, at sizes at which nothing is found out."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.configs import get_config
from ternax.gpu import (
    attending,
    bandwidth,
    chains,
    contenders,
    exactness,
    facts,
    made,
    models,
    products,
    tune,
)
from ternax.kernels import backends, bench, ring, shapes
from ternax.kernels.packing import unpack_numpy


@pytest.fixture
def step(tmp_path, monkeypatch):
    """A Step with `records` and `lines` that it was given.

    A tiny program's time less its start may be less than nothing beside other work, so here a
    sample is the time of it all.
    """

    def whole(timed):
        start = time.perf_counter()
        timed.run(1)
        return (time.perf_counter() - start) / timed.calls

    monkeypatch.setattr(ring, "sample_s", whole)
    records, lines = [], []
    found = made.Step(100, records.append, lines.append, rehearse=True, folder=str(tmp_path))
    found.records, found.lines = records, lines
    return found


def test_facts_are_told_of_any_device(step):
    facts.run(step)
    [record] = step.records
    assert record.phase == "device" and record.device and "torch" in record.note
    assert f"JAX's platform: {jax.default_backend()}" in record.note


def test_reading_and_copying_have_a_rate_each(step):
    step.note = "CUDA graphs off"
    bandwidth.run(step)
    ours = [r for r in step.records if r.backend == "XLA"]
    assert len(ours) == len(bandwidth.XLA) * len(bandwidth.TINY)
    for record in ours:
        [(name, rate)] = record.metrics.items()
        assert name.startswith("copy" if record.note.startswith("copy") else "read")
        assert rate > 0 and record.sample_unit == "GB/s" and record.note.endswith("graphs off")


@pytest.mark.parametrize("format", ["trit2", "int8"])
def test_the_oracle_is_the_integer_product(format):
    w = exactness.weights((500, 30), format)
    x = ring.host_rows(5, 500)
    values = unpack_numpy(np.asarray(w.data[1, 0]), format, 500).astype(np.int64)
    found = exactness.oracle(jnp.asarray(x), w.data[1, 0], 500, format)
    np.testing.assert_array_equal(found, x.astype(np.int64) @ values)


def test_kernels_here_are_exact(step):
    exactness.run(step)
    assert len(step.records) == 7 * len({r.backend for r in step.records}) > 0
    assert all(r.note.startswith("exactness") for r in step.records)
    assert all(r.metrics["max_abs_error"] == 0 for r in step.records)
    assert any(line.startswith("without mosaic: backend 'mosaic' cannot") for line in step.lines)


def test_attention_here_is_as_the_reference(step):
    exactness.attend(step)
    own = [r for r in step.records if r.backend != "reference"]
    assert len(own) == len(step.records) and not any("WRONG" in r.note for r in own)
    assert all(r.metrics["relative_error"] < exactness.ATTENTION_ERROR for r in own)


def test_attention_has_a_time(step):
    attending.run(step)
    found = {(r.backend, r.batch, r.inputs): r for r in step.records}
    assert {("reference", 1, "bf16"), ("reference", 2, "int8")} <= found.keys()
    m = found["reference", 2, "int8"].metrics
    assert m["gb_per_s"] == pytest.approx(2 * 2 * 2 * 32 * (32 + 4) / m["call_us"] / 1e3)


def test_a_chain_here_says_why_not(step):
    chains.run(step)
    assert not step.records and "'mosaic' cannot run here" in step.lines[0]
    assert [link.shape for link in chains.links_of(get_config("70b"))] == [
        shapes.SHAPES["70b"][part] for part in ("o", "gate_up", "down", "qkv")
    ]


def test_one_wrong_sum_is_found(step, monkeypatch):
    """And a kernel that raises; the others are checked all the same."""
    right = backends.BACKENDS["reference"]

    def off_by_one(*args):
        return right.run(*args).at[0, 7].add(1)

    def broken(*args):
        raise RuntimeError("no such instruction\nand more")

    table = {
        name: backends.Backend(name, right.why_not, run, right.heuristic)
        for name, run in (("wrong", off_by_one), ("broken", broken), ("right", right.run))
    }
    monkeypatch.setattr(backends, "BACKENDS", table)
    monkeypatch.setattr(bench, "BACKENDS", table)
    exactness._check(step, list(table), "64x192", exactness.weights((64, 192)), (2,))
    notes = {r.backend: r.note for r in step.records}
    assert notes["wrong"] == "exactness, 2 rows: WRONG in 1 sums"
    assert notes["broken"].endswith("FAILED to run: RuntimeError: no such instruction")
    assert notes["right"] == "exactness, 2 rows: exact"


def test_contenders_take_turns_and_those_that_cannot_say_why(step):
    names = ("mosaic", "head", "reference", "XLA int8", "torch int8", "gemlite A8W158")
    step.read_gb_per_s = 10.0
    products.run(step, "tiny-bitnet", names, (4,))
    able = {r.backend for r in step.records}
    assert {"reference", "XLA int8", "head"} <= able
    assert {line.split(" without ")[1].partition(":")[0] for line in step.lines} == {*names} - able
    own = [r for r in step.records if r.backend == "XLA int8"]
    shapes = {r.config: r for r in own if r.note.startswith("K ")}
    assert {n.partition(":")[2] for n in shapes} == {"qkv", "o", "gate_up", "down", "head"}
    assert [r.config for r in step.records if r.backend == "head"] == ["tiny-bitnet:head"]
    down = shapes["tiny-bitnet:down"]
    m = down.metrics
    assert m["weight_bytes"] == 144 * 64 and (len(down.samples), down.batch) == (7, 4)
    assert m["gb_per_s"] == pytest.approx(144 * 64 / m["call_us"] / 1e3)
    assert m["share_of_read"] == pytest.approx(m["gb_per_s"] / 10)


def test_a_time_that_is_none_is_said_and_left_out(step, monkeypatch):
    times = iter([-1e-6, 1e-6, -1e-6, -1e-6, 2e-6, -1e-6, 1e-6])
    monkeypatch.setattr(ring, "sample_s", lambda timed: next(times))
    shape = contenders.Shape("tiny:o", 64, 48)
    assert products.sampled(step, shape, 3, {"XLA int8": object()}) == {}
    [line] = step.lines
    assert line.startswith("tiny:o x 3: XLA int8 failed: ValueError: 7 samples have a median of -1")


def test_a_program_of_a_contender_multiplies_its_own_weights():
    dot = contenders.CONTENDERS["XLA int8"](1 << 12)
    shape = contenders.Shape("x", 64, 48)
    program = dot.timed(shape, 3)
    x = np.asarray(program.carry[0], np.int64)  # before it is donated
    program.compile().run(1)
    for y, w in zip(program.carry[1], dot.weights(shape), strict=True):
        np.testing.assert_array_equal(y, x @ np.asarray(w, np.int64).T)
    assert dot.weight_bytes(shape) == 64 * 48 and len(dot.weights(shape)) == 2


def test_no_time_left_is_said(step):
    late = made.Step(0.0, step.records.append, step.lines.append, rehearse=True)
    exactness.run(late)
    bandwidth.run(late)
    assert not step.records
    assert [line for line in step.lines if "no time left" in line] == [
        "exactness: no time left for 1300x333 and what follows",
        "bandwidth: no time left at 1 MiB",
    ]


def test_tuning_says_why_not(step):
    tune.run(step)
    assert not step.records and "'mosaic' cannot run here" in step.lines[0]


def test_models_are_decoded_at_their_context(step):
    assert (models.at_context(1024).context, models.ending_at(8192).context) == (1153, 8192)
    models.run(step, "70b", (models.at_context(1024, 2, "int8"), models.prefill(2048)))
    phases = [r.phase for r in step.records]
    assert phases == ["create", "compile", "decode", "compile", "prefill"]
    decode = step.records[2]
    assert decode.experiment == made.EXPERIMENT and decode.config == "tiny-bitnet"
    assert (decode.batch, decode.context) == (2, 1 + 64 + 6)
    assert "64 slots of the cache began filled" in decode.note
    assert step.records[4].metrics["prompt_tokens"] == 64
