"""How decode attention splits the slots in use over blocks, and puts their sums together.

The grid is fixed when a program is compiled; how many slots are in use is known when it runs.
Of the splits, the first ones get work, so that blocks without leave at once and what they would
have written is never looked at.

A block takes one head of one row. It starts to read what every split may have left before it
knows how many did, so that all reads of device memory are under way together.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Rows of the array that splits leave their sums in.
MAX_SPLITS = 64
MASKED = -1e30

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
# Layouts of registers are said, not inferred.
LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def share(split, splits, tile, start, length):
    """(first tile, tiles) of the slots start .. length that one of `splits` blocks reads."""
    first = lax.div(start, tile)
    tiles = jnp.maximum(lax.div(length + tile - 1, tile) - first, 0)
    each, more = lax.div(tiles, splits), lax.rem(tiles, splits)
    return first + split * each + jnp.minimum(split, more), each + (split < more).astype(jnp.int32)


def column_of(ref):
    """[M], the same in every column."""
    return plgpu.load(ref, layout=ROW, optimized=False)


def combine(batch, interpret, pdl, *, groups, slots, width, heads, splits, tile):
    """The second launch: (start [B], length, layer [1], f32 [splits, B, H, E], largest scores, sums
    of weights [B G, MAX_SPLITS, columns]) -> f32 [B, H, E]."""
    del slots
    shared = heads // groups
    columns = -(-shared // 8) * 8

    def body(start, length, layer, parts, peaks, totals, out, weight_smem):
        del layer
        row, head = lax.axis_index("row"), lax.axis_index("head")
        if pdl:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        layout = plgpu.Layout.WG_STRIDED((width,), vec_size=1) if width % 128 == 0 else ROW
        own = [
            plgpu.load(parts.at[split, row, head], layout=layout, optimized=False)
            for split in range(splits)
        ]
        pair = row * groups + lax.div(head, shared)
        peak, total = (
            plgpu.load(x.at[pair], layout=WGMMA, optimized=False) for x in (peaks, totals)
        )
        _, tiles = share(0, 1, tile, start[row], length[0])
        left = jnp.clip(tiles, 1, splits)  # blocks that left something
        some = plgpu.broadcasted_iota(jnp.int32, peak.shape, 0, layout=WGMMA) < left
        peak = jnp.where(some, peak, MASKED)
        weight = jnp.exp2(peak - lax.broadcast_in_dim(peak.max(0), peak.shape, [1]))
        weight = jnp.where(some, weight, 0.0)
        total = jnp.maximum((weight * jnp.where(some, total, 0.0)).sum(0), 1e-30)
        weight_smem[...] = weight / lax.broadcast_in_dim(total, weight.shape, [1])
        column = lax.rem(head, shared)
        total = jnp.zeros_like(own[0])
        for split, part in enumerate(own):
            total += jnp.where(split < left, part * weight_smem[split, column], 0.0)
        out[row, head] = total

    body.__name__ = "ternax_combine"
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, heads, width), jnp.float32),
        scratch_types=[plgpu.SMEM((MAX_SPLITS, columns), jnp.float32)],
        grid=(batch, heads),
        grid_names=("row", "head"),
        compiler_params=LANE,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
