"""The chain kernel: projections that follow one another, and all between them, in one launch.

From the output of attention to the next layer's q, k and v there is no step that needs
another kernel: o, gate and up, down, qkv, and between them residual sums, gates, norms and the
quantization of activations. One launch does them all, one block a processor:

    fetching      weights of o | weights of gate_up ......... | weights of down ... | of qkv
    multiplying        [enter] o  [enter] gate_up ........ [enter] down ... [enter] qkv [leave]

A block's fetching warpgroup streams its share of every matrix, without a stop at the seams: while
the others `enter` the next projection, the shared memory fills with its first tiles.

To enter is, for each multiplying warpgroup, to take a slice of the rows: read what the last
product summed, scale it, add or gate, and leave the values with their share of the sum of
squares and of the largest magnitude; and behind a barrier of the whole grid to read all shares,
and the values that the block's own tiles meet, which it quantizes into its shared memory. Blocks
are parted along K, so that those are few and stay there for the whole product. Products end as
`decode.py` has them, in int32 atomic additions, for which a second barrier waits. All sums are
of integers or in a fixed order, so a step gives the same bits every time.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import decode, operand, skinny, tiles

MAX_ROWS = decode.MAX_ROWS
# A warp takes one row and its lanes 32 columns: sums along a row need no other warp.
_WARPS, _LANES = 4, 32
# A tile's k at its four bit positions.
_SLICES = (tiles.TILE_K // tiles.SLICE, tiles.SLICE)
# ternax.quant: the least magnitude that a scale is made of.
_EPS = 1e-5
# Of a block on Hopper, less what barriers take.
_SHARED_BYTES = 232448 - 1024
MIN_STAGES = 4
# Fetching so many bytes of weights takes as long as the end of a row of tiles: 100 cycles, and
# atomic additions of 128 sums a row of activations, of which an H200 does 300 a ns.
_END_BYTES, _ADD_BYTES = 1500, 1700
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
    """Rows of the arrays that chains pass on: one for each warp, or as wgmma has columns."""
    return _WARPS if rows == 1 else _wgmma_columns(rows)


def _wgmma_columns(rows: int) -> int:
    return -(-rows // 8) * 8


def why_not(links: Sequence[Link], rows: int, blocks: int) -> str | None:
    """None where a chain of the links can be made, else one line."""
    if rows > MAX_ROWS:
        return f"a chain takes {MAX_ROWS} rows, found {rows}"
    for link in links:
        for size in link.shape:
            if size % _LANES:
                return f"a chain takes sizes that are multiples of {_LANES}, found {size}"
    if _stages(links, rows, blocks) < MIN_STAGES:
        k_size = max(link.shape[0] for link in links)
        return f"{rows} rows of K = {k_size} do not fit beside the weights in shared memory"
    return None


def heuristic(blocks: int) -> dict[str, int]:
    """Settings on a GPU of `blocks` processors: all the stages that shared memory has room for,
    and half of L2 (132 blocks: 26 MB), since what memory sends while a projection is entered
    need not be waited for afterwards."""
    return {"blocks": blocks, "stages": 16, "ahead": 12, "consumers": 2}


def _stages(links: Sequence[Link], rows: int, blocks: int) -> int:
    """Tiles that fit in shared memory beside a block's activations."""
    tile_rows = _wgmma_columns(rows)
    held = max(tiles.grid(link.shape)[1] // parts(link.shape, rows, blocks) for link in links)
    return (_SHARED_BYTES - held * tile_rows * tiles.TILE_K) // tiles.TILE_BYTES


def parts(shape: tuple[int, int], rows: int, blocks: int) -> int:
    """Into how many parts along K the blocks are divided, equal ones of both.

    More parts mean fewer activations to hold and to read, and shorter rows of tiles, each of
    which ends in additions to memory.
    """
    along_n, along_k = tiles.grid(shape)
    share = along_n * along_k / blocks
    room = _SHARED_BYTES - MIN_STAGES * tiles.TILE_BYTES

    def cost(count):
        held = along_k // count
        read = held * _wgmma_columns(rows) * tiles.TILE_K
        return read > room, read + (share / held + 1) * (_END_BYTES + _ADD_BYTES * rows)

    return min((p for p in range(1, along_k + 1) if not (along_k % p or blocks % p)), key=cost)


def run(
    links: Sequence[Link],
    weights: Sequence[Weights],
    stream: jax.Array,
    given: jax.Array | None,
    rows: int,
    config: Mapping[str, int],
    interpret: bool = False,
) -> tuple[jax.Array | None, jax.Array]:
    """Runs a chain.

    Args:
      links: their shapes fit: a gate halves the N before it, sums keep it.
      weights: of each link.
      stream: f32 [padded_rows, D], the residual stream.
      given: f32 [rows or padded_rows, K], the first link's "input"; None: it reads the stream.
      rows: rows that are real, MAX_ROWS at most; the others compute nothing of meaning.
      config: as for `decode.accumulate`; stages as far as shared memory has room, and behind
        them "ahead", tiles of each block on their way into L2.
      interpret: as there; then the grid has one block.

    Returns:
      (f32 [padded_rows, N], the last product, which is not added to the stream, or None where N
      is the stream's D, and it is; the stream, f32 [padded_rows, D]).
    """
    if given is not None and 1 < given.shape[0] < padded_rows(rows):
        given = jnp.pad(given, ((0, padded_rows(rows) - given.shape[0]), (0, 0)))
    settings = tuple(sorted(config.items()))
    return _run(tuple(links), tuple(weights), stream, given, rows, settings, interpret)


# A function of its own, so that a kernel that a program launches twice is built once.
@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _run(links, weights, stream, given, rows, settings, interpret):
    columns, last = stream.shape[1], links[-1].shape[1]
    leaves = None if last == columns else last
    stacked = tuple(w.data.shape[0] for w in weights)
    kernel = _kernel(links, stacked, rows, columns, leaves, interpret, **dict(settings))
    at = jnp.stack([index for w in weights for index in (w.layer, w.norm_layer)])
    read = []
    for link, w in zip(links, weights, strict=True):
        read += [w.data.reshape(-1, *operand.TILE), w.scale, *([w.norm] if link.normed else [])]
    found = kernel(at, stream, *([] if given is None else [given]), *read)
    return (None, found[0]) if leaves is None else (found[0], found[1])


class _Chunks(NamedTuple):
    """How a row of columns is shared: `width` to each of the first `count` workers."""

    width: int
    count: int


def chunks(size: int, workers: int) -> _Chunks:
    """The narrowest equal parts of whole turns of a warp's lanes, as many as there are workers."""
    turns = size // _LANES
    for each in range(1, turns + 1):
        if turns % each == 0 and turns // each <= workers:
            return _Chunks(each * _LANES, turns // each)
    raise AssertionError("one chunk always fits")


def _layout(lanes: int, each: int):
    """[rows, columns] of a warpgroup: a warp a row, a lane `each` columns side by side."""
    tiling = plgpu.Tiling(((_WARPS, lanes * each), (each,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _kernel(links, stacked, rows, columns, leaves, interpret, *, blocks, stages, ahead, consumers):
    if interpret and blocks != 1:
        raise ValueError(f"the interpreter has no barrier of a grid: expected 1 block, {blocks}")
    pairs = decode.teams(consumers)
    stages = min(stages, _stages(links, rows, blocks)) // pairs * pairs
    workers, padded = blocks * consumers, padded_rows(rows)
    tile_rows = _wgmma_columns(rows)
    single, fours = _layout(_LANES, 1), _layout(_LANES, 4)
    grids = [tiles.grid(link.shape) for link in links]
    counts = [parts(link.shape, rows, blocks) for link in links]
    held = [along_k // count for (_, along_k), count in zip(grids, counts, strict=True)]
    # Where pairs of a block would add at once, the interpreter has a sum for each.
    copies = pairs if interpret else 1

    def read(ref, layout=single):
        return ref[...] if interpret else plgpu.load(ref, layout=layout, optimized=False)

    def cast(value, layout):
        return value if interpret else plgpu.layout_cast(value, layout)

    def zeros(shape, dtype):
        return cast(jnp.zeros(shape, dtype), single)

    def over_columns(per_row, width):
        return lax.broadcast_in_dim(per_row, (padded, width), (0,))

    def over_rows(per_column, layout=single):
        return cast(lax.broadcast_in_dim(per_column, (padded, per_column.size), (1,)), layout)

    def column_index(width):
        if interpret:
            return lax.broadcasted_iota(jnp.int32, (padded, width), 1)
        return plgpu.broadcasted_iota(jnp.int32, (padded, width), 1, layout=single)

    def rounded(value):
        value = jnp.round(value) if interpret else (value + _ROUND) - _ROUND
        return value.astype(jnp.int32)

    def body(*refs):
        refs = iter(refs)
        at = next(refs)
        at = [at[index] for index in range(2 * len(links))]  # once: memory is far
        stream_in = next(refs)
        given = next(refs) if links[0].enter == "input" else None
        data, scale, norm = [], [], []
        for link in links:
            data.append(next(refs))
            scale.append(next(refs))
            norm.append(next(refs) if link.normed else None)
        out = None if leaves is None else next(refs)
        stream_out = next(refs)
        sums, values, squares, peaks, offsets = ([next(refs) for _ in links] for _ in range(5))
        tile_smem, x_smem, full, free, quantized = (next(refs) for _ in range(5))
        come = next(refs) if interpret else pl.get_global(plgpu.SemaphoreType.REGULAR)
        block, group = lax.axis_index("block"), lax.axis_index("group")
        worker = block * consumers + group

        def meet(turn):
            """The grid's barrier: until all groups of all blocks have come to it."""
            if interpret:
                plgpu.barrier_arrive(come.at[turn])
                plgpu.barrier_wait(come.at[turn])
            else:
                plgpu.semaphore_signal(come, 1, memory_scope="gpu")
                target = (turn + 1) * workers
                plgpu.semaphore_wait(come, target, decrement=False, memory_scope="gpu")

        def share(i):
            """(first tile along K of this block's part of link i, its units from, to)."""
            in_part = blocks // counts[i]
            within = lax.rem(block, in_part)
            units = grids[i][0] * held[i]
            start, stop = within * units // in_part, (within + 1) * units // in_part
            return lax.div(block, in_part) * held[i], start, stop

        def fetch():
            """Every tile into shared memory once its slot is free, `ahead` of that into L2."""
            spans, total = [], jnp.int32(0)  # (link, layer, first of the launch's tiles, how many)
            for i in range(len(links)):
                _, start, stop = share(i)
                spans.append((i, at[2 * i], total, stop - start))
                total = total + stop - start
            own, behind = list(spans), total
            if links[0].enter == "input":  # the next layer's chain begins as this one
                for i, layer, _, count in own[:2]:
                    there = jnp.where(layer + 1 < stacked[i], count, 0)
                    spans.append((i, layer + 1, behind, there))
                    behind = behind + there

            def tile(i, layer, index):
                first_k, start, _ = share(i)
                along_n, along_k = grids[i]
                n, k = lax.div(start + index, held[i]), lax.rem(start + index, held[i])
                return data[i].at[(layer * along_n + n) * along_k + first_k + k]

            def prefetch(count):
                for i, layer, first, length in spans:

                    @pl.when((count >= first) & (count < first + length))
                    def _(i=i, layer=layer, first=first):
                        plgpu.async_prefetch(tile(i, layer, count - first))

            if ahead:
                pl.loop(stages, stages + ahead)(prefetch)
            for i, layer, first, length in own:

                @pl.loop(first, first + length)
                def _(count, i=i, layer=layer, first=first):
                    slot = lax.rem(count, stages)

                    @pl.when(count >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    source = tile(i, layer, count - first)
                    plgpu.copy_gmem_to_smem(source, tile_smem.at[slot], full.at[slot])
                    if ahead:
                        prefetch(count + stages + ahead)

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _(count):
                plgpu.barrier_wait(free.at[lax.rem(count, stages)])

        def place(i):
            """Where this worker reads what link i has made: (columns from which on, how many)."""
            if i + 1 < len(links):
                k_size = links[i + 1].shape[0]
                first, width = own_part(k_size)
                gated = links[i + 1].enter in GATES
                return ([first, k_size + first] if gated else [first]), width
            first, width = own_part(leaves or columns)
            return [first], width

        def own_part(size):
            """(first, how many) of this worker's columns; those without work repeat the last's."""
            part = chunks(size, workers)
            return jnp.minimum(worker, part.count - 1) * part.width, part.width

        def working(size):
            return worker < chunks(size, workers).count

        def scales(i):
            firsts, width = place(i)
            return [
                read(scale[i].at[at[2 * i], pl.ds(first, width)], single.reduce(0))
                for first in firsts
            ]

        def product(i, x_scale, w_scales):
            """f32 [padded, width] from each column of `place(i)` on: what link i has made."""
            firsts, width = place(i)
            totals = [
                sum(read(sums[i].at[copy, :, pl.ds(first, width)]) for copy in range(copies))
                for first in firsts
            ]
            lacks = over_columns(shares(offsets[i], links[i].shape[0], jnp.sum), width)
            x_scale = over_columns(x_scale, width)
            return [
                (total + lacks).astype(jnp.float32) * (x_scale * over_rows(w_scale))
                for total, w_scale in zip(totals, w_scales, strict=True)
            ]

        def shares(ref, size, reduce):
            """[padded]: the workers' shares of a row's statistic, of `size` columns, together.

            Of one row, every warp has it.
            """
            count = chunks(size, workers).count
            cols = pl.ds(0, -(-count // _LANES) * _LANES)
            if rows == 1:
                found = over_rows(read(ref.at[0, cols], single.reduce(0)), single)
            else:
                found = read(ref.at[:, cols])
            return reduce(jnp.where(column_index(found.shape[1]) < count, found, 0), axis=1)

        def clear():
            """Sums begin at zero, and so do values beyond K."""
            for i, link in enumerate(links):
                part = chunks(sums[i].shape[2], workers)

                @pl.when(worker < part.count)
                def _(i=i, part=part):
                    cols = pl.ds(worker * part.width, part.width)
                    for copy in range(copies):
                        sums[i][copy, :, cols] = zeros((padded, part.width), jnp.int32)

                if pad := -link.shape[0] % tiles.TILE_K:

                    @pl.when(worker == i % workers)
                    def _(i=i, pad=pad, k=link.shape[0]):
                        values[i][:, pl.ds(k, pad)] = zeros((padded, pad), jnp.float32)

        def load_values(i, j, first, width):
            """f32 [padded, width] of the block's j-th tile, columns `first` on; of one row the
            whole tile, [4, 128], a slice for each warp."""
            first_k, _, _ = share(i)
            tile = first_k + j
            if rows > 1:
                return read(values[i].at[:, pl.ds(tile * tiles.TILE_K + first, width)], fours)
            if interpret:
                return values[i][0, pl.ds(tile * tiles.TILE_K, width)].reshape(_SLICES)
            slices = values[i].reshape(padded, -1, tiles.SLICE)
            return read(slices.at[0, pl.ds(tile * _SLICES[0], _SLICES[0])], fours)

        def turns(i):
            """This group's tiles of those whose activations the block holds; some come twice."""
            for turn in range(-(-held[i] // consumers)):
                yield jnp.minimum(group + turn * consumers, held[i] - 1)

        def quantize(i, factor, loaded):
            """Leaves the activations of this block's tiles in shared memory, as int8.

            loaded: their values, where there is one row; else they are read here.
            """
            factor = cast(factor, fours.reduce(1))
            width = tiles.TILE_K * 8 // tile_rows  # of more rows registers hold fewer columns

            def digits(value):
                found = rounded(value * over_columns(factor, value.shape[1]))
                return found.astype(jnp.int8)

            if rows == 1:  # the first of eight rows, which no swizzle moves
                for j, value in zip(turns(i), loaded, strict=True):
                    x_smem[j, :, 0, :] = digits(value)
            else:

                @pl.loop(0, -(-held[i] // consumers))
                def _(turn):
                    j = jnp.minimum(group + turn * consumers, held[i] - 1)
                    for first in range(0, tiles.TILE_K, width):
                        value = load_values(i, j, first, width)
                        x_smem[j, :, pl.ds(first, width)] = digits(value)

            if not interpret:
                plgpu.commit_smem()
            plgpu.barrier_arrive(quantized.at[i])
            plgpu.barrier_wait(quantized.at[i])

        def calculate():
            clear()
            mine, mine_width = own_part(columns)
            stream = read(stream_in.at[:, pl.ds(mine, mine_width)])
            base, x_scale, w_scales = jnp.int32(0), None, None
            for i, link in enumerate(links):
                k_size = link.shape[0]
                first, width = own_part(k_size)
                cols = pl.ds(first, width)
                if link.normed:
                    weight = read(norm[i].at[at[2 * i + 1], cols], single.reduce(0))
                if i:
                    meet(2 * i - 1)
                if link.enter == "input":
                    if given.shape[0] == padded:
                        value = read(given.at[:, cols])
                    else:
                        value = over_rows(read(given.at[0, cols], single.reduce(0)))
                elif link.enter == "stream":
                    value = stream
                elif link.enter == "residual":
                    [found] = product(i - 1, x_scale, w_scales)
                    value = stream = stream + found
                else:
                    gate, up = product(i - 1, x_scale, w_scales)
                    value = GATES[link.enter](gate) * up
                weighed = value * over_rows(weight) if link.normed else value

                @pl.when(working(k_size))
                def _(i=i, link=link, cols=cols, value=value, weighed=weighed):
                    values[i][:, cols] = weighed
                    peaks[i][:, worker] = jnp.max(jnp.maximum(weighed, -weighed), axis=1)
                    if link.normed:
                        squares[i][:, worker] = jnp.sum(value * value, axis=1)

                meet(2 * i)
                loaded = []
                if rows == 1:
                    loaded = [load_values(i, j, 0, tiles.TILE_K) for j in turns(i)]
                peak, root = shares(peaks[i], k_size, jnp.max), None
                if link.normed:
                    root = lax.rsqrt(shares(squares[i], k_size, jnp.sum) / k_size + link.eps)
                    peak = peak * root
                inverse = (1.0 / jnp.maximum(peak, _EPS)) * 127.0
                x_scale = 1.0 / inverse
                factor = inverse if root is None else inverse * root
                quantize(i, factor, loaded)

                @pl.when(working(k_size))
                def _(i=i, first=first, width=width, weighed=weighed, factor=factor):
                    digits = rounded(weighed * over_columns(factor, width))
                    last = ((column_index(width) + first) // tiles.SLICE) % 4 == 3
                    offsets[i][:, worker] = jnp.sum(jnp.where(last, digits, -digits), axis=1)

                w_scales = scales(i)
                base = multiply(i, base)

            end = len(links) - 1
            meet(2 * end + 1)
            [found] = product(end, x_scale, w_scales)
            if leaves is None:
                stream = stream + found
            else:
                first, width = own_part(leaves)

                @pl.when(working(leaves))
                def _():
                    out[:, pl.ds(first, width)] = found

            @pl.when(working(columns))
            def _():
                stream_out[:, pl.ds(mine, mine_width)] = stream

        def multiply(i, base):
            """This group's part of link i; how many tiles the block has had then."""
            _, start, stop = share(i)
            team, half = lax.div(group, 2), lax.rem(group, 2)

            def turn(unit):
                """How many of this team's turns are before the unit, of all links."""
                return lax.div(base + unit - start - team + pairs - 1, pairs)

            @pl.loop(lax.div(start, held[i]), lax.div(stop - 1, held[i]) + 1)
            def _(n):
                first, last = jnp.maximum(start, n * held[i]), jnp.minimum(stop, (n + 1) * held[i])

                def one(j, accumulators):
                    count = j * pairs + team
                    slot = lax.rem(count, stages)
                    x = x_smem.at[count - base + start - n * held[i]]
                    plgpu.barrier_wait(full.at[slot])
                    found = skinny.multiply(accumulators, tile_smem.at[slot], half, x, interpret)
                    plgpu.barrier_arrive(free.at[slot])
                    return found

                accumulators = lax.fori_loop(
                    turn(first), turn(last), one, skinny.zeros(tile_rows, interpret)
                )
                column = n * tiles.ROWS + half * tiles.HALF
                out_sums = sums[i].at[team if interpret else 0]
                skinny.add(out_sums, column, accumulators, rows, interpret)

            return base + stop - start

        @pl.when(group == consumers)
        def _():
            plgpu.set_max_registers(decode.FETCH_REGISTERS, action="decrease")
            fetch()

        @pl.when(group < consumers)
        def _():
            registers = decode.multiply_registers(consumers)
            plgpu.set_max_registers(registers, action="increase")
            calculate()

    shape = jax.ShapeDtypeStruct
    wide = -(-workers // _LANES) * _LANES
    statistic = [shape((padded, wide), jnp.float32) for _ in links]
    outputs = [
        *([] if leaves is None else [shape((padded, leaves), jnp.float32)]),
        shape((padded, columns), jnp.float32),
        *(shape((copies, padded, n * tiles.ROWS), jnp.int32) for n, _ in grids),
        *(shape((padded, k * tiles.TILE_K), jnp.float32) for _, k in grids),
        *statistic,
        *statistic,
        *(shape((padded, wide), jnp.int32) for _ in links),
    ]
    scratch = [
        plgpu.SMEM((stages, *operand.TILE), jnp.uint8),
        plgpu.SMEM((max(held), *_SLICES[:1], 8, tiles.SLICE), jnp.int8)
        if rows == 1
        else plgpu.SMEM((max(held), tile_rows, tiles.TILE_K), jnp.int8, transforms=skinny.SWIZZLED),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=len(links)),
    ]
    if interpret:
        scratch.append(plgpu.Barrier(num_arrivals=consumers, num_barriers=2 * len(links)))
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
