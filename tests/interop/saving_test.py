"""Saving ends whole or not at all: a full disk, a killed process, another program's files."""

import contextlib
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

import ternax
from ternax.errors import OutputError
from ternax.interop import safetensors_file
from ternax.interop.foreign import ModelFileWarning
from ternax.interop.lint import floats, trits
from ternax.interop.weights import Weights
from ternax.kernels.packing import pack_numpy
from tests.interop import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
FORMATS = {"gguf:TQ2_0": "m.gguf", "hf": "m"}
TABLES = dict(embed_dtype="f32", head_dtype="f32")


@pytest.fixture(scope="module")
def model():
    return models.packed(models.BITNET, **TABLES)


@contextlib.contextmanager
def files_up_to(nbytes: int):
    """As under a quota: the write that crosses `nbytes` of a file fails."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_the_old_one(model, tmp_path, format):
    path = tmp_path / FORMATS[format]
    ternax.save(model, path, format)
    before = contents(path)
    with files_up_to(300_000), pytest.raises(OutputError) as caught:
        ternax.save(model, path, format)
    assert str(caught.value) == f"{path}: the model cannot be written: File too large"
    assert contents(path) == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("format", FORMATS)
def test_killed_while_saving(model, tmp_path, format):
    """kill -9 in the middle of the data: the last whole model is there, and a save succeeds."""
    path = tmp_path / FORMATS[format]
    ternax.save(model, path, format)
    before = contents(path)
    script = (
        "import os, signal, sys\n"
        "import ternax\n"
        "from ternax.interop import weights\n"
        "model = ternax.load(sys.argv[1], embed_dtype='f32', head_dtype='f32')\n"
        "whole = weights.Weights.codes\n"
        "def codes(self, name):\n"
        "    if name == 'layers.1.mlp.up' and sys._getframe(1).f_code.co_name != '_packed':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(self, name)\n"
        "weights.Weights.codes = codes\n"
        "ternax.save(model, sys.argv[1], sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), format],
        capture_output=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.iterdir())) == 2  # the model, and a draft that nothing reads
    assert contents(path) == before
    ternax.save(model, path, format)


def contents(path: pathlib.Path) -> dict[str, bytes]:
    """Every file of a file or directory."""
    found = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in found}


@pytest.mark.parametrize("format", [*FORMATS, "orbax"])
def test_what_is_something_else_stays(model, tmp_path, format):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes").write_text("mine")
    with pytest.raises(OutputError, match="is there and no saved model"):
        ternax.save(model, tmp_path / "m", format)
    assert (tmp_path / "m" / "notes").read_text() == "mine"


def test_a_directory_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        ternax.save(model, tmp_path / "file" / "m.gguf", "gguf:TQ2_0")


# --- Lint --------------------------------------------------------------------------------------


def codes_of(values) -> np.ndarray:
    return pack_numpy(np.asarray(values, np.int8), "trit2")


def test_lint_of_trits():
    rng = np.random.default_rng(0)
    usual, one = codes_of(rng.integers(-1, 2, (64, 8))), np.ones((1, 1), np.float32)
    assert trits("w", usual, one) == []
    assert trits("w", codes_of(np.zeros((64, 8))), one) == ["w is all zero"]
    assert trits("w", usual, -one) == ["w has a negative scale, -1"]
    assert trits("w", usual, 1e6 * one) == ["w has a scale of 1e+06"]
    assert trits("w", codes_of(np.ones((64, 8))), one) == [
        "w has codes -1, 0, +1 in shares 0.000, 0.000, 1.000"
    ]
    assert floats("w", np.zeros(3, np.float32)) == ["w is all zero"]
    assert floats("w", np.full(3, 1e6, np.float32)) == ["w holds 1e+06"]


def test_one_warning_names_what_is_odd(model, tmp_path):
    ternax.save(model, tmp_path / "m", "hf")
    file = tmp_path / "m" / "model.safetensors"
    where = "model.layers.1.mlp.up_proj.weight"
    place = safetensors_file.read(file).entries[where]
    raw = bytearray(file.read_bytes())
    raw[place.offset : place.offset + place.nbytes] = b"\x55" * place.nbytes
    file.write_bytes(raw)
    with pytest.warns(ModelFileWarning, match=f"{where} is all zero$") as warned:
        back = ternax.load(tmp_path / "m")
    assert len(warned) == 1
    assert not Weights(back).floats("layers.1.mlp.up").any()
