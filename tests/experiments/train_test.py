"""experiments.train on models of other programs: trits, whose floats are gone, cannot train."""

import pytest

import ternax
from ternax.experiments import train
from tests.interop import models


@pytest.mark.parametrize("name, format", [("m.gguf", "gguf:TQ2_0"), ("m", "hf")])
def test_trits_of_a_file_do_not_train(tmp_path, monkeypatch, capsys, name, format):
    monkeypatch.chdir(tmp_path)
    ternax.save(models.packed(models.BITNET), tmp_path / name, format)
    assert train.main([f"--config={tmp_path / name}", "--steps=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / name} holds trits, whose latent floats are gone")
    assert [path.name for path in tmp_path.iterdir()] == [name]
