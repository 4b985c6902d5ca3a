"""The decode kernel: few rows of int8 activations times trits, at the speed of memory.

One block a processor; each streams an equal share of the layer's tiles (stream-K), so small
matrices occupy the whole GPU too:

    tiles along K ->     block 0 | 0 0 0 0 0 1 1 1 |      a block's share may begin and end
    tiles along N        block 1 | 1 1 2 2 2 2 2 3 |      anywhere in a row of tiles

One warpgroup of a block fetches tiles and their activations by TMA, `stages` ahead. The
others take tiles in turn: load, mask one bit position of all codes, multiply it by int8 wgmma
where it stands, into one accumulator a position. A row of tiles ends with the shifts that
undo the positions and int32 atomic additions, whose order does not change a sum.

A group multiplies both halves of a tile by the same activations, one after the other, so that
addresses of shared memory are made once for two instructions of wgmma.
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
PART = (8, 256)
_PARTS = 4
_POSITIONS = 4
OPERAND = (tiles.HALF, tiles.SLICE)
# A tile as TMA brings it.
TILE = (2 * _PARTS * PART[0], PART[1])
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
    need at a latency of 1 us. Of two groups one loads and masks while the other multiplies.
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
        warpgroups that multiply}; stages must be a multiple of consumers.
      interpret: run on the CPU, by Pallas' interpreter of Mosaic GPU. It has neither inline
        instructions nor atomics; each has a twin in jnp here.

    Returns:
      int32 [R, P, N].
    """
    planes, (along_n, _) = data.shape[1], tiles.grid(shape)
    ordered = tiles.padded(x)
    sums = jnp.pad(tiles.offsets(x), (0, ordered.shape[0] - x.shape[0]))
    start = jnp.broadcast_to(sums, (planes * along_n * tiles.ROWS, sums.size))
    if interpret:
        start = jnp.pad(start, ((0, (config["consumers"] - 1) * start.shape[0]), (0, 0)))
    out = jax.new_ref(start)
    add(ordered, data, shape, layer, config, out, interpret)
    y = jax.freeze(out).reshape(-1, planes, along_n * tiles.ROWS, sums.size).sum(0)
    return jnp.moveaxis(y[:, : shape[1], : x.shape[0]], 2, 0)


def add(
    x: jax.Array,
    data: jax.Array,
    shape: tuple[int, int],
    layer: jax.Array,
    config: Mapping[str, int],
    out,
    interpret: bool = False,
) -> None:
    """The kernel alone: adds the product of codes, as tiles hold them, to `out`.

    Args as for `accumulate`, but for x, `tiles.padded` already, and
      out: a Ref of int32 [P * tiles.ROWS * tiles along N, padded R].
    """
    layers, planes = data.shape[:2]
    along_n, along_k = tiles.grid(shape)
    units = planes * along_n * along_k
    kernel = _kernel(units, along_k, x.shape[0], interpret, **config)
    kernel(jnp.reshape(layer, 1), data.reshape(layers * units, *TILE), x, out)


