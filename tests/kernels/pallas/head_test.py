"""The head kernel, interpreted, against numpy integers: every bit, over ragged tables.

As of the decode kernel, the interpreter runs a block's warpgroups as threads, with barriers and
copies that complete late. Its wgmma reads shared memory, so that how a warpgroup loads codes is
the one thing not seen here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from ternax.kernels import packing, reference, target
from ternax.kernels.packing import Packed
from ternax.kernels.pallas import backend

if jax.__version_info__ < backend.MIN_JAX:
    pytest.skip("this jax has no interpreter of Mosaic GPU", allow_module_level=True)

from ternax.kernels.pallas import head


def config(blocks, stages, consumers, slices=1):
    return {"blocks": blocks, "stages": stages, "consumers": consumers, "slices": slices}


@functools.partial(jax.jit, static_argnums=(2, 4))
def accumulate(x, data, shape, layer, settings):
    return head.accumulate(x, data, shape, layer, dict(settings), interpret=True)


@pytest.mark.parametrize(
    "rows, shape, settings",
    [
        (1, (1, 1), config(4, 2, 2)),  # less than a tile, fewer tiles than blocks
        (3, (64, 259), config(2, 3, 2)),  # narrower than a stage; the last tile nearly empty
        (48, (300, 300), config(1, 2, 2)),  # a batch of 16 floats; slots used again, two tiles
        (96, (176, 400), config(2, 2, 1)),  # the most rows; blocks with one and two tiles
        (33, (400, 600), config(2, 3, 2)),  # rows that wgmma has no shape for; columns in turn
        (9, (528, 130), config(1, 3, 1, 2)),  # stages of two slices, the last of them empty
    ],
)
def test_exact(rows, shape, settings):
    rng = np.random.default_rng(rows)
    values = rng.integers(-127, 128, (2, 1, *shape)).astype(np.int8)
    data = packing.pack_numpy(values, "int8")
    x = rng.integers(-128, 128, (rows, shape[0])).astype(np.int8)
    found = accumulate(x, jnp.asarray(data), shape, jnp.int32(1), tuple(settings.items()))
    assert found.dtype == jnp.int32 and found.shape == (rows, 1, shape[1])
    np.testing.assert_array_equal(found[:, 0], x.astype(np.int64) @ values[1, 0].astype(np.int64))


@pytest.mark.parametrize("fenced", [True, False])
def test_no_slot_is_written_while_it_is_read(fenced, monkeypatch, capfd):
    """By the interpreter's race detector, which does see a fence that is left out."""
    races = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", races)
    if not fenced:
        monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    shape, x = (400, 300), jnp.ones((3, 400), jnp.int8)
    data = jnp.full((1, 1, 300, 400), 129, jnp.uint8)
    settings = config(1, 2, 2)
    found = head.accumulate(x, data, shape, jnp.int32(0), settings, interpret=True)
    assert (np.asarray(found) == 400).all()
    assert ("RACE DETECTED" in capfd.readouterr().out) == (not fenced)


def test_extreme_sums_are_exact():
    shape = (1024, 2)
    values = np.stack([np.full(1024, 127), np.full(1024, -127)], -1)[None, None].astype(np.int8)
    x = np.stack([np.full(1024, -128), np.full(1024, 127)]).astype(np.int8)
    data = jnp.asarray(packing.pack_numpy(values, "int8"))
    found = accumulate(x, data, shape, jnp.int32(0), tuple(config(1, 3, 1, 2).items()))
    assert found[:, 0].tolist() == [[-16646144, 16646144], [16516096, -16516096]]


def test_scaled_products_are_the_references():
    """Three int8 digits of 33 float activations: 99 rows, so that the table is passed twice."""
    rng, shape, rows = np.random.default_rng(0), (70, 30), 33
    values = rng.integers(-127, 128, (1, 1, *shape)).astype(np.int8)
    scale = jnp.asarray(rng.uniform(0.5, 2, (1, 1, 1, shape[1])).astype(np.float32))
    data = jnp.asarray(packing.pack_numpy(values, "int8"))
    w = Packed(data, scale, None, "int8", shape=shape)
    digits = jnp.asarray(rng.integers(-64, 64, (3, rows, shape[0])).astype(np.int8))
    x_scale = jnp.asarray(rng.uniform(0.01, 1, (rows, 1)).astype(np.float32))
    found = backend.run(digits, x_scale, w, jnp.int32(0), config(1, 2, 1), interpret=True)
    expected = reference.run(digits, x_scale, w, jnp.int32(0), {"block_rows": shape[1]})
    np.testing.assert_array_equal(found, expected)


def test_the_self_test_tells_a_wrong_product(monkeypatch):
    interpreted = functools.partial(backend.run, interpret=True)
    h200 = target.Target("gpu", "NVIDIA H200", "9.0", 132, present=False)
    with target.compiling_for(h200):
        monkeypatch.setattr(backend, "run", interpreted)
        assert backend.self_test("int8") is None
        monkeypatch.setattr(backend, "run", lambda *args: interpreted(*args).at[-1, 0].add(1))
        assert backend.self_test("int8") == (
            "its self-test of int8 failed: 3 rows differ from integer products"
        )
        monkeypatch.setattr(backend, "run", lambda *args: 1 // 0)
        assert backend.self_test("int8") == (
            "its self-test of int8 raised ZeroDivisionError: integer division or modulo by zero"
        )
