"""Reading memory and nothing else: what a kernel that streams weights by TMA could reach.

One block a processor; each has an equal share of the tiles and keeps `stages` of them under way
into shared memory, where nobody looks at them:

    tiles    block 0 | 0 1 2 3 ...      slot = number within the share, modulo stages:
             block 1 | n n+1 ...        arrived, so asked for again as the tile `stages` on
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import target
from . import backend, tiles

# As large as those of the decode kernel.
TILE = (tiles.TILE_BYTES // 256, 256)
STAGES = 12


def why_not() -> str | None:
    """None where it runs, on the target device; else one line."""
    return backend.unable(target.current().platform)


def read(
    data: jax.Array, after: jax.Array | None, blocks: int, interpret: bool = False
) -> jax.Array:
    """Reads all of `data` once.

    Args:
      data: uint8 [tiles, *TILE].
      after: what the last call returned, so that it is over; or None. Not read.
      blocks: thread blocks, a processor each; at most as many as tiles.

    Returns:
      uint8 [blocks, *TILE]: of each block what its first slot held at the end.
    """
    if after is None:
        after = jnp.zeros((blocks, *TILE), jnp.uint8)
    return _kernel(data.shape[0], blocks, interpret)(data, after)


def _kernel(units, blocks, interpret):
    """(data [units, *TILE], after [blocks, *TILE]) -> [blocks, *TILE]."""

    def body(data, after, out, slots, arrived):
        del after
        block = lax.axis_index("block")
        start, stop = block * units // blocks, (block + 1) * units // blocks

        def ask(unit):
            slot = lax.rem(unit - start, STAGES)
            plgpu.copy_gmem_to_smem(data.at[unit], slots.at[slot], arrived.at[slot])

        @pl.loop(start, jnp.minimum(start + STAGES, stop))
        def _(unit):
            ask(unit)

        @pl.loop(start, stop)
        def _(unit):
            plgpu.barrier_wait(arrived.at[lax.rem(unit - start, STAGES)])

            @pl.when(unit + STAGES < stop)
            def _():
                ask(unit + STAGES)

        plgpu.copy_smem_to_gmem(slots.at[0], out.at[block])
        plgpu.wait_smem_to_gmem(0)

    body.__name__ = "ternax_read"
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((blocks, *TILE), jnp.uint8),
        scratch_types=[
            plgpu.SMEM((STAGES, *TILE), jnp.uint8),
            plgpu.Barrier(num_barriers=STAGES),
        ],
        grid=(blocks,),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