def _kernel(units, along_k, rows, interpret, *, blocks, stages, consumers):
    """(layer [1], tiles [L * units, 64, 256], x [rows, K], out [N, rows]) -> None, adds to out."""
    if stages % consumers:
        raise ValueError(f"stages must be a multiple of consumers, found {stages}, {consumers}")
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

    def store(accumulators, n, group, out):
        """Adds a row of tiles to the output: its sum, or what this group has of it."""
        for half in (0, 1):
            total = sum(acc[...] >> (2 * p) for p, acc in enumerate(accumulators[half]))
            row = n * tiles.ROWS + half * tiles.HALF
            if interpret:  # an output for each group, or they would race
                at = out.at[pl.ds(group * (units // along_k * tiles.ROWS) + row, tiles.HALF)]
                at[...] += total
            else:
                plgpu.atomic_add(out.at[pl.ds(row, tiles.HALF)], total)

    def body(layer, data, x, out, data_smem, x_smem, full, free, *operand_smem):
        block, group = lax.axis_index("block"), lax.axis_index("group")
        start, stop = block * units // blocks, (block + 1) * units // blocks

        @pl.when(group == consumers)
        def _():
            plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
            fetch(start, stop, layer[0], data, x, data_smem, x_smem, full, free)

        @pl.when(group < consumers)
        def _():
            plgpu.set_max_registers(multiply_registers(consumers), action="increase")
            own_smem = operand_smem[0].at[group] if interpret else None

            def turn(unit):
                """How many of this group's turns, tiles group, + consumers, ..., are before it."""
                return lax.div(unit - start - group + consumers - 1, consumers)

            @pl.loop(lax.div(start, along_k), lax.div(stop - 1, along_k) + 1)
            def _(n):
                first = jnp.maximum(start, n * along_k)
                last = jnp.minimum(stop, (n + 1) * along_k)

                def row_of_tiles(*accumulators):
                    accumulators = accumulators[:_POSITIONS], accumulators[_POSITIONS:]

                    @pl.loop(turn(first), turn(last))
                    def _(i):
                        slot = lax.rem(i * consumers + group, stages)
                        plgpu.barrier_wait(full.at[slot])
                        x_tile = x_smem.at[slot]
                        multiply(accumulators, data_smem.at[slot], x_tile, own_smem, interpret)
                        plgpu.barrier_arrive(free.at[slot])

                    store(accumulators, n, group, out)

                accumulator = plgpu.ACC((tiles.HALF, rows), jnp.int32)
                pl.run_scoped(row_of_tiles, *(accumulator,) * (2 * _POSITIONS))

    scratch = ring(stages, rows)
    if interpret:
        scratch.append(plgpu.SMEM((consumers, *OPERAND), jnp.int8))
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


def ring(stages: int, rows: int) -> list:
    """Shared memory for `stages` tiles and their activations, int8 [rows, 512], and barriers:
    a slot is full when both have come, and free when a group has multiplied them."""
    transforms = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
    return [
        plgpu.SMEM((stages, *TILE), jnp.uint8),
        plgpu.SMEM((stages, rows, tiles.TILE_K), jnp.int8, transforms=transforms),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    ]


def multiply(accumulators, data, x, operand_smem, interpret):
    """Adds one tile's product, each bit position to its own accumulator, four for each half.

    data: the tile, x: its activations int8 [rows, 512], both in shared memory.
    """
    halves = [_operand(data, half, interpret) for half in (0, 1)]
    for p in range(_POSITIONS):
        digits = x.at[:, pl.ds(tiles.SLICE * p, tiles.SLICE)].transpose((1, 0))
        mask = jnp.int8(np.uint8(3 << (2 * p)).view(np.int8))
        for half in (0, 1):
            codes = halves[half] & mask
            if interpret:  # its wgmma reads shared memory alone
                operand_smem[...] = codes
                codes = operand_smem
            plgpu.wgmma(accumulators[half][p], codes, digits)
    plgpu.wgmma_wait(0)


def _operand(data, half, interpret):
    """int8 [64, 128] for wgmma, four codes a byte, of one half of a tile in shared memory."""
    at = [pl.ds((half * _PARTS + part) * PART[0], PART[0]) for part in range(_PARTS)]
    if not interpret:
        layout = plgpu.Layout.WG_STRIDED(PART, vec_size=16)
        return _as_operand(layout, *(plgpu.load(data.at[rows], layout=layout) for rows in at))
    bytes_ = jnp.stack([data[rows] for rows in at]).reshape(2, 2, 4, 8, 4, 4, 4)  # c h w g q i b
    return lax.bitcast_convert_type(
        bytes_.transpose(2, 1, 3, 0, 5, 4, 6).reshape(OPERAND), jnp.int8
    )


def _as_operand(part_layout, *parts):
    """Renames registers: 16 words of a thread as one of wgmma's operands. No instruction."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    @plgpu.inline_mgpu(
        arg_types=(part_layout,) * _PARTS,
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
