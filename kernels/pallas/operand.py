"""Half a tile in registers, as wgmma takes its first operand: four codes a byte, still packed."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import tiles

# A quarter of half a tile, as one load of a warpgroup: 16 bytes a thread.
PART, PARTS = (8, 256), 4
# A tile as TMA brings it.
TILE = (2 * PARTS * PART[0], PART[1])
OPERAND = (tiles.HALF, tiles.SLICE)


def quarters(half) -> list:
    """Where in a tile the four parts of a half are; half: 0 or 1, or traced."""
    return [pl.ds((half * PARTS + part) * PART[0], PART[0]) for part in range(PARTS)]


def in_order(parts):
    """The bytes [64, 128] of half a tile, row by row: what the registers hold, for the
    interpreter. parts: uint8 [8, 256] each."""
    bytes_ = jnp.stack(parts).reshape(2, 2, 4, 8, 4, 4, 4)  # c h w g q i b
    return bytes_.transpose(2, 1, 3, 0, 5, 4, 6).reshape(OPERAND)


def operand(data, half, interpret):
    """int8 [64, 128] for wgmma, four codes a byte, of one half of a tile in shared memory."""
    at = quarters(half)
    if not interpret:
        layout = plgpu.Layout.WG_STRIDED(PART, vec_size=16)
        return _as_operand(layout, *(plgpu.load(data.at[rows], layout=layout) for rows in at))
    return lax.bitcast_convert_type(in_order([data[rows] for rows in at]), jnp.int8)


def _as_operand(part_layout, *parts):
    """Renames registers: 16 words of a thread as one of wgmma's operands. No instruction."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    @plgpu.inline_mgpu(
        arg_types=(part_layout,) * PARTS,
        return_type=plgpu.ShapeDtypeStruct(OPERAND, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def rename(_, *parts):
        byte, word = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
        registers = np.empty((2, 4, 2), object)  # c, i, h
        for index, part in enumerate(parts):
            c, h = divmod(index, 2)
            words = vector.bitcast(ir.VectorType.get((4,), word), *part.registers.flat)
            for i in range(4):
                one = vector.extract_strided_slice(
                    ir.VectorType.get((1,), word), words, offsets=[i], sizes=[1], strides=[1]
                )
                registers[c, i, h] = vector.bitcast(ir.VectorType.get((4,), byte), one)
        layout = fragmented_array.WGMMA_LAYOUT_8BIT
        return fragmented_array.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape(OPERAND)),
            _layout=layout,
            _is_signed=True,
        )

    return rename(*parts)
