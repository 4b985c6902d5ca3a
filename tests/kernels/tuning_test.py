"""Tuned files: what is read, what is refused, and which setting wins."""

import json

import jax
import jax.numpy as jnp
import pytest

from ternax.errors import BackendUnavailable
from ternax.kernels import aot, target, tuning
from ternax.kernels.packing import Packed
from ternax.kernels.pallas import backend, chain, decode, tiles
from ternax.workload import backend_name

KIND = "NVIDIA H200"
SLOW, FAST = ({"blocks": 132, "stages": s, "consumers": 2} for s in (8, 6))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    return tmp_path


def written(folder, shape=(8192, 10240), rows=8):
    tried = [(SLOW, [3e-6, 9e-6, 3.2e-6]), (FAST, [3e-6, 2.9e-6, 2.8e-6])]
    return tuning.write(folder, KIND, [tuning.entry("decode", shape, rows, tried)], "jax 1", "abc")


def test_the_least_median_wins_and_all_samples_stay(folder):
    path = written(folder)
    assert path.name == "nvidia-h200.json" and path == tuning.find(KIND)
    [entry] = tuning.read(path)["entries"]
    assert entry["config"] == FAST and entry["median_us"] == pytest.approx(2.9)
    assert [one["samples_us"] for one in entry["tried"]] == [[3.0, 9.0, 3.2], [3.0, 2.9, 2.8]]
    assert tuning.settings(KIND, (8192, 10240), 1) == FAST
    assert tuning.settings(KIND, (8192, 10240), 8) == FAST
    assert tuning.settings(KIND, (8192, 10240), 9) is None  # of 16 rows nothing is said
    assert tuning.settings(KIND, (8192, 10240), 17) is None
    assert tuning.settings(KIND, (8192, 8192), 1) is None
    assert tuning.settings(KIND, (8192, 10240), 1, "chain") is None
    assert tuning.settings("NVIDIA H100 80GB HBM3", (8192, 10240), 1) is None


def test_a_file_grows_and_a_shape_is_tuned_again(folder):
    path = written(folder)
    written(folder, rows=16)
    written(folder)
    assert [e["rows"] for e in tuning.read(path)["entries"]] == [16, 8]
    assert tuning.settings(KIND, (8192, 10240), 12) == FAST
    assert [p.name for p in folder.iterdir()] == [path.name]  # no draft is left


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not a file of tuned settings"),
        ("[]", "not a file of tuned settings"),
        ('{"device": "x"}', "not a file of tuned settings"),
        ("other layout", "tuned for layout 'tiles-0', kernels read"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(folder, text, said):
    path = written(folder)
    if text == "other layout":
        text = json.dumps(json.loads(path.read_text()) | {"layout": "tiles-0"})
    path.write_text(text)
    with pytest.raises(tuning.TunedFileError, match=said) as caught:
        tuning.settings(KIND, (8192, 10240), 1)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_the_backend_reads_it(folder, monkeypatch):
    """As a Hopper GPU would, which is said to be here and is not."""
    device = aot.DEVICES["h200"].target
    w = Packed(
        jnp.zeros((1, 1, *tiles.data_shape((512, 128))), jnp.uint8),
        jnp.ones((1, 1, 1, 1)),
        layout=tiles.LAYOUT,
        shape=(512, 128),
    )
    x = jnp.zeros((1, 512), jnp.int8)
    with target.compiling_for(device):
        assert backend.heuristic(x, w) == decode.heuristic(132)
        path = written(folder, shape=(512, 128))
        assert backend.heuristic(x, w) == FAST
        assert backend.heuristic(jnp.zeros((3, 512), jnp.int8), w) == FAST
        # Floats come as three digits each: nine rows, of which nothing is said.
        assert backend.heuristic(jnp.zeros((3, 512)), w) == decode.heuristic(132)
        path.write_text(path.read_text().replace(tiles.LAYOUT, "tiles-0"))
        with pytest.raises(tuning.TunedFileError, match="tuned for layout"):
            backend.heuristic(x, w)
        if jax.__version_info__ >= backend.MIN_JAX:
            with pytest.raises(BackendUnavailable, match="--backend: .*tuned for layout 'tiles-0'"):
                backend_name("mosaic", type("Device", (), {"platform": "gpu"}))


def test_settings_worth_trying_fit_the_processor():
    around = tuning.chain_space(chain.heuristic(132))
    assert around[0] == chain.heuristic(132) and len(around) == 6
    assert len(tuning.chain_space({**around[0], "alone": 0})) == 5
    assert all(config not in around[:i] for i, config in enumerate(around))
    assert all(config.keys() == around[0].keys() for config in around)
    for rows in tuning.ROWS:
        found = tuning.space(132, rows)
        assert decode.heuristic(132) in found
        for config in found:
            assert config["stages"] % decode.teams(config["consumers"]) == 0
            assert config["stages"] * (tiles.TILE_BYTES + rows * tiles.TILE_K) <= 227 << 10
        assert len({tuple(config.items()) for config in found}) == len(found) >= 6
