"""The matrix kernel, interpreted, against numpy integers and floats: every bit, ragged shapes.

The interpreter runs a cluster's warpgroups as threads, one cluster after the other.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import reference
from ternax.kernels.pallas import backend, tiles

if jax.__version_info__ < backend.MIN_JAX:
    pytest.skip("this jax has no interpreter of Mosaic GPU", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from ternax.kernels.pallas import matrix
from tests.tiled import tiled


def config(blocks, rows, strip, units, slices, split, cluster=1):
    return {
        "blocks": blocks,
        "rows": rows,
        "strip": strip,
        "cluster": cluster,
        "units": units,
        "slices": slices,
        "split": split,
    }


@functools.partial(jax.jit, static_argnums=(2, 4))
def accumulate(x, data, shape, layer, settings):
    return matrix.accumulate(x, data, shape, layer, dict(settings), interpret=True)


def check_exact(rows, planes, shape, settings):
    rng = np.random.default_rng(rows)
    values = rng.integers(-1, 2, (2, planes, *shape)).astype(np.int8)
    x = rng.integers(-128, 128, (rows, shape[0])).astype(np.int8)
    found = accumulate(x, tiled(values).data, shape, jnp.int32(1), tuple(settings.items()))
    expected = np.einsum("mk,pkn->mpn", x.astype(np.int64), values[1].astype(np.int64))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "rows, planes, shape, settings",
    [
        (1, 1, (1, 1), config(4, 8, 1, 1, 2, 0)),  # less than a piece, the least in flight
        (19, 1, (600, 300), config(2, 8, 1, 2, 3, 0)),  # pieces in turn, more than blocks
        (17, 1, (513, 130), config(3, 16, 2, 2, 5, 0)),  # a strip that reaches over the edge
        (20, 2, (1100, 130), config(3, 16, 2, 1, 4, 1)),  # planes; parts of pieces, added up
        (9, 1, (1600, 140), config(5, 8, 1, 3, 7, 1)),  # shares across the end of a piece
    ],
)
def test_exact(rows, planes, shape, settings):
    check_exact(rows, planes, shape, settings)


def clusters():
    """Blocks that share x; strips beyond the edge for one block of a cluster."""
    check_exact(21, 1, (700, 400), config(4, 16, 1, 2, 3, 0, cluster=2))
    check_exact(8, 1, (1100, 130), config(6, 8, 2, 2, 5, 1, cluster=2))


def test_exact_in_clusters():
    # As many threads wait for one another as a cluster has warpgroups, six; XLA has one for each
    # processor, or as many as the environment says before it starts.
    code = "from tests.kernels.pallas import matrix_test; matrix_test.clusters()"
    environment = os.environ | {"NPROC": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


@pytest.mark.parametrize("fenced", [True, False])
def test_no_slot_is_written_while_it_is_read(fenced, monkeypatch, capfd):
    """By the interpreter's race detector, which does see a fence that is left out."""
    races = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", races)
    if not fenced:
        monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    shape, x = (1100, 3), jnp.ones((5, 1100), jnp.int8)
    w = tiled(np.ones((1, 1, *shape), np.int8))
    settings = config(1, 8, 1, 2, 3, 0)
    found = matrix.accumulate(x, w.data, shape, jnp.int32(0), settings, interpret=True)
    assert (np.asarray(found) == 1100).all()
    assert ("RACE DETECTED" in capfd.readouterr().out) == (not fenced)


def test_extreme_sums_are_exact():
    shape = (1024, 3)
    values = np.ones((1, 1, *shape), np.int8)
    values[..., 1], values[..., 2] = -1, 0
    x = np.stack([np.full(1024, -128), np.full(1024, 127)]).astype(np.int8)
    settings = tuple(config(1, 8, 1, 2, 4, 0).items())
    found = accumulate(x, tiled(values).data, shape, jnp.int32(0), settings)
    assert found[:, 0].tolist() == [[-131072, 131072, 0], [130048, -130048, 0]]


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("columns", [1, 150])
def test_scaled_in_the_kernel_or_behind_it_floats_are_the_references(split, columns):
    rng, shape, rows = np.random.default_rng(0), (700, 150), 11
    w = tiled(
        rng.integers(-1, 2, (2, 1, *shape)).astype(np.int8), rng.uniform(0.5, 2, (2, 1, 1, columns))
    )
    x = jnp.asarray(rng.integers(-128, 128, (1, rows, shape[0])).astype(np.int8))
    x_scale = jnp.asarray(rng.uniform(0.01, 1, (rows, 1)).astype(np.float32))
    settings = config(2, 16, 1, 2, 3, split)
    found = backend.run(x, x_scale, w, jnp.int32(1), settings, interpret=True)
    whole = {"block_rows": shape[1]}
    expected = reference.run(x, x_scale, tiles.canonical(w), jnp.int32(1), whole)
    np.testing.assert_array_equal(found, expected)


def test_digits_of_floats_go_through_it_too():
    rng, shape, rows = np.random.default_rng(0), (70, 30), 6
    w = tiled(rng.integers(-1, 2, (1, 1, *shape)).astype(np.int8))
    digits = jnp.asarray(rng.integers(-64, 64, (3, rows, shape[0])).astype(np.int8))
    x_scale = jnp.asarray(rng.uniform(0.01, 1, (rows, 1)).astype(np.float32))
    settings = config(2, 24, 1, 1, 2, 0)
    found = backend.run(digits, x_scale, w, jnp.int32(0), settings, interpret=True)
    whole = {"block_rows": shape[1]}
    expected = reference.run(digits, x_scale, tiles.canonical(w), jnp.int32(0), whole)
    np.testing.assert_array_equal(found, expected)


def test_one_slice_in_flight_would_wait_for_ever():
    w = tiled(np.zeros((1, 1, 16, 1), np.int8))
    with pytest.raises(ValueError, match="slices must be at least 2, .* found 1"):
        matrix.accumulate(
            jnp.zeros((1, 16), jnp.int8),
            w.data,
            w.shape,
            jnp.int32(0),
            config(1, 8, 1, 1, 1, 0),
        )
