"""The benchmark multiplies what it says it does, and refuses in one line."""

import json
import re
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import bench, packing
from ternax.kernels.packing import FORMATS, Packed
from ternax.kernels.shapes import SHAPES


def run(capsys, *argv):
    """(exit code, records, stderr)."""
    code = bench.main(argv)
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_names_become_shapes():
    assert bench.find_shapes("70b:down") == [("70b:down", 28672, 8192, "trit2")]
    assert bench.find_shapes("32x5,64x7") == [("32x5", 32, 5, "trit2"), ("64x7", 64, 7, "trit2")]
    whole = bench.find_shapes("1b")
    assert [(k, n) for _, k, n, _ in whole] == list(SHAPES["1b"].values())
    assert whole[-1] == ("1b:head", 2048, 128256, "int8")
    assert bench.find_shapes("2b4t") == bench.find_shapes("bitnet-2b4t")
    assert bench.find_shapes("2b4t:o") == [("bitnet-2b4t:o", 2560, 2560, "trit2")]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--shapes=71b"], "expected KxN, or one of tiny-llama.*found '71b'"),
        (["--shapes=70b:up"], "part among qkv, o, gate_up, down, head; found '70b:up'"),
        (["--shapes=70b:"], "found '70b:'"),
        (["--shapes=0x5"], "found '0x5'"),
        (["--shapes="], "found ''"),
        (["--backend=nope"], "no backend is named 'nope'; there are: .*reference"),
        (["--batch=0"], "--batch: expected integers of at least 1, found '0'"),
        (["--batch=1,x"], "found '1,x'"),
        (["--seconds=soon"], "--seconds: expected a number, found 'soon'"),
        (["--shape=70b"], "unrecognized arguments: --shape=70b"),
    ],
    ids=str,
)
def test_refuses_in_one_line(capsys, argv, message):
    code, records, err = run(capsys, *argv)
    assert (code, records) == (2, [])
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_refuses_what_does_not_fit_before_making_it(capsys, monkeypatch):
    monkeypatch.setattr(bench, "free_bytes", lambda: 1 << 30)
    monkeypatch.setattr(bench, "fill", None)
    code, records, err = run(capsys, "--shapes=70b")
    assert (code, records) == (3, [])
    assert "70b:head needs 1.1 GB of weights, 1.1 GB are free" in err


def test_records_say_what_was_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench, "cache_bytes", lambda: 1 << 14)
    code, records, err = run(
        capsys,
        "--backend=reference",
        "--shapes=48x40,tiny-bitnet:head",
        "--batch=1,3",
        "--seconds=0",
    )
    assert (code, err) == (0, "")
    assert [(r["shape"], r["batch"], r["inputs"]) for r in records] == [
        ("48x40", 1, "int8"),
        ("48x40", 3, "int8"),
        ("tiny-bitnet:head", 1, "float32"),
        ("tiny-bitnet:head", 3, "float32"),
    ]
    for record in records:
        assert record["backend"] == "reference" and record["read_gb_per_s"] > 0
        assert len(record["samples_ms"]) == bench.MIN_SAMPLES
        median = statistics.median(record["samples_ms"])
        assert record["median_ms"] == pytest.approx(median)
        layer = record["n"] * FORMATS[record["format"]].row_bytes(record["k"])
        assert record["packed_gb_per_s"] == pytest.approx(layer / median / 1e6, rel=0.1, abs=1e-3)
        # The stack leaves the cache behind, and is no larger than it has to be.
        assert 4 << 14 <= record["layers"] * layer < (4 << 14) + layer


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_random_weights_are_valid(format):
    data = bench.fill(jnp.zeros((3, 1, 40, FORMATS[format].row_bytes(64)), jnp.uint8), format)
    assert not packing.has_invalid_codes(data, format)
    values = packing.unpack_numpy(np.asarray(data), format, 64)
    assert len(np.unique(values)) >= min(3, FORMATS[format].high)
    assert (values[0] != values[1]).any() and (values[..., 0] != values[..., 1]).any()


def test_a_sample_multiplies_every_layer_as_often():
    data = bench.fill(jnp.zeros((3, 1, 40, 12), jnp.uint8), "trit2")
    w = Packed(data, jnp.ones((3, 1, 1, 1)), shape=(48, 40))
    values = packing.unpack_numpy(np.asarray(data), "trit2", 48)[:, 0].astype(np.int64)
    x = np.arange(-48, 48, dtype=np.int8).reshape(2, 48)
    expected = sum(((x ^ i) @ values[i % 3]).sum() for i in range(3 * bench._PASSES))
    assert bench._products("reference", jnp.asarray(x), w) == expected


def test_unrunnable_backends_are_skipped_aloud(capsys, monkeypatch):
    absent = bench.BACKENDS["reference"].__class__("absent", lambda *a: "no such chip", None, None)
    table = {"reference": bench.BACKENDS["reference"], "absent": absent}
    monkeypatch.setattr(bench, "BACKENDS", table)
    assert bench.find_backends("all") == ["reference"]
    assert capsys.readouterr().err == "skipped absent: no such chip\n"


def test_cache_and_memory_are_plausible():
    assert 1 << 18 <= bench.cache_bytes() <= 1 << 32
    free = bench.free_bytes()
    assert free is None or free > 1 << 26


def test_a_backend_takes_settings_of_its_own(capsys):
    assert bench.settings("cpu:isa=avx2:threads=1") == {"isa": "avx2", "threads": 1}
    small = ["--shapes=64x48", "--seconds=0"]
    code, records, _ = run(capsys, "--backend=cpu:isa=portable:threads=1", *small)
    assert code == 0 and records[0]["backend"] == "cpu:isa=portable:threads=1"
    code, records, err = run(capsys, "--backend=cpu:speed=9", *small)
    assert (code, records) == (2, [])
    assert err.startswith("error: --backend: cpu has no setting 'speed'; it has isa, threads")
    code, records, err = run(capsys, "--backend=cpu:isa=none", *small)
    assert (code, records) == (2, []) and "'cpu:isa=none' cannot run: 'none'" in err
