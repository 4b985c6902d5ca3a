"""The GPU kernels as a compiler for an H200 sees them; and the committed record of that."""

import json
import pathlib
import subprocess
import sys

import pytest

from ternax.kernels import aot
from ternax.kernels.shapes import SHAPES

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORDS = ROOT / "results" / "aot-h200" / "kernels.jsonl"


def check(record):
    """What a kernel must be before it is worth a GPU's time."""
    assert record["spill_bytes"] == record["serialized_wgmma"] == 0
    head = record["kernel"] == "head"
    # A byte of a head is one weight, of trits four: there are more slots a weight.
    assert record["alu_per_weight"] <= (0.36 if head else 0.30)
    assert record["issued_per_weight"] <= (0.85 if head else 0.50)
    assert record["loop"]["IGMMA"] == (8 if head else 32)  # what a loop's turn is counted by
    assert record["shared_bytes"] <= 232448 - 1024  # of a block on Hopper, barriers apart
    # What lies beside the arguments is the output and padded activations: no layer of weights.
    room = 4 * (record["k"] + 2 * record["n"]) * max(16, record["rows"]) + (1 << 16)
    assert record["temporary_bytes"] <= room
    assert not head or record["temporary_bytes"] < record["layer_bytes"] / 2


def test_kernels_compile_for_an_h200():
    if reason := aot.why_not():
        pytest.skip(reason)
    # A process of its own: jax takes up its CUDA plugin only before it first looks at devices.
    # K = 6912: the last tile of a row is half empty. N = 32002: a table's last tile nearly is.
    shapes = "--shapes=bitnet-2b4t:down,bitnet-700m:head"
    command = [sys.executable, "-m", "ternax.kernels.aot", shapes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    found = [(record["kernel"], record["k"], record["rows"]) for record in records]
    assert found == [(*of, rows) for of in (("decode", 6912), ("head", 1536)) for rows in (1, 16)]
    for record in records:
        check(record)


def test_the_committed_record_says_the_same():
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    assert {record["shape"] for record in records} >= {
        f"{model}:{part}"
        for model in ("70b", "bitnet-2b4t")
        for part in ("qkv", "o", "gate_up", "down", "head")
    }
    for record in records:
        assert record["kind"] == "compiled"  # and nothing in it is a time
        model, part = record["shape"].split(":")
        assert (record["k"], record["n"]) == SHAPES[model][part]
        check(record)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--device=a100"], "--device: expected one of h200, h100, found 'a100'"),
        (["--shapes=70b:embed"], "--shapes: expected one of"),
        (["--rows=17"], "--rows: expected integers from 1 to 16, found '17'"),
        (["--shapes=70b:head", "--rows=97"], "--rows: expected integers from 1 to 96, found '97'"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_bad_flags_are_one_line(argv, said, capsys):
    assert aot.main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(aot, "why_not", lambda: "it needs ptxas, in PATH")
    assert aot.main([]) == 2
    assert capsys.readouterr().err == (
        "error: cannot compile ahead of time here: it needs ptxas, in PATH\n"
    )
