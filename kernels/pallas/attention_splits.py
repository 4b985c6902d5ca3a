"""How decode attention splits the slots in use over blocks, and puts their sums together.

The grid is fixed when a program is compiled; how many slots are in use is known when it runs.
Of the splits, the first ones get work, so that blocks without leave at once and what they would
have written is never looked at.

To put sums together a block takes one head of one row. It reads what every split may have left
before it knows how many did, so that reads of device memory are under way together, and every
thread weighs all splits by itself, so that none waits for another.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

MASKED = -1e30

ROW = plgpu.Layout.WGMMA.reduce(1)
# Layouts of registers are said, not inferred.
LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


class Sums(NamedTuple):
    """What blocks leave of the softmax over their slots, scores in powers of two.

    Attributes:
      out: f32 [splits, B, H, E], values times 2^(score - peak); with one split, the result.
      peaks: f32 [B G, MAX_SPLITS, columns], the largest score of each query of a key head.
      totals: of the same shape, sums of 2^(score - peak).

    Splits that had no work, all from the number of tiles on but the first, left nothing.
    """

    out: jax.Array
    peaks: jax.Array
    totals: jax.Array


def share(split, splits, tile, start, length):
    """(first tile, tiles) of the slots start .. length that one of `splits` blocks reads."""
    first = lax.div(start, tile)
    tiles = jnp.maximum(lax.div(length + tile - 1, tile) - first, 0)
    each, more = lax.div(tiles, splits), lax.rem(tiles, splits)
    return first + split * each + jnp.minimum(split, more), each + (split < more).astype(jnp.int32)


def column_of(ref):
    """[M], the same in every column."""
    return plgpu.load(ref, layout=ROW, optimized=False)


def combine(cache, heads, splits, tile, pdl, interpret):
    """The second launch: (start [B], length [1], *`Sums`) -> f32 [B, H, E]. cache: k's shape."""
    _, batch, groups, _, width = cache
    shared = heads // groups

    def body(start, length, parts, peaks, totals, out):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        if pdl:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        at = row * groups + lax.div(head, shared), lax.rem(head, shared)
        layout = plgpu.Layout.WG_STRIDED((width,), vec_size=1) if width % 128 == 0 else ROW
        left = [
            (
                plgpu.load(parts.at[split, row, head], layout=layout, optimized=False),
                peaks[at[0], split, at[1]],
                totals[at[0], split, at[1]],
            )
            for split in range(splits)
        ]
        _, tiles = share(0, 1, tile, start[row], length[0])
        busy = [split < jnp.maximum(tiles, 1) for split in range(splits)]
        peak = functools.reduce(
            jnp.maximum,
            (jnp.where(on, peak, MASKED) for on, (_, peak, _) in zip(busy, left, strict=True)),
        )
        weighted = total = jnp.float32(0)
        for on, (part, own_peak, own_total) in zip(busy, left, strict=True):
            weight = jnp.exp2(own_peak - peak)
            weighted += jnp.where(on, part * weight, 0.0)
            total += jnp.where(on, own_total * weight, 0.0)
        out[row, head] = weighted / jnp.maximum(total, 1e-30)

    body.__name__ = "ternax_combine"
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, heads, width), jnp.float32),
        grid=(batch, heads),
        grid_names=("row", "head"),
        compiler_params=LANE,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
