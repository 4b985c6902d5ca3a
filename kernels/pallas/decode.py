"""The decode kernel: few rows of int8 activations times trits, at the speed of memory.

One block a processor; each streams an equal share of the layer's tiles (stream-K), so small
matrices occupy the whole GPU too:

    tiles along K ->     block 0 | 0 0 0 0 0 1 1 1 |      a block's share may begin and end
    tiles along N        block 1 | 1 1 2 2 2 2 2 3 |      anywhere in a row of tiles

One warpgroup of a block fetches tiles and their activations by TMA, `stages` ahead. Two
multiply, each its half of every tile: load, mask one bit position of all codes, multiply it by
int8 wgmma where it stands, into one accumulator a position. A row of tiles ends with the shifts
that undo the positions and int32 atomic additions, whose order does not change a sum. What a
warpgroup does with half a tile is in `skinny.py`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import operand, skinny, tiles

# Rows of activations (or of their digits) in one pass over the weights. With 24, accumulators
# and operands need more registers than there are, and ptxas lets one wgmma wait for another.
MAX_ROWS = 16
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
    kernel(jnp.reshape(layer, 1), data.reshape(layers * units, *operand.TILE), x, out)


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
                    found = skinny.multiply(
                        accumulators, data_smem.at[slot], half, x_smem.at[slot], interpret
                    )
                    plgpu.barrier_arrive(free.at[slot])
                    return found

                accumulators = lax.fori_loop(
                    turn(first), turn(last), one, skinny.zeros(x_smem.shape[1], interpret)
                )
                column = n * tiles.ROWS + half * tiles.HALF
                skinny.add(out.at[team if interpret else 0], column, accumulators, rows, interpret)

    scratch = [
        plgpu.SMEM((stages, *operand.TILE), jnp.uint8),
        plgpu.SMEM((stages, -(-rows // 8) * 8, tiles.TILE_K), jnp.int8, transforms=skinny.SWIZZLED),
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
