"""Decode attention: one new token a row over its slots of the KV cache, at the speed of memory.

Keys and values are the left operands of wgmma, so that of its 64 rows none is idle; the few
queries that share a key head stand on the right, each rounded to bf16 three times over:

    S^T [64 slots, 3 R] = K [64 slots, E] q^T      O^T [E, 3 R] = V^T [E, 64 slots] P^T

A float32 is the sum of three bf16, exactly, so beside a key or value (bf16, or an int8 code)
products are exact and only their float32 sums round, as they would without tensor cores.

Slots are split (flash decoding; Dao et al., 2023). A block takes one key head of one row and
a share of the tiles of slots in use, which it computes from `length` when it runs:

    grid        split 0 | 1 | 2 | ...       tiles of slots     |..:xx|xxxxx|xxxxx|xx...|
    x key heads of rows                                           start          length

Split 0 also appends: it takes the new key and value from registers, as the first of its
running softmax, and stores them into the cache, slot `length`, that no block attends to.
More than one split leaves sums, and a second launch adds them up.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .attention_splits import LANE, MASKED, MAX_SPLITS, ROW, WGMMA, column_of, combine, share

# Query heads that share a key head, at most; columns of wgmma come in eights.
MAX_SHARED = 16
WIDTHS = (64, 128)
# Slots of a tile, once or twice the rows of a wgmma.
TILES = (64, 128)
# Shared memory of a processor that its blocks may have, what the hardware takes for two set aside.
SHARED_BYTES = 226 * 1024
# bf16 that sum to a float32: 3 x 8 bits of significand.
_TERMS = 3
# Elements that TMA copies along one axis, at most.
_MOST = 256
_LOG2E = math.log2(math.e)

# The same places in registers one by one: what is loaded or stored across need not be pairs.
_SINGLE = plgpu.Layout._WGMMA_ACC_32BIT


def why_not(qkv, k) -> str | None:
    """None where `step` can take the call, which has the arguments qkv and k; else one line."""
    _, tokens, columns = qkv.shape
    groups, slots, width = k.shape[2:]
    shared = columns // width // groups - 2
    if tokens != 1:
        return f"it attends with one token a row, found {tokens}"
    if k.dtype not in (jnp.uint16, jnp.int8):
        return f"it reads a cache of bf16 or int8, found {k.dtype}"
    if width not in WIDTHS:
        return f"it takes heads of {' or '.join(map(str, WIDTHS))}, found {width}"
    if shared > MAX_SHARED:
        return f"it takes up to {MAX_SHARED} query heads to a key head, found {shared}"
    if slots % TILES[0]:
        return f"it reads {TILES[0]} slots at a time, found {slots} in all"
    if math.prod(k.shape[:-1]) >= 2**31:
        return f"it counts slots of all layers and heads in 31 bits, found {k.shape[:-1]}"
    return None


def heuristic(blocks: int, heads: int, k) -> dict[str, int]:
    """Settings on a GPU of `blocks` processors, for `heads` query heads over a cache k.

    Key heads of rows that fill the processors need no splits, and so no second launch. Fewer are
    split over two blocks a processor, of which one computes while the other's tiles arrive; a
    block that has a processor alone takes larger tiles, whose steps wait for each other half as
    often. Of tiles in flight there are as many as shared memory holds: 29 KB on each processor
    are what 4.3 TB/s need at a latency of 0.9 us.
    """
    _, batch, groups, slots, width = k.shape
    pairs = batch * groups
    splits, (tile, larger) = 1, TILES
    if pairs < 0.9 * blocks:
        splits = max(1, min(2 * blocks // pairs, slots // tile, MAX_SPLITS))
    alone = pairs * splits <= blocks
    if alone and splits == 1 and slots % larger == 0:
        tile = larger
    columns = -(-heads // groups // 8) * 8
    # Operands of queries and weights, their sums; for int8, a tile as bf16; scratch, barriers.
    other = columns * (_TERMS * 2 * (width + tile) + 8 * width) + 4 * width * 4 + 5 * 1024
    if k.dtype == jnp.int8:
        other += 2 * tile * width * 2
    room = SHARED_BYTES // (1 if alone else 2) - other
    stages = room // (2 * tile * width * k.dtype.itemsize)
    return {"splits": splits, "tile": tile, "stages": min(4, stages)}


def step(
    qkv,
    rope,
    k,
    v,
    k_scale,
    v_scale,
    start,
    length,
    layer,
    config: Mapping[str, int],
    *,
    pdl: bool = False,
    interpret: bool = False,
):
    """Rotates q and k, puts k and v into the cache in place, and attends; arguments as for
    `kernels.attention.step_attention` of one token, where `why_not` says nothing against it.

    Args:
      config: {"splits": blocks that share the slots of one key head of one row, "tile": slots
        that a block takes at a time, of TILES, "stages": tiles in flight in each}.
      pdl: programmatic dependent launch: a kernel starts while the one before it ends.
      interpret: run on the CPU, by Pallas' interpreter of Mosaic GPU.

    Returns:
      (f32 [B, 1, H, E], k, v, k_scale, v_scale).
    """
    layers, batch, groups, slots, width = k.shape
    heads = qkv.shape[-1] // width - 2 * groups
    sizes = dict(groups=groups, slots=slots, width=width, heads=heads)
    splits = config["splits"]
    stores = [_rows(store) for store in (k, v)]
    scales = [] if k_scale is None else [store.reshape(-1) for store in (k_scale, v_scale)]
    refs = [jax.new_ref(store) for store in (*stores, *scales)]
    place = jnp.reshape(length, 1), jnp.reshape(layer, 1)
    cos, sin = (table.reshape(batch, width // 2) for table in rope)
    attend = _attend(batch, stores[0].dtype, interpret, pdl, **sizes, **config)
    out, *sums = attend(qkv.reshape(batch, -1), cos, sin, start, *place, *refs)
    if splits > 1:
        out = combine(batch, interpret, pdl, splits=splits, tile=config["tile"], **sizes)(
            start, *place, out, *sums
        )
    k_new, v_new, *scales = (jax.freeze(ref) for ref in refs)
    if k.dtype == jnp.uint16:
        k_new, v_new = (lax.bitcast_convert_type(x, jnp.uint16) for x in (k_new, v_new))
    scales = [x.reshape(k.shape[:-1]) for x in scales] or [None, None]
    return (
        out.reshape(batch, 1, heads, width),
        *(x.reshape(k.shape) for x in (k_new, v_new)),
        *scales,
    )


def _rows(store):
    if store.dtype == jnp.uint16:
        store = lax.bitcast_convert_type(store, jnp.bfloat16)
    return store.reshape(-1, store.shape[-1])


def _terms(x):
    """bf16 [M, 3 R] of f32 [M, R]: terms that sum to x, each the largest that is not beyond it."""
    terms = []
    for _ in range(_TERMS):
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16))
        term = lax.bitcast_convert_type(bits, jnp.float32)
        terms.append(term.astype(jnp.bfloat16))
        x = x - term
    return jnp.concatenate(terms, axis=1)


def _sum_terms(x):
    rows, columns = x.shape[0], x.shape[1] // _TERMS
    first, *rest = (
        lax.slice(x, (0, i * columns), (rows, (i + 1) * columns)) for i in range(_TERMS)
    )
    return first + functools.reduce(jnp.add, rest)


def _attend(batch, dtype, interpret, pdl, *, groups, slots, width, heads, splits, tile, stages):
    """(qkv [B, (H + 2 G) E], cos, sin [B, E / 2], start [B], length, layer [1], k, v [rows, E],
    scales [rows]) -> (out f32 [splits, B, H, E], largest scores, their sums [B G, splits, R])."""
    shared = heads // groups
    columns = -(-shared // 8) * 8
    half = width // 2
    quantized = dtype == jnp.int8

    def body(qkv, cos, sin, start, length, layer, k, v, *refs):
        scales, (out, peaks, totals, *refs) = refs[: 2 * quantized], refs[2 * quantized :]
        q_smem, p_smem, out_smem, heads_smem, rope_smem, *refs = refs
        small, k_smem, v_smem, full, *wide_smem = refs
        split, pair = lax.axis_index("split"), lax.axis_index("pair")
        row, group = lax.div(pair, groups), lax.rem(pair, groups)
        if pdl:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        first_slot, used = start[row], length[0]
        first_tile, tiles = share(split, splits, tile, first_slot, used)
        base = ((layer[0] * batch + row) * groups + group) * slots

        def fetch(turn):
            slot = lax.rem(turn, stages)
            at = pl.ds(base + (first_tile + turn) * tile, tile)
            plgpu.copy_gmem_to_smem(k.at[at], k_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(v.at[at], v_smem.at[slot], full.at[slot])
            for scale, scale_smem in zip(scales, wide_smem[2:], strict=True):
                plgpu.copy_gmem_to_smem(scale.at[at], scale_smem.at[slot], full.at[slot])

        def operands(slot):
            """Keys and values of a tile as bf16 in shared memory, and what they are scaled by."""
            if not quantized:
                return k_smem.at[slot], v_smem.at[slot]
            for codes, wide in zip((k_smem, v_smem), wide_smem, strict=False):
                x = plgpu.load(codes.at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                wide[...] = plgpu.layout_cast(x.astype(jnp.bfloat16), WGMMA)
            plgpu.commit_smem()
            return *wide_smem[:2], *(column_of(scale_smem.at[slot]) for scale_smem in wide_smem[2:])

        def inputs():
            """Fetches new queries and the new key, with half a head to spare on either side."""
            for first in range(0, shared * width, _MOST):
                size = min(_MOST, shared * width - first)
                plgpu.copy_gmem_to_smem(
                    qkv.at[row, pl.ds(group * shared * width + first, size)],
                    heads_smem.at[pl.ds(half + first, size)],
                    small,
                )
            plgpu.copy_gmem_to_smem(
                qkv.at[row, pl.ds((heads + group) * width, width)],
                heads_smem.at[pl.ds(half + shared * width, width)],
                small,
            )
            for i, table in enumerate((cos, cos, sin, sin)):
                plgpu.copy_gmem_to_smem(table.at[row], rope_smem.at[pl.ds(i * half, half)], small)

        def rotated(head):
            """One of the fetched heads; of a pair, one stands half a head from the other."""
            cosine, sine = (column_of(rope_smem.at[pl.ds(i * width, width)]) for i in (0, 1))
            own, after, before = (
                column_of(heads_smem.at[pl.ds(head * width + offset, width)])
                for offset in (half, width, 0)
            )
            first = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=ROW) < half
            return own * cosine + jnp.where(first, -after, before) * sine

        def attend(state, turn):
            peak, total, acc = state
            slot = lax.rem(turn, stages)
            plgpu.barrier_wait(full.at[slot])
            keys, values, *scale = operands(slot)

            def scores(acc_ref):
                plgpu.wgmma(acc_ref, keys, q_smem.transpose((1, 0)))
                return acc_ref[...]

            score = pl.run_scoped(scores, plgpu.ACC((tile, _TERMS * columns), jnp.float32))
            score = _sum_terms(score)
            if quantized:
                score = score * lax.broadcast_in_dim(scale[0], score.shape, [0])
            at = (first_tile + turn) * tile + plgpu.broadcasted_iota(
                jnp.int32, score.shape, 0, layout=WGMMA
            )
            seen = (at >= first_slot) & (at < used)
            score = jnp.where(seen, score, MASKED)
            new_peak = jnp.maximum(peak, score.max(0))
            weight = jnp.exp2(score - lax.broadcast_in_dim(new_peak, score.shape, [1]))
            weight = jnp.where(seen, weight, 0.0)
            shrink = jnp.exp2(peak - new_peak)
            total = total * lax.broadcast_in_dim(shrink, total.shape, [1]) + weight
            if quantized:
                weight = weight * lax.broadcast_in_dim(scale[1], weight.shape, [0])
            p_smem.transpose((1, 0))[...] = _terms(weight)
            plgpu.commit_smem()

            def weighted(acc_ref):
                plgpu.wgmma(acc_ref, values.transpose((1, 0)), p_smem.transpose((1, 0)))
                return acc_ref[...]

            part = pl.run_scoped(weighted, plgpu.ACC((width, _TERMS * columns), jnp.float32))
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [1]) + _sum_terms(part)

            @pl.when(turn + stages < tiles)
            def _():
                fetch(turn + stages)

            return new_peak, total, acc

        active = (tiles > 0) | (split == 0)
        inputs()

        @pl.when(active)
        def _():
            for turn in range(stages):
                pl.when(turn < tiles)(functools.partial(fetch, turn))

        # A block must not leave before what it asked for has arrived.
        plgpu.barrier_wait(small)

        @pl.when(active)
        def _():
            column = plgpu.broadcasted_iota(jnp.int32, (width, columns), 1, layout=WGMMA)
            q = jnp.zeros_like(column, jnp.float32)
            for head in range(shared):
                one = rotated(head) * (width**-0.5 * _LOG2E)
                q = jnp.where(column == head, lax.broadcast_in_dim(one, q.shape, [0]), q)
            q_smem.transpose((1, 0))[...] = _terms(q)
            plgpu.commit_smem()

            v_at = pl.ds((heads + groups + group) * width, width)
            new_k, *stored_k = _stored(rotated(shared), dtype)
            new_v, *stored_v = _stored(column_of(qkv.at[row, v_at]), dtype)

            @pl.when((split == 0) & (used < slots))
            def _():
                for refs, stored in (((k, *scales[:1]), stored_k), ((v, *scales[1:]), stored_v)):
                    for ref, value in zip(refs, stored, strict=True):
                        ref[base + used] = value

            own = (q * lax.broadcast_in_dim(new_k, q.shape, [0])).sum(0)
            new = (split == 0) & (used >= first_slot)
            peak = jnp.where(new, own, MASKED)
            tile_row = plgpu.broadcasted_iota(jnp.int32, (tile, columns), 0, layout=WGMMA)
            total = jnp.where((tile_row == 0) & new, 1.0, 0.0)
            acc = jnp.where(new, lax.broadcast_in_dim(new_v, q.shape, [0]), 0.0)
            peak, total, acc = lax.fori_loop(
                0, tiles, lambda turn, state: attend(state, turn), (peak, total, acc)
            )
            total = total.sum(0)
            if splits == 1:
                inverse = 1.0 / jnp.maximum(total, 1e-30)
                acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [1])
            else:
                peaks[pair, split, :] = peak
                totals[pair, split, :] = total
            at = out_smem.transpose((1, 0))
            at[...] = plgpu.layout_cast(acc, _SINGLE)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out_smem.at[pl.ds(0, shared)],
                out.at[split, row, pl.ds(group * shared, shared)],
            )
            plgpu.wait_smem_to_gmem(0)

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    codes = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width))
    codes = codes if quantized else transforms
    f32, bf16 = jnp.float32, jnp.bfloat16
    scratch = [
        plgpu.SMEM((_TERMS * columns, width), bf16, transforms=transforms),
        plgpu.SMEM((_TERMS * columns, tile), bf16, transforms=transforms),
        plgpu.SMEM((columns, width), f32),
        plgpu.SMEM(((shared + 2) * width,), f32),
        plgpu.SMEM((2 * width,), f32),
        plgpu.Barrier(num_arrivals=-(-shared * width // _MOST) + 5),
        plgpu.SMEM((stages, tile, width), dtype, transforms=codes),
        plgpu.SMEM((stages, tile, width), dtype, transforms=codes),
        plgpu.Barrier(num_arrivals=4 if quantized else 2, num_barriers=stages),
    ]
    if quantized:
        scratch += [plgpu.SMEM((tile, width), bf16, transforms=transforms)] * 2
        scratch += [plgpu.SMEM((stages, tile), f32)] * 2
    body.__name__ = "ternax_attend"
    sums = jax.ShapeDtypeStruct((batch * groups, MAX_SPLITS, columns), f32)
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((splits, batch, heads, width), f32), sums, sums),
        scratch_types=scratch,
        grid=(splits, batch * groups),
        grid_names=("split", "pair"),
        compiler_params=LANE,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _stored(x, dtype):
    """(what is read back of f32 [E] from a cache of that dtype, what is stored: bits or codes
    and their scale)."""
    if dtype == jnp.bfloat16:
        x = x.astype(jnp.bfloat16)
        return x.astype(jnp.float32), x
    scale = jnp.maximum(jnp.max(jnp.abs(x)), 1e-8) / 127
    codes = jnp.round(x / scale)
    return codes * scale, codes.astype(jnp.int8), scale
