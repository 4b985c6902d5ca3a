"""The decode kernel, interpreted, against numpy integers: every bit, over ragged shapes.

The interpreter runs a block's warpgroups as threads, with barriers and copies that complete
late, and raises where a barrier is left in a state that a GPU would not forgive. What it
cannot run, the renaming of registers and atomic additions, has a twin in the kernel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import reference
from ternax.kernels.pallas import backend, tiles

if jax.__version_info__ < backend.MIN_JAX:
    pytest.skip("this jax has no interpreter of Mosaic GPU", allow_module_level=True)

from ternax.kernels.pallas import decode
from tests.tiled import tiled


def config(blocks, stages, consumers):
    return {"blocks": blocks, "stages": stages, "consumers": consumers}


@functools.partial(jax.jit, static_argnums=(2, 4))
def accumulate(x, data, shape, layer, settings):
    return decode.accumulate(x, data, shape, layer, dict(settings), interpret=True)


@pytest.mark.parametrize(
    "rows, planes, shape, settings",
    [
        (1, 1, (1, 1), config(4, 2, 2)),  # less than a tile, fewer tiles than blocks
        (3, 1, (1000, 200), config(3, 2, 2)),  # shares that begin and end within a row of tiles
        (9, 2, (513, 129), config(5, 4, 4)),  # planes; the last tile of a row is nearly empty
        (16, 1, (1500, 40), config(1, 2, 2)),  # slots used again, the most rows
        (8, 1, (1500, 100), config(1, 3, 2)),  # an odd number of stages
    ],
)
def test_exact(rows, planes, shape, settings):
    rng = np.random.default_rng(rows)
    values = rng.integers(-1, 2, (2, planes, *shape)).astype(np.int8)
    x = rng.integers(-128, 128, (rows, shape[0])).astype(np.int8)
    found = accumulate(x, tiled(values).data, shape, jnp.int32(1), tuple(settings.items()))
    expected = np.einsum("mk,pkn->mpn", x.astype(np.int64), values[1].astype(np.int64))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_extreme_sums_are_exact():
    shape = (1024, 3)
    values = np.ones((1, 1, *shape), np.int8)
    values[..., 1], values[..., 2] = -1, 0
    x = np.stack([np.full(1024, -128), np.full(1024, 127)]).astype(np.int8)
    settings = tuple(config(2, 2, 2).items())
    found = accumulate(x, tiled(values).data, shape, jnp.int32(0), settings)
    assert found[:, 0].tolist() == [[-131072, 131072, 0], [130048, -130048, 0]]


@pytest.mark.parametrize("planes, zero", [(1, False), (2, True)])
def test_scaled_products_are_the_references(planes, zero):
    """Three int8 digits of float activations, scales of rows, and a second pass of weights.

    One plane without a zero is scaled by products alone, the same in any program; sums of
    products may be fused or not, which is one rounding.
    """
    rng, shape, rows = np.random.default_rng(0), (70, 30), 6
    values = rng.integers(-1, 2, (2, planes, *shape)).astype(np.int8)
    leaf = (2, planes, 1, shape[1])
    w = tiled(values, rng.uniform(0.5, 2, leaf), rng.normal(size=leaf) if zero else None)
    digits = jnp.asarray(rng.integers(-64, 64, (3, rows, shape[0])).astype(np.int8))
    x_scale = jnp.asarray(rng.uniform(0.01, 1, (rows, 1)).astype(np.float32))
    found = backend.run(digits, x_scale, w, jnp.int32(1), config(2, 2, 2), interpret=True)
    whole = {"block_rows": shape[1]}
    expected = reference.run(digits, x_scale, tiles.canonical(w), jnp.int32(1), whole)
    if zero:
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2**-24 * largest)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "settings, said",
    [
        (config(1, 3, 4), "stages must be a multiple of pairs of consumers, found 3"),
        (config(1, 4, 3), "consumers must be 2 or 4, found 3"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    w = tiled(np.zeros((1, 1, 16, 1), np.int8))
    with pytest.raises(ValueError, match=said):
        decode.accumulate(jnp.zeros((1, 16), jnp.int8), w.data, w.shape, jnp.int32(0), settings)
