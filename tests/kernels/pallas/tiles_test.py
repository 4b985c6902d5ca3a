"""The tiled layout against its own description, in numpy, and back to the canonical bytes."""

import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import packing
from ternax.kernels.packing import Packed
from ternax.kernels.pallas import tiles
from ternax.kernels.pallas.tiles import HALF, ROWS, SLICE, TILE_BYTES, TILE_K

SHAPES = [(512, 128), (1, 1), (16, 129), (513, 127), (1300, 333)]


def packed(values) -> Packed:
    """values: int8 [..., P, K, N]."""
    scale = jnp.ones((*values.shape[:-2], 1, 1))
    return Packed(jnp.asarray(packing.pack_numpy(values, "trit2")), scale, shape=values.shape[-2:])


def trits(shape, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


@pytest.mark.parametrize("shape", SHAPES)
def test_canonical_is_the_inverse_of_repack(shape):
    w = packed(trits((3, 2, *shape)))
    tiled = tiles.repack(w)
    assert tiled.data.shape == (3, 2, *tiles.data_shape(shape))
    assert tiled.layout == tiles.LAYOUT
    back = tiles.canonical(tiled)
    assert back.layout == packing.CANONICAL
    np.testing.assert_array_equal(back.data, w.data)


@pytest.mark.parametrize(
    "shape", [(512, 128), (513, 127)]
)  # written over the rows, and beside them
def test_stacks_go_and_come_layer_by_layer(shape):
    w = packed(trits((3, 1, *shape)))
    expected = np.asarray(tiles.repack(w).data), np.asarray(w.data)
    tiled = tiles.repack_stack(w)  # takes w's memory
    np.testing.assert_array_equal(tiled.data, expected[0])
    np.testing.assert_array_equal(tiles.canonical_stack(tiled).data, expected[1])


def test_a_byte_of_a_tile_is_where_the_description_says():
    shape = (2 * TILE_K, ROWS + 5)
    values = trits((1, *shape))
    data = np.asarray(tiles.repack(packed(values)).data)[0].reshape(2, 2, TILE_BYTES)
    places = np.ndindex(2, 2, 2, 4, 8, 4, 4, 4)
    for offset, (s, c, h, warp, g, q, i, b) in enumerate(places):
        row, first = HALF * s + 16 * warp + 8 * h + g, 64 * c + 16 * i + 4 * q + b
        codes = values[0, TILE_K + first :: SLICE, row].tolist()
        assert data[0, 1, offset] == sum(v + 1 << 2 * p for p, v in enumerate(codes)) ^ 0x80
        if row < 5:
            codes = values[0, first:TILE_K:SLICE, ROWS + row].tolist()
            assert data[1, 0, offset] == sum(v + 1 << 2 * p for p, v in enumerate(codes)) ^ 0x80


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_times_activations_are_the_product(shape):
    """What the kernel does, on numpy integers: mask in place, multiply, shift, add offsets."""
    values = trits((1, *shape))
    x = np.random.default_rng(1).integers(-128, 128, (3, shape[0])).astype(np.int8)
    along_n, along_k = tiles.grid(shape)
    units = np.asarray(tiles.repack(packed(values)).data).reshape(
        along_n, along_k, 2, 2, 2, 4, 8, 4, 4, 4
    )  # n k s c h w g q i b
    operand = units.transpose(0, 2, 5, 4, 6, 1, 3, 8, 7, 9).reshape(along_n * ROWS, along_k, 128)
    wide = np.asarray(tiles.padded(jnp.asarray(x))).astype(np.int64)
    wide = wide.reshape(-1, along_k, 4, SLICE)
    assert wide.shape[0] == 8 and not wide[3:].any()
    total = 0
    for p in range(4):
        codes = (operand & np.uint8(3 << (2 * p))).view(np.int8).astype(np.int64)
        total = total + (np.einsum("rkc,nkc->rn", wide[:, :, p], codes) >> (2 * p))
    found = total[:3, : shape[1]] + np.asarray(tiles.offsets(jnp.asarray(x)))[:, None]
    np.testing.assert_array_equal(found, x.astype(np.int64) @ values[0].astype(np.int64))


def test_another_layout_is_refused():
    w = packed(trits((1, 16, 1)))
    with pytest.raises(ValueError, match="expected trit2 in layout 'tiles.*found trit2 in 'canon"):
        tiles.canonical(w)
    with pytest.raises(ValueError, match="expected trit2 in layout 'canonical'"):
        tiles.repack(tiles.repack(w))
