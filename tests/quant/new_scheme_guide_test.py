"""docs/new_scheme.md, followed to the letter: its file, its Python, its commands."""

import json
import os
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import ternax
from tests.quant import guide

DECODE, CONFORM = (block.strip() for block in guide.blocks("sh"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory on the path that holds the guide's file, under the guide's name."""
    (tmp_path / "my_scheme.py").write_text(guide.SCHEME_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_scheme", None)


def run(command: str, folder) -> str:
    """Runs one of the guide's commands in the checkout, the file's folder on PYTHONPATH."""
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=guide.ROOT,
        env=os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_file_is_short():
    assert len(guide.SCHEME_FILE.splitlines()) < 40
    assert max(len(line) for line in guide.TEXT.splitlines()) <= 100


def test_the_python_trains_packs_and_generates(folder, monkeypatch, capsys):
    (code,) = guide.blocks("python")
    tokens = jax.random.randint(jax.random.key(1), (16, 9), 0, 259)
    pack, difference, zeros = ternax.pack_model, [], []

    def pack_and_compare(model):
        zeros.append(model.layers.mlp.up.scheme.zero[...])
        logits = model(tokens)
        # Float tables, so that nothing but the scheme's own packing could differ.
        exact = pack(nnx.clone(model), embed_dtype="f32", head_dtype="f32")
        difference.append(np.abs(exact(tokens) - logits).max(axis=(1, 2)) / np.std(logits))
        return pack(model)

    monkeypatch.setattr(ternax, "pack_model", pack_and_compare, raising=False)
    names = {}
    exec(code, names)

    # It learns what it is shown, zero points too, and packing keeps all of that.
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    assert (np.asarray(zeros) != 0).any()
    assert names["packed"].layers.mlp.gate_up.zero is not None
    # An activation on the edge between two codes may fall either way, and one row in ten or so
    # has one; without the zero points every row would differ by 0.04 or more.
    assert np.median(difference[0]) < 1e-3
    out = capsys.readouterr().out
    assert out.startswith("loss ") and out.count("[") == 5  # the tokens of four rows


def test_the_decode_command_runs(folder):
    out = run(f"{DECODE} --num_tokens=4 --output_dir={folder / 'out'}", folder)
    assert "my_scheme:MyScheme" in out
    records = json.loads((folder / "out" / "results.json").read_text())
    assert {record["scheme"] for record in records} == {"my_scheme:MyScheme"}
    assert any(record["phase"] == "decode" for record in records)


def test_the_conformance_command_runs_over_it(folder):
    out = run(f"{CONFORM} -q -p no:cacheprovider", folder)
    assert " passed" in out and "failed" not in out
