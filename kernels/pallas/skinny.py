"""Half a tile of trits times few rows of activations: masks, wgmma, sums added to memory.

An instruction of wgmma on 8 columns takes 13 cycles of an H200's tensor cores, but 65 until the
next one can add to its accumulator: the four bit positions, each with its own, take turns.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import operand, tiles

# A tile's activations lie in shared memory as wgmma reads them: 8 rows of 128 bytes, swizzled.
SWIZZLED = (plgpu.TilingTransform((8, tiles.SLICE)), plgpu.SwizzleTransform(tiles.SLICE))
# Accumulators in registers, of one number each: pairs would cost wgmma waits.
_SUMS = plgpu.Layout._WGMMA_ACC_32BIT
_POSITIONS = 4


def zeros(rows: int, interpret: bool) -> tuple[jax.Array, ...]:
    """Accumulators int32 [64, rows] of half a tile's outputs, one for each bit position."""
    zero = jnp.zeros((tiles.HALF, rows), jnp.int32)
    return (zero if interpret else plgpu.layout_cast(zero, _SUMS),) * _POSITIONS


def multiply(accumulators, data, half, x, interpret):
    """Accumulators with the product of half a tile added, each bit position to its own.

    data: the tile, x: its activations int8 [rows, 512] (SWIZZLED), or [4, 8, 128], of which the
    first row counts, both in shared memory; half: 0 or 1.
    """
    at = operand.quarters(half)
    if not interpret:
        layout = plgpu.Layout.WG_STRIDED(operand.PART, vec_size=16)
        parts = [plgpu.load(data.at[rows], layout=layout) for rows in at]
        return tuple(_multiply(layout, parts, x, accumulators))
    codes = operand.in_order([data[rows] for rows in at])
    found = []
    for p, accumulator in enumerate(accumulators):
        masked = codes & jnp.uint8(3 << (2 * p))
        digits = x[p] if _is_plain(x) else x[:, pl.ds(tiles.SLICE * p, tiles.SLICE)]
        in_place = lax.bitcast_convert_type(masked, jnp.int8).astype(jnp.int32)
        found.append(accumulator + in_place @ digits.astype(jnp.int32).T)
    return tuple(found)


def _is_plain(x) -> bool:
    return len(x.shape) == 3


def _multiply(layout, parts, x, accumulators):
    """The same as instructions: 64 masks, then 16 of wgmma, positions in turn."""
    rows = accumulators[0].shape[1]
    sums = plgpu.ShapeDtypeStruct((tiles.HALF, rows), jnp.int32, layout=_SUMS)
    kind = plgpu.RefType(() if _is_plain(x) else SWIZZLED)
    of = (layout,) * operand.PARTS, kind, (_SUMS,) * _POSITIONS

    @plgpu.inline_mgpu(arg_types=of, return_type=(sums,) * _POSITIONS)
    def emit(_, parts, x, accumulators):
        from jax.experimental.mosaic.gpu import fragmented_array, mma_utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

        word, long = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)

        def constant(kind, value):
            return arith.constant(kind, ir.IntegerAttr.get(kind, value))

        # parts are (c, h), their words i: register (c, i, h) of wgmma's operand, see `tiles`.
        words = np.empty((2, 4, 2), object)
        for index, part in enumerate(parts):
            [register] = part.registers.flat
            loaded = vector.bitcast(ir.VectorType.get((4,), word), register)
            for i in range(4):
                at = ir.DenseI64ArrayAttr.get([i])
                words[index // 2, i, index % 2] = vector.extract(loaded, [], at)
        masked = []
        for p in range(_POSITIONS):
            mask = constant(word, int(np.uint32(0x03030303 << (2 * p)).view(np.int32)))
            masked.append([arith.andi(each, mask) for each in words.flat])
        # What is written before the fence, wgmma may read after it.
        kept = llvm.inline_asm(
            llvm.StructType.get_literal([word] * 64),
            [each for of_position in masked for each in of_position],
            "",
            ",".join(["=r"] * 64 + [str(i) for i in range(64)]),
            has_side_effects=True,
        )
        operands = [llvm.extractvalue(word, kept, [i]) for i in range(64)]
        nvvm.wgmma_fence_aligned()
        # Rows of eight lie 1 KiB apart where there are no more, else behind the four slices.
        apart = 1024 if rows == 8 else 1024 * _POSITIONS
        descriptor = mma_utils.encode_descriptor(x, 0, apart, tiles.SLICE)
        found = [list(each.registers.flat) for each in accumulators]
        for step in range(4):  # 32 columns of a slice
            for p in range(_POSITIONS):
                offset = (1024 * p + 32 * step) >> 4
                moved = llvm.add(
                    descriptor,
                    constant(long, offset),
                    overflow_flags=llvm.IntegerOverflowFlags.none,
                )
                first = 16 * p + 4 * step
                found[p] = _wgmma(found[p], operands[first : first + 4], moved, rows)
        nvvm.wgmma_commit_group_sync_aligned()
        nvvm.wgmma_wait_group_sync_aligned(0)
        return tuple(
            fragmented_array.FragmentedArray(
                _registers=np.array(registers, object).reshape(each.registers.shape),
                _layout=each.layout,
                _is_signed=True,
            )
            for registers, each in zip(found, accumulators, strict=True)
        )

    return emit(tuple(parts), x, tuple(accumulators))


def _wgmma(sums, operand, descriptor, columns):
    """One instruction: sums + operand [64, 32] times the descriptor's [32, columns], int8."""
    from jaxlib.mlir.dialects import llvm

    count = len(sums)
    regs = [f"${i}" for i in range(count)]
    a = [f"${2 * count + i}" for i in range(4)]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([sums[0].type] * count),
        [*sums, *operand, descriptor],
        f"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 "
        f"{{{', '.join(regs)}}}, {{{', '.join(a)}}}, ${2 * count + 4}, 1;",
        ",".join(["=r"] * count + [str(i) for i in range(count)] + ["r"] * 4 + ["l"]),
        has_side_effects=True,
    )
    return [llvm.extractvalue(sums[0].type, result, [i]) for i in range(count)]


def add(out, column, accumulators, rows: int, interpret: bool) -> None:
    """Adds accumulators to out int32 [at least rows, N], the real rows' 64 columns from here on."""
    total = sum(each >> (2 * p) for p, each in enumerate(accumulators))
    columns = pl.ds(column, tiles.HALF)
    if interpret:
        out[pl.ds(0, rows), columns] += total.T[:rows]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SUMS))
    def emit(_, out, total):
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        index = ir.IndexType.get()
        registers = total.registers.flat
        for at, register in zip(total.layout.thread_idxs(total.shape), registers, strict=True):
            n, row = at
            real = arith.cmpi(arith.CmpIPredicate.ult, row, utils.c(rows, index))
            utils.inline_ptx(
                "red.relaxed.gpu.global.add.s32 [$0], $1;",
                utils.memref_ptr(utils.memref_slice(out, (row, n))),
                vector.extract(register, [], ir.DenseI64ArrayAttr.get([0])),
                predicate=real,
                has_side_effects=True,
            )

    emit(out.at[:, columns], total)
