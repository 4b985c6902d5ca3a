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


# Instructions a weight, of the ALU and of all. A byte of a head is one weight, of trits four;
# matrix shifts besides masking, once for all rows of a piece.
MOST = {"decode": (0.30, 0.52), "matrix": (0.65, 1.20), "head": (0.36, 0.85)}


def check(record):
    """What a kernel must be before it is worth a GPU's time."""
    assert record["spill_bytes"] == record["serialized_wgmma"] == 0
    alu, issued = MOST[record["kernel"]]
    assert record["alu_per_weight"] <= alu
    assert record["issued_per_weight"] <= issued
    config, head = record["config"], record["kernel"] == "head"
    # What a loop's turn is counted by.
    assert record["loop"]["IGMMA"] == (8 if head else 16 * config.get("strip", 1))
    assert record["shared_bytes"] <= 232448 - 1024  # of a block on Hopper, barriers apart
    # What lies beside the arguments: activations if they are padded, sums where scales enter
    # behind the kernel, scales. No layer of weights, no output twice.
    k, n, rows = record["k"], record["n"], record["rows"]
    piece = config.get("rows", 16)
    padded = -(-rows // piece) * piece
    room = 0 if k % 512 == 0 and rows == padded else padded * (k + 512)
    room += 8 * (n + 512) * padded if config.get("split", 1) else 0
    assert record["temporary_bytes"] <= room + 4 * n + (1 << 16)
    assert not head or record["temporary_bytes"] < record["layer_bytes"] / 2


def test_kernels_compile_for_an_h200():
    if reason := aot.why_not():
        pytest.skip(reason)
    # A process of its own: jax takes up its CUDA plugin only before it first looks at devices.
    # K = 6912: the last tile of a row is half empty. N = 32002: a table's last tile nearly is.
    shapes = "--shapes=bitnet-2b4t:down,bitnet-700m:head"
    command = [sys.executable, "-m", "ternax.kernels.aot", shapes, "--rows=1,16,64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    found = [(record["kernel"], record["k"], record["rows"]) for record in records]
    trits = [("decode", 6912, 1), ("decode", 6912, 16), ("matrix", 6912, 64)]
    assert found == [*trits, *(("head", 1536, rows) for rows in (1, 16, 64))]
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
        (["--shapes=70b:o", "--rows=0"], "--rows: expected integers of at least 1, found '0'"),
        (["--rows=97"], "--rows: expected integers from 1 to 96, with heads, found '97'"),
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
