"""The matrix kernel: many rows of int8 activations times trits, at the speed of tensor cores.

A block makes one piece of the output at a time, `rows` of x by a strip of `strip` tiles along N.
Along K it goes in units, a tile's 512 k. One warpgroup fetches by TMA into two rings of shared
memory: a unit's tiles of the strip, and x in slices of 128 k, as they lie at a tile's bit
positions. Two warpgroups multiply the same x by one half of the strip each:

    a unit's k        slice 0   slice 1   slice 2   slice 3
    x, shared memory  [rows, 128] each, free again as soon as it is multiplied
    codes, registers  w & 3     w >> 2    w >> 4    w >> 6      one load of w for all four

Codes are shifted down, four in a word, so that one accumulator sums all positions. While tensor
cores multiply half a tile, the codes of the next half are made. The blocks of a cluster take
neighbouring strips and the same rows: each reads a part of x, which arrives at all of them.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import tiles
from .matrix_pieces import size_of
from .operand import OPERAND, TILE, operand

_POSITIONS = 4
_CONSUMERS = 2
# Registers of a thread that fetches, and of one that multiplies, instead of an equal share.
_FETCH_REGISTERS, _MULTIPLY_REGISTERS = 24, 240


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
      x: int8 [M, K].
      data: uint8 [L, P, *tiles.data_shape(shape)].
      shape: (K, N).
      layer: int32 [].
      config: {"blocks": thread blocks, "rows": of x in a piece, a multiple of 16, "strip": tiles
        in it, "cluster": blocks that share x, 1 or 2, "units": of the strip in flight, "slices":
        of x in flight, 2 at least, "split": 1 or 0}; see matrix_pieces.py.
      interpret: run on the CPU, by Pallas' interpreter of Mosaic GPU. It has neither inline
        instructions nor atomics; each has a twin in jnp here.

    Returns:
      int32 [M, P, N].
    """
    planes, padded = data.shape[1], tiles.grid(shape)[0] * tiles.ROWS
    y = _pieces(x, None, data, shape, layer, config, interpret)
    y = y[: x.shape[0], : planes * padded].reshape(x.shape[0], planes, padded)
    return y[..., : shape[1]]


def scaled(
    x: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    data: jax.Array,
    shape: tuple[int, int],
    layer: jax.Array,
    config: Mapping[str, int],
    interpret: bool = False,
) -> jax.Array:
    """The product of a single plane times (row scale * column scale). For config["split"] 0.

    scales: f32 [M] and [N]; all else as for `accumulate`. Returns f32 [M, N].
    """
    y = _pieces(x, scales, data, shape, layer, config, interpret)
    return y[: x.shape[0], : shape[1]]


