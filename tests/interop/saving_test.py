"""Saving ends whole or not at all: a full disk, a killed process, another program's files."""

import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

import ternax
from ternax.errors import OutputError
from ternax.interop import safetensors_file
from ternax.interop.lint import floats, trits
from ternax.interop.loading import ModelFileWarning
from ternax.interop.weights import Weights
from ternax.kernels.packing import pack_numpy
from tests.checkpoint import stored
from tests.interop import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
FORMATS = {"gguf:TQ2_0": "m.gguf", "hf": "m"}
TABLES = dict(embed_dtype="f32", head_dtype="f32")


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch, format):
    path = tmp_path / FORMATS[format]
    ternax.save(models.packed(models.BITNET, 1, **TABLES), path, format)
    before = stored.bits(ternax.load(path, **TABLES))
    limit = 300_000  # bytes of a file, as a quota: the write that crosses it fails
    script = (
        "import resource, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import ternax\n"
        "from ternax.errors import OutputError\n"
        "from tests.interop import models\n"
        "model = models.packed(models.BITNET, 2, embed_dtype='f32', head_dtype='f32')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    ternax.save(model, sys.argv[2], sys.argv[3])\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(path), format],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == f"{path}: the model cannot be written: File too large\n"
    assert stored.bits(ternax.load(path, **TABLES)) == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("format", FORMATS)
def test_killed_while_saving(tmp_path, format):
    """kill -9 in the middle of the data: the last whole model loads, and a new save succeeds."""
    path = tmp_path / FORMATS[format]
    model = models.packed(models.BITNET, 1, **TABLES)
    ternax.save(model, path, format)
    before = stored.bits(ternax.load(path, **TABLES))
    script = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import ternax\n"
        "from ternax.interop import weights\n"
        "from tests.interop import models\n"
        "model = models.packed(models.BITNET, 2, embed_dtype='f32', head_dtype='f32')\n"
        "whole = weights.Weights.codes\n"
        "def codes(self, name):\n"
        "    if name == 'layers.1.mlp.up' and sys._getframe(1).f_code.co_name != '_packed':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(self, name)\n"
        "weights.Weights.codes = codes\n"
        "ternax.save(model, sys.argv[2], sys.argv[3])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(path), format],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the model, and a draft that nothing reads
    assert stored.bits(ternax.load(path, **TABLES)) == before
    ternax.save(model, path, format)


@pytest.mark.parametrize("format", [*FORMATS, "orbax"])
def test_what_is_something_else_stays(tmp_path, format):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes").write_text("mine")
    with pytest.raises(OutputError, match="is there and no saved model"):
        ternax.save(models.packed(models.BITNET), tmp_path / "m", format)
    assert (tmp_path / "m" / "notes").read_text() == "mine"


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        ternax.save(models.packed(models.BITNET), tmp_path / "file" / "m.gguf", "gguf:TQ2_0")


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


def test_one_warning_names_what_is_odd(tmp_path):
    model = models.packed(models.BITNET, **TABLES)
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
