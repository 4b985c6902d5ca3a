"""The decode kernel: few rows of int8 activations times trits, at the speed of memory.

One block a processor; each streams an equal share of the layer's tiles (stream-K), so small
matrices occupy the whole GPU too:

    tiles along K ->     block 0 | 0 0 0 0 0 1 1 1 |      a block's share may begin and end
    tiles along N        block 1 | 1 1 2 2 2 2 2 3 |      anywhere in a row of tiles

One warpgroup of a block fetches tiles and their activations by TMA, `stages` ahead. Two
multiply, each its half of every tile: load, mask one bit position of all codes, multiply it by
int8 wgmma where it stands, into one accumulator a position. A row of tiles ends with the shifts
that undo the positions and int32 atomic additions, whose order does not change a sum.

An instruction of wgmma on 8 columns takes 13 cycles of an H200's tensor cores, but 65 until the
next one can add to its accumulator: the four positions take turns, column by column.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import tiles

# Rows of activations (or of their digits) in one pass over the weights. With 24, accumulators
# and operands need more registers than there are, and ptxas lets one wgmma wait for another.
MAX_ROWS = 16
# A quarter of half a tile, as one load of a warpgroup: 16 bytes a thread.
_PART, _PARTS = (8, 256), 4
_POSITIONS = 4
# A tile as TMA brings it.
TILE = (2 * _PARTS * _PART[0], _PART[1])
# A tile's activations lie in shared memory as wgmma reads them: 8 rows of 128 bytes, swizzled.
SWIZZLED = (plgpu.TilingTransform((8, tiles.SLICE)), plgpu.SwizzleTransform(tiles.SLICE))
# Accumulators in registers, of one number each: pairs would cost wgmma waits.
_SUMS = plgpu.Layout._WGMMA_ACC_32BIT
# Registers of a thread that fetches; those that multiply share the rest.
FETCH_REGISTERS, _REGISTERS, _WARPGROUP = 40, 65536, 128


def multiply_registers(consumers: int) -> int:
    """Registers of a thread of each of `consumers` warpgroups that multiply.

    Of what a block has been given, which is rounded down to eights a thread: a warpgroup that
    asks for more waits for ever.
    """
    given = _REGISTERS // (_WARPGROUP * (consumers + 1)) // 8 * 8
    left = (given * (consumers + 1) - FETCH_REGISTERS) // consumers // 8 * 8
    return min(left, 240)


def heuristic(blocks: int) -> dict[str, int]:
    """Settings on a GPU of `blocks` processors.

    Eight stages hold 128 KiB of weights in flight on each processor, four times what 4.8 TB/s
    need at a latency of 1 us.
    """
    return {"blocks": blocks, "stages": 8, "consumers": 2}


def accumulate(
    x: jax.Array,
    data: jax.Array,
    shape: tuple[int, int],
    layer: jax.Array,
    config: Mapping[str, int],
    interpret: bool = False,
) -> jax.Array:
    """x times every plane of one layer of a stack, exactly.

    Args:
      x: int8 [R, K], R at most MAX_ROWS.
      data: uint8 [L, P, *tiles.data_shape(shape)].
      shape: (K, N).
      layer: int32 [].
      config: {"blocks": thread blocks, "stages": tiles in flight in each, "consumers":
        warpgroups that multiply: 2, each a half of every tile, or 4, of every other tile}.
      interpret: run on the CPU, by Pallas' interpreter of Mosaic GPU. It has neither inline
        instructions nor atomics; each has a twin in jnp here.

    Returns:
      int32 [R, P, N].
    """
    planes, (along_n, _) = data.shape[1], tiles.grid(shape)
    wide = tiles.padded(x)
    copies = teams(config["consumers"]) if interpret else 1
    lacks = jnp.zeros((copies, x.shape[0]), jnp.int32).at[0].set(tiles.offsets(x))
    out = jax.new_ref(
        jnp.broadcast_to(lacks[..., None], (*lacks.shape, planes * along_n * tiles.ROWS))
    )
    add_product(wide, x.shape[0], data, shape, layer, config, out, interpret)
    y = jax.freeze(out).sum(0) if interpret else jax.freeze(out)
    return y.reshape(x.shape[0], planes, -1)[..., : shape[1]]


def teams(consumers: int) -> int:
    """Pairs of warpgroups that multiply; a pair shares a tile."""
    if consumers not in (2, 4):
        raise ValueError(f"consumers must be 2 or 4, found {consumers}")
    return consumers // 2


def add_product(
    x: jax.Array,
    rows: int,
    data: jax.Array,
    shape: tuple[int, int],
    layer: jax.Array,
    config: Mapping[str, int],
    out,
    interpret: bool = False,
) -> None:
    """The kernel alone: adds the product of codes, as tiles hold them, to `out`.

    Args as for `accumulate`, but for x, `tiles.padded` already, of which `rows` are real, and
      out: a Ref of int32 [1, R, P * tiles.ROWS * tiles along N]; interpreted, one a pair.
    """
    layers, planes = data.shape[:2]
    along_n, along_k = tiles.grid(shape)
    units = planes * along_n * along_k
    kernel = _kernel(units, along_k, rows, interpret, **config)
    kernel(jnp.reshape(layer, 1), data.reshape(layers * units, *TILE), x, out)


def _kernel(units, along_k, rows, interpret, *, blocks, stages, consumers):
    """(layer [1], tiles [L * units, 64, 256], x [rows, K], out [1, rows, N]): adds to out."""
    pairs = teams(consumers)
    if stages % pairs:
        raise ValueError(f"stages must be a multiple of pairs of consumers, found {stages}")
    blocks = min(blocks, units)

    def fetch(start, stop, layer, data, x, data_smem, x_smem, full, free):
        """Puts the block's tiles into shared memory, each once its slot is free again."""

        @pl.loop(start, stop + stages)
        def _(unit):
            slot = lax.rem(unit - start, stages)

            @pl.when(unit - stages >= start)
            def _():
                plgpu.barrier_wait(free.at[slot])

            @pl.when(unit < stop)
            def _():
                columns = pl.ds(lax.rem(unit, along_k) * tiles.TILE_K, tiles.TILE_K)
                tile = layer * units + unit
                plgpu.copy_gmem_to_smem(data.at[tile], data_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(x.at[:, columns], x_smem.at[slot], full.at[slot])

    def body(layer, data, x, out, data_smem, x_smem, full, free):
        block, group = lax.axis_index("block"), lax.axis_index("group")
        start, stop = block * units // blocks, (block + 1) * units // blocks

        @pl.when(group == consumers)
        def _():
            plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
            fetch(start, stop, layer[0], data, x, data_smem, x_smem, full, free)

        @pl.when(group < consumers)
        def _():
            plgpu.set_max_registers(multiply_registers(consumers), action="increase")
            team, half = lax.div(group, 2), lax.rem(group, 2)

            def turn(unit):
                """How many of this team's turns, tiles team, + pairs, ..., are before it."""
                return lax.div(unit - start - team + pairs - 1, pairs)

            @pl.loop(lax.div(start, along_k), lax.div(stop - 1, along_k) + 1)
            def _(n):
                first = jnp.maximum(start, n * along_k)
                last = jnp.minimum(stop, (n + 1) * along_k)

                def one(i, accumulators):
                    slot = lax.rem(i * pairs + team, stages)
                    plgpu.barrier_wait(full.at[slot])
                    found = multiply(
                        accumulators, data_smem.at[slot], half, x_smem.at[slot], interpret
                    )
                    plgpu.barrier_arrive(free.at[slot])
                    return found

                accumulators = lax.fori_loop(
                    turn(first), turn(last), one, zeros(x_smem.shape[1], interpret)
                )
                column = n * tiles.ROWS + half * tiles.HALF
                add(out.at[team if interpret else 0], column, accumulators, rows, interpret)

    scratch = [
        plgpu.SMEM((stages, *TILE), jnp.uint8),
        plgpu.SMEM((stages, -(-rows // 8) * 8, tiles.TILE_K), jnp.int8, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ]
    body.__name__ = "ternax_decode"
    return plgpu.kernel(
        body,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="group",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def zeros(rows: int, interpret: bool) -> tuple[jax.Array, ...]:
    """Accumulators int32 [64, rows] of half a tile's outputs, one for each bit position."""
    zero = jnp.zeros((tiles.HALF, rows), jnp.int32)
    return (zero if interpret else plgpu.layout_cast(zero, _SUMS),) * _POSITIONS


def multiply(accumulators, data, half, x, interpret: bool) -> tuple[jax.Array, ...]:
    """Accumulators with the product of half a tile added, each bit position to its own.

    data: the tile, x: its activations int8 [rows, 512], both in shared memory; half: 0 or 1.
    """
    at = [pl.ds((half * _PARTS + part) * _PART[0], _PART[0]) for part in range(_PARTS)]
    if not interpret:
        layout = plgpu.Layout.WG_STRIDED(_PART, vec_size=16)
        parts = [plgpu.load(data.at[rows], layout=layout) for rows in at]
        return tuple(_multiply(layout, parts, x, accumulators))
    bytes_ = jnp.stack([data[rows] for rows in at]).reshape(2, 2, 4, 8, 4, 4, 4)  # c h w g q i b
    codes = bytes_.transpose(2, 1, 3, 0, 5, 4, 6).reshape(tiles.HALF, tiles.SLICE)
    found = []
    for p, accumulator in enumerate(accumulators):
        masked = codes & jnp.uint8(3 << (2 * p))
        digits = x[:, pl.ds(tiles.SLICE * p, tiles.SLICE)].astype(jnp.int32)
        in_place = lax.bitcast_convert_type(masked, jnp.int8).astype(jnp.int32)
        found.append(accumulator + in_place @ digits.T)
    return tuple(found)


def _multiply(layout, parts, x, accumulators):
    """The same as instructions: 64 masks, then 16 of wgmma, positions in turn."""
    rows = accumulators[0].shape[1]
    sums = plgpu.ShapeDtypeStruct((tiles.HALF, rows), jnp.int32, layout=_SUMS)
    of = (layout,) * _PARTS, plgpu.RefType(SWIZZLED), (_SUMS,) * _POSITIONS

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