def _pieces(x, scales, data, shape, layer, config, interpret):
    """All pieces of the output side by side: int32, or f32 with scales."""
    layers, planes = data.shape[:2]
    along_n, along_k = tiles.grid(shape)
    along_m = -(-x.shape[0] // config["rows"])
    size = size_of(planes * along_n, along_m, config)
    offsets = jnp.pad(-x.astype(jnp.int32).sum(1), (0, size[0] - x.shape[0]))
    arguments = (
        jnp.reshape(layer, 1),
        data.reshape(layers * planes * along_n, along_k, *TILE),
        jnp.pad(x, ((0, size[0] - x.shape[0]), (0, -x.shape[1] % tiles.TILE_K))),
    )
    kernel = _kernel(planes * along_n, along_k, along_m, scales is not None, interpret, config)
    if config["split"]:
        out = jax.new_ref(jnp.broadcast_to(offsets[:, None], size))
        kernel(*arguments, out)
        return jax.freeze(out)
    factors = [jnp.pad(s, (0, n - s.size)) for s, n in zip(scales or (), size, strict=False)]
    return kernel(*arguments, offsets, *factors)


def _kernel(along_n, along_k, along_m, scale, interpret, config):
    """(layer [1], tiles [L * along_n, along_k, 64, 256], x [M, K], ...) -> int32 or f32 [M, N].

    ...: the output to add to, if split; else offsets [M] and, with `scale`, factors [M], [N].
    """
    rows, strip, cluster, split = (config[key] for key in ("rows", "strip", "cluster", "split"))
    units, slices = config["units"], config["slices"]
    if slices < 2:
        raise ValueError(f"slices must be at least 2, as one is given back late, found {slices}")
    size = size_of(along_n, along_m, config)
    pieces = along_m * (size[1] // (cluster * strip * tiles.ROWS))
    clusters = max(1, min(config["blocks"] // cluster, pieces * along_k if split else pieces))

    def share():
        """Units begin .. end of a cluster, along K of its pieces first, first + step, ..."""
        index = lax.axis_index("cluster")
        if split:
            start = index * (pieces * along_k) // clusters
            stop = (index + 1) * (pieces * along_k) // clusters
            begin = lax.rem(start, along_k)
            return begin, begin + stop - start, lax.div(start, along_k), 1
        return 0, lax.div(pieces - index + clusters - 1, clusters) * along_k, index, clusters

    def strip_of(piece):
        """This block's strip of its cluster's piece."""
        return lax.div(piece, along_m) * cluster + lax.axis_index("member")

    def fetch(layer, data, x, data_smem, x_smem, full, free):
        """Puts a block's weights and activations into shared memory, each in a free slot."""
        begin, end, first, step = share()

        def slot_for(turn, depth, free):
            """Where a ring's turn goes, once it is free."""

            @pl.when(turn >= depth)
            def _():
                plgpu.barrier_wait(free.at[lax.rem(turn, depth)])

            return lax.rem(turn, depth)

        def until_free(count, depth, free):
            """A block of a cluster must not end before the others are done with its memory."""

            @pl.loop(jnp.maximum(count - depth, 0), count)
            def _(turn):
                plgpu.barrier_wait(free.at[lax.rem(turn, depth)])

        @pl.loop(begin, end)
        def _(unit):
            piece, k = first + lax.div(unit, along_k) * step, lax.rem(unit, along_k)
            slot = slot_for(unit - begin, units, free[0])
            for i in range(strip):
                # Beyond the last tile the last one again: its products are cut off.
                n = layer * along_n + jnp.minimum(strip_of(piece) * strip + i, along_n - 1)
                plgpu.copy_gmem_to_smem(data.at[n, k], data_smem.at[slot, i], full[0].at[slot])
            of_piece = pl.ds(lax.rem(piece, along_m) * rows, rows)
            for p in range(_POSITIONS):
                slot = slot_for((unit - begin) * _POSITIONS + p, slices, free[1])
                plgpu.copy_gmem_to_smem(
                    x.at[of_piece, pl.ds((k * _POSITIONS + p) * tiles.SLICE, tiles.SLICE)],
                    x_smem.at[slot],
                    full[1].at[slot],
                    # Each block of the cluster reads a part, for all of them.
                    collective_axes="member",
                )

        until_free(end - begin, units, free[0])
        until_free((end - begin) * _POSITIONS, slices, free[1])

    def multiply(sums, turn, group, data_smem, x_smem, full, free, operand_smem):
        """Adds the product of one unit, a sum for each half tile of the group."""
        slot = lax.rem(turn, units)
        plgpu.barrier_wait(full[0].at[slot])
        halves = [divmod(group * strip + i, 2) for i in range(strip)]
        halves = [operand(data_smem.at[slot, tile], half, interpret) for tile, half in halves]
        plgpu.commit_smem()  # what was read here is now written by TMA
        plgpu.barrier_arrive(free[0].at[slot])
        for p in range(_POSITIONS):
            slot_x = lax.rem(turn * _POSITIONS + p, slices)
            for i, half in enumerate(halves):
                codes = _codes(half, p, interpret)
                if interpret:  # its wgmma reads shared memory alone
                    operand_smem[...] = codes
                    codes = operand_smem
                if i == 0:
                    plgpu.barrier_wait(full[1].at[slot_x])
                plgpu.wgmma(sums[i], codes, x_smem.at[slot_x].transpose((1, 0)))
                plgpu.wgmma_wait(1)  # the one before this is done
                if i == 0 and p:
                    before = lax.rem(turn * _POSITIONS + p - 1, slices)
                    plgpu.barrier_arrive(free[1].at[before])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free[1].at[slot_x])

    def store(sums, piece, group, factors, out):
        """Writes a piece of the output, or adds to it what this block has of it."""
        row = lax.rem(piece, along_m) * rows
        for i, total in enumerate(sums):
            column = ((strip_of(piece) * _CONSUMERS + group) * strip + i) * tiles.HALF
            total = total[...]
            if factors:
                total += _vector(factors[0], row, rows, 0, interpret)
            if scale:
                x_scale = _vector(factors[1], row, rows, 0, interpret)
                w_scale = _vector(factors[2], column, rows, 1, interpret)
                total = total.astype(jnp.float32) * (x_scale * w_scale)
            _write(out.at[pl.ds(row, rows), pl.ds(column, tiles.HALF)], total, split, interpret)

    def body(layer, data, x, *refs):
        factors, refs = refs[:factor_count], refs[factor_count:]
        out, data_smem, x_smem, full, free, *operand_smem = refs
        group = lax.axis_index("group")

        @pl.when(group == _CONSUMERS)
        def _():
            plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
            fetch(layer[0], data, x, data_smem, x_smem, full, free)

        @pl.when(group < _CONSUMERS)
        def _():
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
            own_smem = operand_smem[0].at[group] if interpret else None
            begin, end, first, step = share()

            @pl.loop(0, lax.div(end + along_k - 1, along_k))
            def _(i):
                low = jnp.maximum(begin, i * along_k)
                high = jnp.minimum(end, (i + 1) * along_k)

                def piece(*sums):
                    @pl.loop(low, high)
                    def _(unit):
                        turn = unit - begin
                        multiply(sums, turn, group, data_smem, x_smem, full, free, own_smem)

                    store(sums, first + i * step, group, factors, out)

                pl.run_scoped(piece, *[plgpu.ACC((tiles.HALF, rows), jnp.int32)] * strip)

    factor_count = 0 if split else 1 + 2 * scale
    transforms = (plgpu.TilingTransform((8, tiles.SLICE)), plgpu.SwizzleTransform(tiles.SLICE))
    scratch = [
        plgpu.SMEM((units, strip, *TILE), jnp.uint8),
        plgpu.SMEM((slices, rows, tiles.SLICE), jnp.int8, transforms=transforms),
        (plgpu.Barrier(num_arrivals=strip, num_barriers=units), plgpu.Barrier(num_barriers=slices)),
        (
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=units),
            plgpu.ClusterBarrier(
                collective_axes=("member",), num_arrivals=_CONSUMERS, num_barriers=slices
            ),
        ),
    ]
    if interpret:
        scratch.append(plgpu.SMEM((_CONSUMERS, *OPERAND), jnp.int8))
    body.__name__ = "ternax_matrix"
    return plgpu.kernel(
        body,
        out_type=() if split else jax.ShapeDtypeStruct(size, jnp.float32 if scale else jnp.int32),
        scratch_types=scratch,
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("member",),
        num_threads=_CONSUMERS + 1,
        thread_name="group",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def _codes(bytes_, position, interpret):
    """int8 [64, 128] for wgmma: the codes, 0 to 3, at one bit position of half a tile.

    In registers a word of four at a time: a shift and a mask, and at position 3, where the upper
    bit is stored inverted, one bit more.
    """
    inverted = 2 * (position == _POSITIONS - 1)
    if interpret:
        return ((bytes_ >> (2 * position)) & 3) ^ inverted
    from jax.experimental.mosaic.gpu import fragmented_array
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_8BIT,),
        return_type=plgpu.ShapeDtypeStruct(OPERAND, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def codes(_, array):
        word = ir.IntegerType.get_signless(32)
        one = ir.VectorType.get((1,), word)

        def each(byte):
            words = ir.IntegerAttr.get(word, byte * 0x01010101)
            return arith.constant(one, ir.DenseElementsAttr.get_splat(one, words))

        registers = np.empty_like(array.registers)
        for at, register in np.ndenumerate(array.registers):
            words = vector.bitcast(one, register)
            if position:
                shift = ir.IntegerAttr.get(word, 2 * position)
                shift = arith.constant(one, ir.DenseElementsAttr.get_splat(one, shift))
                words = arith.shrui(words, shift)
            words = arith.andi(words, each(3))
            if inverted:
                words = arith.xori(words, each(inverted))
            registers[at] = vector.bitcast(register.type, words)
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=array.layout, _is_signed=True
        )

    return codes(bytes_)


def _vector(ref, start, rows, axis, interpret):
    """Values from `start` on of a vector in device memory, as [64, rows] constant along `axis`."""
    shape = (tiles.HALF, rows)
    at = ref.at[pl.ds(start, shape[1 - axis])]
    if interpret:
        return lax.broadcast_in_dim(at[...], shape, (1 - axis,))
    values = plgpu.load(at, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)
    return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (1 - axis,)), plgpu.Layout.WGMMA)


