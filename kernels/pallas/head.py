"""The head kernel: few rows of int8 activations times a table of int8 codes, at memory's speed.

The table stays canonical: nothing of it is repacked or copied. One block a processor; each owns
whole tiles of rows of the table, so that a sum is stored once, and walks over them along K:

    N   block b of B       K ->
    |   tile b             | stage | stage | ...      a stage: `slices` times 128 columns of
    v   tile b + B         | stage | stage | ...      the tile and of x
        tile b + 2 B       ...

One warpgroup of a block fetches by TMA, `stages` ahead; what lies beyond the table arrives as
zeros. Each of the others owns ROWS rows of a tile: it loads their codes as wgmma's operand, one
instruction turns four into values, and they meet x, which lies in shared memory. Blocks begin
at different columns, so that they do not all ask the cache for the same lines of x at once.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Rows of activations (or of their digits) in one pass over the table: what leaves five stages room.
MAX_ROWS = 96
# Rows of a tile for each warpgroup that multiplies, and of one wgmma.
ROWS, HALF = 128, 64
# Columns of what one TMA fetches: a row of shared memory as wgmma and its swizzle have it.
SLICE = 128
# A code is its value + 128: with this bit turned over it is the value, as an int8.
_SIGN = 0x80
# Registers of a thread that fetches, and of one that multiplies, instead of an equal share.
_FETCH_REGISTERS, _MULTIPLY_REGISTERS = 40, 232


def heuristic(blocks: int) -> dict[str, int]:
    """Settings on a GPU of `blocks` processors.

    Five stages hold 160 KiB of the table in flight on each processor, four times what 4.8 TB/s
    need at a latency of 1 us. The taller a tile, the less of x is read, from the cache, for each
    byte of the table: with two groups 1/32 at 8 rows, 3/8 at MAX_ROWS.
    """
    return {"blocks": blocks, "stages": 5, "consumers": 2, "slices": 1}


def accumulate(
    x: jax.Array,
    data: jax.Array,
    shape: tuple[int, int],
    layer: jax.Array,
    config: Mapping[str, int],
    interpret: bool = False,
) -> jax.Array:
    """x times one layer of a stack of tables, exactly.

    Args:
      x: int8 [R, K], R at most MAX_ROWS.
      data: uint8 [L, 1, N, K padded to 16], canonical int8 codes.
      shape: (K, N).
      layer: int32 [].
      config: {"blocks": thread blocks, "stages": in flight in each, "consumers": 1 or 2 warpgroups
        that multiply, "slices": of 128 columns, in a stage}.
      interpret: run on the CPU, by Pallas' interpreter of Mosaic GPU, whose wgmma reads shared
        memory alone.

    Returns:
      int32 [R, 1, N].
    """
    k_size, n = shape
    rows = x.shape[0]
    # wgmma on int8 takes 8, 16, 24, 32, 48, 64, 80 or 96 of them.
    many = -rows % (8 if rows <= 32 else 16)
    x = jnp.pad(x, ((0, many), (0, -k_size % (config["slices"] * SLICE))))
    kernel = _kernel(n, x.shape[0], x.shape[1], interpret, **config)
    y = kernel(jnp.reshape(layer, 1), data[:, 0], x)
    return y[:n, :rows].T[:, None]


def _kernel(n, rows, k_size, interpret, *, blocks, stages, consumers, slices):
    """(layer [1], table [L, N, K], x [rows, K]) -> int32 [tiles * consumers * ROWS, rows]."""
    height, width = consumers * ROWS, slices * SLICE
    tiles, along_k = math.ceil(n / height), k_size // width
    blocks = min(blocks, tiles)

    def fetch(units, block, layer, table, x, table_smem, x_smem, full, free):
        """Puts the block's stages into shared memory, each once its slot is free again."""

        @pl.loop(0, units + stages)
        def _(unit):
            slot = lax.rem(unit, stages)

            @pl.when(unit >= stages)
            def _():
                plgpu.barrier_wait(free.at[slot])

            @pl.when(unit < units)
            def _():
                at = pl.ds((block + lax.div(unit, along_k) * blocks) * height, height)
                first = lax.rem(unit + block * along_k // blocks, along_k) * width
                for i in range(slices):
                    columns = pl.ds(first + i * SLICE, SLICE)
                    plgpu.copy_gmem_to_smem(
                        table.at[layer, at, columns], table_smem.at[slot, i], full.at[slot]
                    )
                columns = pl.ds(first, width)
                plgpu.copy_gmem_to_smem(x.at[:, columns], x_smem.at[slot], full.at[slot])

    def multiply(accumulators, slot, group, table_smem, x_smem, operand_smem):
        """Adds the product of this group's rows of one stage."""
        for i in range(slices):
            digits = x_smem.at[slot, :, pl.ds(i * SLICE, SLICE)].transpose((1, 0))
            for half, accumulator in enumerate(accumulators):
                at = pl.ds(group * ROWS + half * HALF, HALF)
                codes = plgpu.load(table_smem.at[slot, i, at], layout=plgpu.Layout.WGMMA_8BIT)
                values = lax.bitcast_convert_type(codes ^ jnp.uint8(_SIGN), jnp.int8)
                if interpret:
                    operand_smem[...] = values
                    values = operand_smem
                plgpu.wgmma(accumulator, values, digits)
        plgpu.wgmma_wait(0)

    def body(layer, table, x, out, table_smem, x_smem, full, free, *operand_smem):
        block, group = lax.axis_index("block"), lax.axis_index("group")
        own_tiles = lax.div(tiles - block + blocks - 1, blocks)

        @pl.when(group == consumers)
        def _():
            plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
            units = own_tiles * along_k
            fetch(units, block, layer[0], table, x, table_smem, x_smem, full, free)

        @pl.when(group < consumers)
        def _():
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
            own_smem = operand_smem[0].at[group] if interpret else None

            @pl.loop(0, own_tiles)
            def _(i):
                def tile(*accumulators):
                    @pl.loop(0, along_k)
                    def _(k):
                        slot = lax.rem(i * along_k + k, stages)
                        plgpu.barrier_wait(full.at[slot])
                        multiply(accumulators, slot, group, table_smem, x_smem, own_smem)
                        plgpu.commit_smem()  # what was read here is now written by TMA
                        plgpu.barrier_arrive(free.at[slot])

                    first = (block + i * blocks) * height + group * ROWS
                    for half, accumulator in enumerate(accumulators):
                        out[pl.ds(first + half * HALF, HALF)] = accumulator[...]

                pl.run_scoped(tile, *(plgpu.ACC((HALF, rows), jnp.int32),) * (ROWS // HALF))

    swizzle = plgpu.SwizzleTransform(SLICE)
    tiled = plgpu.TilingTransform((8, SLICE)), swizzle
    scratch = [
        plgpu.SMEM((stages, slices, height, SLICE), jnp.uint8, transforms=(swizzle,)),
        plgpu.SMEM((stages, rows, width), jnp.int8, transforms=tiled),
        plgpu.Barrier(num_arrivals=slices + 1, num_barriers=stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    ]
    if interpret:
        scratch.append(plgpu.SMEM((consumers, HALF, SLICE), jnp.int8))
    body.__name__ = "ternax_head"
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tiles * height, rows), jnp.int32),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="group",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
