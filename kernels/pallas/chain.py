"""The chain kernel: projections that follow one another, and all between them, in one launch.

From the output of attention to the next layer's q, k and v there is no step that needs
another kernel: o, gate and up, down, qkv, and between them residual sums, gates, norms and the
quantization of activations. One launch does them all, one block a processor:

    fetching      weights of o | weights of gate_up ......... | weights of down ... | of qkv
    multiplying        [enter] o  [enter] gate_up ........ [enter] down ... [enter] qkv [leave]

A block's fetching warpgroup streams its share of every matrix, without a stop at the seams: while
the others `enter` the next projection, the shared memory fills with its first tiles.

To enter is, for each multiplying warpgroup, to take a slice of the row: read what the last
product summed, scale it, add or gate, leave its share of the sum of squares and of the largest
magnitude; behind a barrier of the whole grid, to read all shares, quantize its slice and leave
it as int8; behind another, the tiles of activations are fetched. Products end as
`decode.py` has them, in int32 atomic additions; the third barrier waits for those. All sums are
of integers or in a fixed order, so a step gives the same bits every time.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import decode, tiles

MAX_ROWS = decode.MAX_ROWS
# A warp takes one row and its lanes 32 columns: sums along a row need no other warp.
_WARPS, _LANES = 4, 32
# ternax.quant: the least magnitude that a scale is made of.
_EPS = 1e-5
# Adding and subtracting it rounds |x| < 2^22 to an integer, half to even.
_ROUND = 1.5 * 2.0**23


class Link(NamedTuple):
    """One projection of a chain.

    Attributes:
      shape: (K, N).
      enter: what it reads. "input": the chain's input; "stream": the residual stream; "residual":
        the stream, to which the last product is added first; or the name of a gate, of the last
        product's two halves.
      normed: whether RMSNorm stands in front.
      eps: of the norm.
    """

    shape: tuple[int, int]
    enter: str
    normed: bool
    eps: float


class Weights(NamedTuple):
    """What a link reads from memory.

    Attributes:
      data: uint8 [L, 1, *tiles.data_shape(shape)].
      scale: f32 [L, N].
      norm: f32 [L', K], or None.
      layer, norm_layer: int32 [], which of the stacks.
    """

    data: jax.Array
    scale: jax.Array
    norm: jax.Array | None
    layer: jax.Array
    norm_layer: jax.Array


GATES = {"silu": lambda x: x * jax.nn.sigmoid(x), "relu2": lambda x: jnp.square(jnp.maximum(x, 0))}


def padded_rows(rows: int) -> int:
    """Rows of the arrays that chains pass on: whole turns of a warpgroup's warps."""
    return -(-rows // _WARPS) * _WARPS


def why_not(links: Sequence[Link]) -> str | None:
    """None where a chain can be made of the links, else one line."""
    for link in links:
        for size in link.shape:
            if size % _LANES:
                return f"a chain takes sizes that are multiples of {_LANES}, found {size}"
    return None


def run(
    links: Sequence[Link],
    weights: Sequence[Weights],
    stream: jax.Array,
    given: jax.Array | None,
    rows: int,
    config: Mapping[str, int],
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs a chain.

    Args:
      links: their shapes fit: a gate halves the N before it, sums keep it.
      weights: of each link.
      stream: f32 [padded_rows, D], the residual stream.
      given: f32 [padded_rows, K], the first link's "input"; None where it reads the stream.
      rows: rows that are real, MAX_ROWS at most; the others compute nothing of meaning.
      config: as for `decode.accumulate`.
      interpret: as there; then the grid has one block.

    Returns:
      (f32 [padded_rows, N], the last product, which is not added to the stream, or None where N
      is the stream's D, and it is; the stream, f32 [padded_rows, D]).
    """
    padded, columns = stream.shape[0], stream.shape[1]
    last = links[-1].shape[1]
    leaves = None if last == columns else jax.ShapeDtypeStruct((padded, last), jnp.float32)
    kernel = _kernel(tuple(links), rows, padded, columns, leaves, interpret, **config)
    at = jnp.stack([index for w in weights for index in (w.layer, w.norm_layer)])
    tiled = []
    for link, w in zip(links, weights, strict=True):
        tiled.append(w.data.reshape(-1, *decode.TILE))
        tiled.append(w.scale)
        if link.normed:
            tiled.append(w.norm)
    arguments = (at, stream, *([] if given is None else [given]), *tiled)
    found = kernel(*arguments)
    return (None, found[0]) if leaves is None else (found[0], found[1])


class _Chunks(NamedTuple):
    """How a row of `size` columns is shared: `width` columns to each of the first `count`."""

    width: int
    count: int


def chunks(size: int, workers: int) -> _Chunks:
    """The narrowest equal parts of whole turns of a warp's lanes, as many as there are workers."""
    turns = size // _LANES
    for each in range(1, turns + 1):
        if turns % each == 0 and turns // each <= workers:
            return _Chunks(each * _LANES, turns // each)
    raise AssertionError("one chunk always fits")


def _kernel(links, rows, padded, columns, leaves, interpret, *, blocks, stages, consumers):
    if stages % consumers:
        raise ValueError(f"stages must be a multiple of consumers, found {stages}, {consumers}")
    if interpret and blocks != 1:
        raise ValueError(f"the interpreter has no barrier of a grid: expected 1 block, {blocks}")
    workers = blocks * consumers
    columns_of_wgmma = -(-rows // 8) * 8
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((_WARPS, _LANES), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )
    of_columns = layout.reduce(0)
    grids = [tiles.grid(link.shape) for link in links]
    units = [along_n * along_k for along_n, along_k in grids]
    # Where both groups of a block would add at once, the interpreter has a sum for each.
    copies = consumers if interpret else 1

    def read(ref, how=layout):
        return ref[...] if interpret else plgpu.load(ref, layout=how, optimized=False)

    def over_columns(per_row, width):
        return lax.broadcast_in_dim(per_row, (padded, width), (0,))

    def over_rows(per_column):
        return lax.broadcast_in_dim(per_column, (padded, per_column.shape[0]), (1,))

    def column_index(width):
        if interpret:
            return lax.broadcasted_iota(jnp.int32, (padded, width), 1)
        return plgpu.broadcasted_iota(jnp.int32, (padded, width), 1, layout=layout)

    def body(*refs):
        refs = iter(refs)
        at, stream_in = next(refs), next(refs)
        given = next(refs) if links[0].enter == "input" else None
        data, scale, norm = [], [], []
        for link in links:
            data.append(next(refs))
            scale.append(next(refs))
            norm.append(next(refs) if link.normed else None)
        out = None if leaves is None else next(refs)
        stream_out = next(refs)
        sums, codes, squares, peaks, offsets = ([next(refs) for _ in links] for _ in range(5))
        tile_smem, x_smem, full, free = (next(refs) for _ in range(4))
        own = next(refs) if interpret else None
        entered = next(refs) if interpret else pl.get_global(plgpu.SemaphoreType.REGULAR)
        block, group = lax.axis_index("block"), lax.axis_index("group")
        worker = block * consumers + group

        def arrive(turn):
            """This group has come to the grid's barrier `turn`, and what it wrote is there."""
            if interpret:
                plgpu.barrier_arrive(entered.at[turn])
            else:
                _fence_copies()
                plgpu.semaphore_signal(entered, 1, memory_scope="gpu")

        def wait(turn):
            """Until all have come to barrier `turn`."""
            if interpret:
                plgpu.barrier_wait(entered.at[turn])
            else:
                target = (turn + 1) * workers
                plgpu.semaphore_wait(entered, target, decrement=False, memory_scope="gpu")
                _fence_copies()

        def share(i):
            return block * units[i] // blocks, (block + 1) * units[i] // blocks

        def fetch():
            base = jnp.int32(0)
            for i in range(len(links)):
                start, stop = share(i)
                ahead = jnp.minimum(stop - start, stages)

                def weights(j, i=i, start=start, base=base):
                    slot = lax.rem(base + j, stages)

                    @pl.when(base + j >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    tile = at[2 * i] * units[i] + start + j
                    plgpu.copy_gmem_to_smem(data[i].at[tile], tile_smem.at[slot], full.at[slot])

                def activations(j, i=i, start=start, base=base):
                    slot = lax.rem(base + j, stages)
                    k = lax.rem(start + j, grids[i][1]) * tiles.TILE_K
                    x = codes[i].at[:, pl.ds(k, tiles.TILE_K)]
                    plgpu.copy_gmem_to_smem(x, x_smem.at[slot], full.at[slot])

                pl.loop(0, ahead)(weights)
                wait(3 * i + 1)
                pl.loop(0, ahead)(activations)

                @pl.loop(ahead, stop - start)
                def _(j, weights=weights, activations=activations):
                    weights(j)
                    activations(j)

                base = base + stop - start

            @pl.loop(jnp.maximum(base - stages, 0), base)
            def _(unit):
                plgpu.barrier_wait(free.at[lax.rem(unit, stages)])

        def product(i, first, width, offset, x_scale):
            """f32 [padded, width]: what link i made of columns `first` on."""
            cols = pl.ds(first, width)
            total = sum(read(sums[i].at[copy, :, cols]) for copy in range(copies))
            total = (total + over_columns(offset, width)).astype(jnp.float32)
            w_scale = over_rows(read(scale[i].at[at[2 * i], cols], of_columns))
            return total * (over_columns(x_scale, width) * w_scale)

        def shares(ref, count, reduce):
            """[padded]: the workers' shares of a row's statistic, together."""
            width = -(-count // _LANES) * _LANES
            found = read(ref.at[:, pl.ds(0, width)])
            return reduce(jnp.where(column_index(width) < count, found, 0), axis=1)

        def clear():
            """Sums begin at zero, and so does what activations are padded with."""
            for i, link in enumerate(links):
                part = chunks(sums[i].shape[2], workers)

                @pl.when(worker < part.count)
                def _(i=i, part=part):
                    cols = pl.ds(worker * part.width, part.width)
                    for copy in range(copies):
                        sums[i][copy, :, cols] = _zeros((padded, part.width), jnp.int32)

                if pad := -link.shape[0] % tiles.TILE_K:

                    @pl.when(worker == i % workers)
                    def _(i=i, pad=pad, k=link.shape[0]):
                        codes[i][pl.ds(0, padded), pl.ds(k, pad)] = _zeros((padded, pad), jnp.int8)

        def _zeros(shape, dtype):
            if interpret:
                return jnp.zeros(shape, dtype)
            return plgpu.layout_cast(jnp.zeros(shape, dtype), layout)

        def calculate():
            clear()
            own_part = chunks(columns, workers)
            own_first = jnp.minimum(worker, own_part.count - 1) * own_part.width
            stream = read(stream_in.at[:, pl.ds(own_first, own_part.width)])
            base = jnp.int32(0)
            offset = x_scale = None
            for i, link in enumerate(links):
                k_size = link.shape[0]
                part = chunks(k_size, workers)
                first = jnp.minimum(worker, part.count - 1) * part.width
                if link.enter == "input":
                    value = read(given.at[:, pl.ds(first, part.width)])
                elif link.enter == "stream":
                    value = stream
                elif link.enter == "residual":
                    stream = stream + product(i - 1, first, part.width, offset, x_scale)
                    value = stream
                else:
                    gate = product(i - 1, first, part.width, offset, x_scale)
                    up = product(i - 1, k_size + first, part.width, offset, x_scale)
                    value = GATES[link.enter](gate) * up
                weighed = value
                if link.normed:
                    cols = pl.ds(first, part.width)
                    weighed = value * over_rows(read(norm[i].at[at[2 * i + 1], cols], of_columns))

                @pl.when(worker < part.count)
                def _(i=i, link=link, value=value, weighed=weighed):
                    peaks[i][:, worker] = jnp.max(jnp.maximum(weighed, -weighed), axis=1)
                    if link.normed:
                        squares[i][:, worker] = jnp.sum(value * value, axis=1)

                arrive(3 * i)
                wait(3 * i)
                peak = shares(peaks[i], part.count, jnp.max)
                if link.normed:
                    mean = shares(squares[i], part.count, jnp.sum) / k_size
                    root = lax.rsqrt(mean + link.eps)
                    peak = peak * root
                    weighed = weighed * over_columns(root, part.width)
                inverse = (1.0 / jnp.maximum(peak, _EPS)) * 127.0
                x_scale = 1.0 / inverse
                digits = weighed * over_columns(inverse, part.width)
                rounded = jnp.round(digits) if interpret else (digits + _ROUND) - _ROUND
                digits = rounded.astype(jnp.int32)
                position = column_index(part.width) + first
                last = (position // tiles.SLICE) % 4 == 3
                lacks = jnp.sum(jnp.where(last, digits, -digits), axis=1)

                @pl.when(worker < part.count)
                def _(i=i, part=part, first=first, digits=digits, lacks=lacks):
                    cols = pl.ds(first, part.width)
                    codes[i][pl.ds(0, padded), cols] = digits.astype(jnp.int8)
                    offsets[i][:, worker] = lacks

                arrive(3 * i + 1)
                multiply(i, base)
                start, stop = share(i)
                base = base + stop - start
                arrive(3 * i + 2)
                wait(3 * i + 2)
                offset = shares(offsets[i], part.count, jnp.sum)

            end = len(links) - 1
            if leaves is None:
                stream = stream + product(end, own_first, own_part.width, offset, x_scale)
            else:
                part = chunks(links[end].shape[1], workers)
                first = jnp.minimum(worker, part.count - 1) * part.width
                found = product(end, first, part.width, offset, x_scale)

                @pl.when(worker < part.count)
                def _():
                    out[:, pl.ds(first, part.width)] = found

            @pl.when(worker < own_part.count)
            def _():
                stream_out[:, pl.ds(own_first, own_part.width)] = stream

        def multiply(i, base):
            start, stop = share(i)
            along_k = grids[i][1]
            own_smem = own.at[group] if interpret else None

            def turn(unit):
                """How many of this group's turns are before the unit, of all links."""
                return lax.div(base + unit - start - group + consumers - 1, consumers)

            @pl.loop(lax.div(start, along_k), lax.div(stop - 1, along_k) + 1)
            def _(n):
                first = jnp.maximum(start, n * along_k)
                last = jnp.minimum(stop, (n + 1) * along_k)

                def row_of_tiles(*accumulators):
                    accumulators = accumulators[:4], accumulators[4:]

                    @pl.loop(turn(first), turn(last))
                    def _(j):
                        slot = lax.rem(j * consumers + group, stages)
                        plgpu.barrier_wait(full.at[slot])
                        decode.multiply(accumulators, slot, tile_smem, x_smem, own_smem, interpret)
                        plgpu.barrier_arrive(free.at[slot])

                    for half in (0, 1):
                        total = sum(acc[...] >> (2 * p) for p, acc in enumerate(accumulators[half]))
                        cols = pl.ds(n * tiles.ROWS + half * tiles.HALF, tiles.HALF)
                        if interpret:
                            sums[i][group, pl.ds(0, rows), cols] += total.T[:rows]
                        else:
                            _add(sums[i].at[0, :, cols], total, rows)

                accumulator = plgpu.ACC((tiles.HALF, columns_of_wgmma), jnp.int32)
                pl.run_scoped(row_of_tiles, *(accumulator,) * 8)

        @pl.when(group == consumers)
        def _():
            plgpu.set_max_registers(decode.FETCH_REGISTERS, action="decrease")
            fetch()

        @pl.when(group < consumers)
        def _():
            plgpu.set_max_registers(decode.MULTIPLY_REGISTERS, action="increase")
            calculate()

    shape = jax.ShapeDtypeStruct
    wide = -(-min(workers, 1024) // _LANES) * _LANES
    statistic = [shape((padded, wide), jnp.float32) for _ in links]
    outputs = [
        *([] if leaves is None else [leaves]),
        shape((padded, columns), jnp.float32),
        *(shape((copies, padded, n * tiles.ROWS), jnp.int32) for n, _ in grids),
        *(shape((columns_of_wgmma, k * tiles.TILE_K), jnp.int8) for _, k in grids),
        *statistic,
        *statistic,
        *(shape((padded, wide), jnp.int32) for _ in links),
    ]
    scratch = decode.ring(stages, columns_of_wgmma)
    if interpret:
        scratch.append(plgpu.SMEM((consumers, *decode.OPERAND), jnp.int8))
        scratch.append(plgpu.Barrier(num_arrivals=consumers, num_barriers=3 * len(links)))
    body.__name__ = "ternax_chain"
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="group",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )


def _fence_copies():
    """Orders what threads wrote with copies that TMA makes of it; each thread for itself."""

    @plgpu.inline_mgpu()
    def fence(_):
        from jax.experimental.mosaic.gpu import utils

        utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    fence()


def _add(out, total, rows):
    """Atomic additions to out [padded, 64] of the real rows of total [64, columns]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def add(_, out, total):
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        index = ir.IndexType.get()
        registers = total.registers.flat
        for at, register in zip(total.layout.thread_idxs(total.shape), registers, strict=True):
            n, row = at
            for lane in range(ir.VectorType(register.type).shape[0]):
                value = vector.extract(register, [], ir.DenseI64ArrayAttr.get([lane]))
                r = arith.addi(row, utils.c(lane, index))
                real = arith.cmpi(arith.CmpIPredicate.ult, r, utils.c(rows, index))
                pointer = utils.memref_ptr(utils.memref_slice(out, (r, n)))
                utils.inline_ptx(
                    "red.relaxed.gpu.global.add.s32 [$0], $1;",
                    pointer,
                    value,
                    predicate=real,
                    has_side_effects=True,
                )

    add(out, total)
