"""docs/new_noise.md, followed to the letter: its file, its Python, its command."""

import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import pytest

from ternax.errors import UsageError
from ternax.experiments import robustness
from ternax.noise import make_noise

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "new_noise.md").read_text()


def block(kind: str) -> str:
    (found,) = re.findall(rf"^```{re.escape(kind)}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_noise.py").write_text(block("python my_noise.py"))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_noise", None)


def test_it_does_what_its_table_says(folder):
    noise = make_noise("my_noise:ChargeLoss,rate=0.25")
    codes = np.random.default_rng(0).integers(-1, 2, (200, 300)).astype(np.int8)
    found, changed = noise(jax.random.key(0), codes)
    assert int(changed) == (found != codes).sum()
    assert (np.asarray(found)[codes < 1] == codes[codes < 1]).all()
    assert np.mean(found[codes == 1] == 0) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_allclose(noise.transition(0.6)[2], [0, 0.25, 0.75])


def test_the_python_strikes_a_model(folder, capsys):
    exec_namespace: dict = {}
    exec(compile(block("python"), "new_noise.md", "exec"), exec_namespace)
    assert re.fullmatch(r"\d+ of 65536 trits changed\n", capsys.readouterr().out)


def test_the_command_studies_it(folder, tmp_path, capsys):
    python, dash_m, module, *flags = shlex.split(block("sh"))
    assert (python, dash_m, module) == ("python", "-m", "experiments.robustness")
    assert robustness.main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 0
    assert "my_noise:ChargeLoss" in capsys.readouterr().out


def test_what_is_no_noise_is_refused(folder):
    for spec, words in (
        ("my_noise:np,rate=0.1", "must be a subclass of ternax.noise.NoiseModel"),
        ("no.such:Thing,rate=0.1", "cannot import 'no.such:Thing'"),
        ("flip,rate=0.1", "or package.module:Class, found 'flip'"),
    ):
        with pytest.raises(UsageError, match=words):
            make_noise(spec)
