"""How a block of a chain enters a projection without the others: one row, all of it.

The row is read in tiles of 512 columns, [4, 128]: a warp has a slice, as the quantized row lies
in shared memory. Groups of a block take tiles in turn and leave their statistics to one another.
All blocks do the same in the same order, so all have the same bits.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import tiles
from .chain_plan import SLICES, Known, inverse_root, layout, steps


def enter(worker, i, known, stream):
    """(what is `Known` of link i's product, the stream as a list of tiles or None)."""
    plan, refs, link = worker.plan, worker.refs, worker.plan.links[i]
    mine = own_tiles(worker, link.shape[0])
    if link.normed:
        at = refs.at[2 * i + 1]
        weights = [row_tile(plan, refs.norm[i], (at,), tile) for tile, _ in mine]
    if link.enter != "input" and stream is None:
        stream = stream_tiles(worker)
    if link.enter == "residual":
        scales = scale_tiles(worker, i - 1, mine)
        worker.meet()
        values = stream = sums_added(worker, i - 1, known, scales, mine, stream)
    else:
        worker.arrive()  # with sums that are zero
        values = stream
        if link.enter == "input":
            values = [row_tile(plan, refs.given, (0,), tile) for tile, _ in mine]
    worker.mark()
    weighed = values
    if link.normed:
        weighed = [value * weight for value, weight in zip(values, weights, strict=True)]
    peak, squares = statistics(worker, i, mine, values, weighed)
    worker.mark()
    root = inverse_root(squares, link) if link.normed else None
    x_scale, factor = steps(peak, root)
    lacks = quantize(worker, i, mine, weighed, factor)
    if not i:
        worker.wait()
    worker.mark()
    w_scales = None if worker.next_is_alone(i) else worker.scales(i)
    return Known(x_scale, lacks, w_scales), stream


def own_tiles(worker, size):
    """[(tile, 1 where it counts, 0 where another group has it; None where it surely counts)]."""
    count, groups = size // tiles.TILE_K, worker.plan.consumers
    found = []
    for first in range(0, count, groups):
        tile = worker.group + first
        sure = first + groups <= count
        counts = None if sure else (tile < count).astype(jnp.int32)
        found.append((tile if sure else jnp.minimum(tile, count - 1), counts))
    return found


def row_tile(plan, ref, lead, tile):
    """[4, 128] of ref [..., columns], at `lead`."""
    if plan.interpret:
        return ref[(*lead, pl.ds(tile * tiles.TILE_K, tiles.TILE_K))].reshape(SLICES)
    cut = ref.reshape(*ref.shape[:-1], -1, tiles.SLICE)
    return plan.read(cut.at[(*lead, pl.ds(tile * SLICES[0], SLICES[0]))], layout(4))


def stream_tiles(worker):
    """The stream as it was when the chain began."""
    plan, refs = worker.plan, worker.refs
    mine = own_tiles(worker, plan.columns)
    return [row_tile(plan, refs.stream_in, (0,), tile) for tile, _ in mine]


def scale_tiles(worker, i, mine):
    plan, refs = worker.plan, worker.refs
    return [row_tile(plan, refs.scale[i], (refs.at[2 * i],), tile) for tile, _ in mine]


def added(worker, i, known, stream):
    """The stream, tile by tile, with what link i has made."""
    mine = own_tiles(worker, worker.plan.columns)
    return sums_added(worker, i, known, scale_tiles(worker, i, mine), mine, stream)


def sums_added(worker, i, known, scales, mine, stream):
    plan, refs = worker.plan, worker.refs
    lacks, x_scale = known.lacks, known.x_scale
    if lacks is None:
        lacks = worker.shares(refs.offsets[i], plan.links[i].shape[0], jnp.sum)
        lacks, x_scale = (
            lax.broadcast_in_dim(plan.cast(each, layout(4).reduce(1)), SLICES, (0,))
            for each in (lacks, x_scale)
        )
    found = []
    for (tile, _), scale, value in zip(mine, scales, stream, strict=True):
        total = sum(row_tile(plan, refs.sums[i], (c, 0), tile) for c in range(plan.copies))
        found.append(value + (total + lacks).astype(jnp.float32) * (x_scale * scale))
    return found


def statistics(worker, i, mine, values, weighed):
    """(largest magnitude, sum of squares or None) of the whole row, numbers."""
    plan, refs, normed = worker.plan, worker.refs, worker.plan.links[i].normed
    peak = squares = None
    for (_, counts), value, one in zip(mine, values, weighed, strict=True):
        size = jnp.maximum(one, -one)
        peak = size if peak is None else jnp.maximum(peak, size)
        if normed:
            square = value * value
            square = square if counts is None else square * counts.astype(jnp.float32)
            squares = square if squares is None else squares + square
    refs.statistics[i, 0, worker.group, :] = jnp.max(peak, axis=1)
    if normed:
        refs.statistics[i, 1, worker.group, :] = jnp.sum(squares, axis=1)
    plgpu.barrier_arrive(refs.noted.at[i])
    plgpu.barrier_wait(refs.noted.at[i])
    places = [(group, row) for group in range(plan.consumers) for row in range(SLICES[0])]
    peak, *rest = (refs.statistics[i, 0, group, row] for group, row in places)
    for one in rest:
        peak = jnp.maximum(peak, one)
    return peak, sum(refs.statistics[i, 1, *place] for place in places) if normed else None


def quantize(worker, i, mine, weighed, factor):
    """Leaves the row in shared memory, as int8: what its products lack, see `tiles`."""
    plan, refs = worker.plan, worker.refs
    counted = None
    for (tile, counts), value in zip(mine, weighed, strict=True):
        digits = plan.rounded(value * factor)
        refs.x_smem[tile, :, 0, :] = digits.astype(jnp.int8)
        digits = digits if counts is None else digits * counts
        counted = digits if counted is None else counted + digits
    refs.row_sums[i, worker.group, :] = jnp.sum(counted, axis=1)
    if not plan.interpret:
        plgpu.commit_smem()
    plgpu.barrier_arrive(refs.quantized.at[i])
    plgpu.barrier_wait(refs.quantized.at[i])
    last = SLICES[0] - 1
    return sum(
        refs.row_sums[i, group, row] * (1 if row == last else -1)
        for group in range(plan.consumers)
        for row in range(SLICES[0])
    )


def write_stream(worker, stream):
    """Each block its share of the tiles."""
    plan, refs = worker.plan, worker.refs
    for (tile, _), value in zip(own_tiles(worker, plan.columns), stream, strict=True):

        @pl.when(lax.rem(tile, plan.blocks) == worker.block)
        def _(tile=tile, value=value):
            if plan.interpret:
                cols = pl.ds(tile * tiles.TILE_K, tiles.TILE_K)
                refs.stream_out[0, cols] = value.reshape(tiles.TILE_K)
            else:
                cut = refs.stream_out.reshape(plan.padded, -1, tiles.SLICE)
                cut[0, pl.ds(tile * SLICES[0], SLICES[0]), :] = value