def _write(ref, values, add, interpret):
    """[64, rows] into or, atomically, onto device memory [rows, 64], 32 bytes in a row at a time.

    As registers hold them: what a warp writes at once are 8 columns of 4 rows.
    """
    if interpret:  # its blocks run one after the other
        ref[...] = ref[...] + values.T if add else values.T
        return
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(_, ref, array):
        word, void = ir.IntegerType.get_signless(32), ir.Type.parse("!llvm.void")
        (stride, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
        # Where a thread's first register goes. Opaque, or the addresses of all would be made ahead
        # of the loop over K and held in registers meanwhile.
        column, row = next(iter(array.layout.thread_idxs(array.shape)))
        own = arith.addi(arith.muli(row, utils.c(stride, row.type)), column)
        own = llvm.inline_asm(
            word, [arith.index_cast(word, own)], "mov.b32 $0, $1;", "=r,r", has_side_effects=True
        )
        base = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(ref))
        base = utils.getelementptr(base, [own], word)
        steps = array.layout.tiling.tile_strides((array.shape[1], 1))
        for at, pair in np.ndenumerate(array.registers):
            column, row = divmod(
                sum(i * step for i, step in zip(at, steps, strict=True)), array.shape[1]
            )
            for i in (0, 1):
                value = vector.extract(
                    pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
                )
                to = utils.getelementptr(base, [(row + i) * stride + column], word)
                if add:
                    order = "red.relaxed.gpu.global.add.s32 [$0], $1;"
                    llvm.inline_asm(void, [to, value], order, "l,r", has_side_effects=True)
                else:
                    llvm.store(value, to)

    write(ref, values)
