"""The reading kernel, interpreted: every block asks for the tiles of its own share, to the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import aot, target
from ternax.kernels.pallas import backend, reading, tiles


@pytest.mark.skipif(jax.__version_info__ < backend.MIN_JAX, reason="no interpreter of Mosaic GPU")
@pytest.mark.parametrize("units, blocks", [(37, 3), (5, 2), (26, 1)])
def test_first_slots_hold_what_their_blocks_read_last(units, blocks):
    random = np.random.default_rng(units)
    data = random.integers(0, 256, (units, *reading.TILE)).astype(np.uint8)
    found = np.asarray(reading.read(jnp.asarray(data), None, blocks, interpret=True))
    for block in range(blocks):
        start, stop = block * units // blocks, (block + 1) * units // blocks
        last = range(start, stop, reading.STAGES)[-1]
        np.testing.assert_array_equal(found[block], data[last])


def test_it_says_why_not_and_fits_a_processor():
    assert reading.why_not() == "it runs on gpu, this is cpu"
    assert reading.TILE[0] * reading.TILE[1] == tiles.TILE_BYTES
    assert reading.STAGES * tiles.TILE_BYTES <= 227 << 10
    if jax.__version_info__ >= backend.MIN_JAX:
        with target.compiling_for(aot.DEVICES["h200"].target):
            assert reading.why_not() is None
