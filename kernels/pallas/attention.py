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

from .attention_settings import MAX_SPLITS, TERMS, columns_of
from .attention_splits import (
    LANE,
    MASKED,
    ROW,
    Sums,
    column_of,
    combine,
    share,
)

# Elements that TMA copies along one axis, at most.
_MOST = 256
_LOG2E = math.log2(math.e)

WGMMA = plgpu.Layout.WGMMA
# The same places in registers one by one: what is loaded or stored across need not be pairs.
_SINGLE = plgpu.Layout._WGMMA_ACC_32BIT


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
    """Rotates q and k, puts k and v into the cache in place, and attends.

    Arguments are those of `kernels.attention.step_attention`, with one token a row, where
    `attention_settings.why_not` has nothing against them.

    Args:
      config: {"splits": blocks that share the slots of one key head of one row, "tile": slots
        that a block takes at a time, 64 or 128, "stages": tiles in flight in each}.
      pdl: programmatic dependent launch: a kernel starts while the one before it ends.
      interpret: run on the CPU, by Pallas' interpreter of Mosaic GPU.

    Returns:
      (f32 [B, 1, H, E], k, v, k_scale, v_scale).
    """
    sums, *stores = attend(
        qkv,
        rope,
        k,
        v,
        k_scale,
        v_scale,
        start,
        length,
        layer,
        config,
        pdl=pdl,
        interpret=interpret,
    )
    out = sums.out
    if config["splits"] > 1:
        heads = qkv.shape[-1] // k.shape[-1] - 2 * k.shape[2]
        run = combine(k.shape, heads, config["splits"], config["tile"], pdl, interpret)
        out = run(start, jnp.reshape(length, 1), *sums)
    return out.reshape(k.shape[1], 1, -1, k.shape[-1]), *stores


def attend(
    qkv, rope, k, v, k_scale, v_scale, start, length, layer, config, *, pdl=False, interpret=False
):
    """The first launch of `step`: (`Sums`, k, v, k_scale, v_scale).

    With one split, `Sums.out` is the result. With more, whoever reads the result next may add them
    up by itself, as `combine` does.
    """
    heads = qkv.shape[-1] // k.shape[-1] - 2 * k.shape[2]
    batch, half = k.shape[1], k.shape[-1] // 2
    stores = [_rows(store) for store in (k, v)]
    scales = [] if k_scale is None else [store.reshape(-1) for store in (k_scale, v_scale)]
    refs = [jax.new_ref(store) for store in (*stores, *scales)]
    place = jnp.reshape(length, 1), jnp.reshape(layer, 1)
    tables = (table.reshape(batch, half) for table in rope)
    run = _attend(k, heads, pdl, interpret, **config)
    sums = run(qkv.reshape(batch, -1), *tables, start, *place, *refs)
    *stores, k_scale, v_scale = [*map(jax.freeze, refs), None, None][:4]
    if k.dtype == jnp.uint16:
        stores = [lax.bitcast_convert_type(store, k.dtype) for store in stores]
    if k_scale is not None:
        k_scale, v_scale = (scale.reshape(k.shape[:-1]) for scale in (k_scale, v_scale))
    return Sums(*sums), *(store.reshape(k.shape) for store in stores), k_scale, v_scale


def _rows(store):
    if store.dtype == jnp.uint16:
        store = lax.bitcast_convert_type(store, jnp.bfloat16)
    return store.reshape(-1, store.shape[-1])


def _terms(x):
    """bf16 [M, 3 R] of f32 [M, R]: terms that sum to x, each the largest that is not beyond it."""
    terms = []
    for _ in range(TERMS):
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16))
        term = lax.bitcast_convert_type(bits, jnp.float32)
        terms.append(term.astype(jnp.bfloat16))
        x = x - term
    return jnp.concatenate(terms, axis=1)


def _sum_terms(x):
    rows, columns = x.shape[0], x.shape[1] // TERMS
    first, *rest = (lax.slice(x, (0, i * columns), (rows, (i + 1) * columns)) for i in range(TERMS))
    return first + functools.reduce(jnp.add, rest)


def _attend(cache, heads, pdl, interpret, *, splits, tile, stages):
    """(qkv [B, (H + 2 G) E], cos, sin [B, E / 2], start [B], length, layer [1], k, v [rows, E],
    scales [rows]) -> `Sums`. cache: the whole k, for its shape and dtype."""
    _, batch, groups, slots, width = cache.shape
    shared = heads // groups
    columns = columns_of(shared)
    half = width // 2
    quantized = cache.dtype == jnp.int8
    dtype = jnp.int8 if quantized else jnp.bfloat16

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

            score = pl.run_scoped(scores, plgpu.ACC((tile, TERMS * columns), jnp.float32))
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

            part = pl.run_scoped(weighted, plgpu.ACC((width, TERMS * columns), jnp.float32))
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
        plgpu.SMEM((TERMS * columns, width), bf16, transforms=transforms),
        plgpu.SMEM((TERMS * columns, tile), bf16, transforms=transforms),
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
    softmax = jax.ShapeDtypeStruct((batch * groups, MAX_SPLITS, columns), f32)
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((splits, batch, heads, width), f32), softmax, softmax),
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
