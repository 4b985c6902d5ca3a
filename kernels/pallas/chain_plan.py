"""The plan of a chain: its links, and how blocks and warpgroups share them. See `chain.py`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import decode, tiles

MAX_ROWS = decode.MAX_ROWS
# A warp takes one row and its lanes 32 columns: sums along a row need no other warp.
_WARPS, LANES = 4, 32
# Columns that a warpgroup takes of a row, at most: registers hold a gate's two halves of them.
_MOST_COLUMNS = 256
# A tile's k at its four bit positions.
SLICES = (tiles.TILE_K // tiles.SLICE, tiles.SLICE)
# Of a block on Hopper, less barriers and two small arrays, which begin at multiples of 1024.
_SHARED_BYTES = 232448 - 3 * 1024
MIN_STAGES = 4
# Tiles along K of a row that a block enters alone: of each array that it reads at once, a thread
# has 4 values a tile of its group, 32 registers.
_MOST_ALONE = 16
# Fetching so many bytes of weights takes as long as the end of a row of tiles: 100 cycles, and
# atomic additions of 128 sums a row of activations, of which an H200 does 300 a ns.
_END_BYTES, _ADD_BYTES = 1500, 1700
# Added to |x| < 2^22 it leaves x, rounded half to even, in the low bits of the sum.
_ROUND = 1.5 * 2.0**23
_ROUND_BITS = 0x4B400000
# ternax.quant: the least magnitude that a scale is made of.
_EPS = 1e-5


# Of each link, where a group leaves the time: the last sums are there (of the first link, what it
# reads), so is what the row's statistics need, its digits are in shared memory and nothing holds
# it from multiplying, its products are added.
MARKS = ("met", "known", "quantized", "multiplied")


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


def inverse_root(squares, link):
    """Of the mean square, as RMSNorm has it."""
    return lax.rsqrt(squares / link.shape[0] + link.eps)


def steps(peak, root):
    """(what an int8 step is worth, steps to a value that is to be normed by `root` first)."""
    peak = peak if root is None else peak * root
    inverse = (1.0 / jnp.maximum(peak, _EPS)) * 127.0
    return 1.0 / inverse, inverse if root is None else inverse * root


class Known(NamedTuple):
    """What a block knows of a product that is being made.

    Attributes:
      x_scale: what its activations are to be scaled by, a number or [padded].
      lacks: what all its sums lack, a number; None where blocks tell one another, in `offsets`.
      w_scales: of the columns that this group reads of it; None where it reads whole rows.
    """

    x_scale: Any
    lacks: Any
    w_scales: Any


def mark_names(links: Sequence[Link]) -> list[str]:
    """What is behind a group when it leaves the time."""
    between = [f"{i} {name}" for i in range(len(links)) for name in MARKS]
    return ["begun", *between, "met", "left"]


def padded_rows(rows: int) -> int:
    """Rows of the arrays that chains pass on: one for each warp, or as wgmma has columns."""
    return _WARPS if rows == 1 else wgmma_columns(rows)


def wgmma_columns(rows: int) -> int:
    """Columns of wgmma for so many rows of activations."""
    return -(-rows // 8) * 8


def why_not(links: Sequence[Link], rows: int, blocks: int) -> str | None:
    """None where a chain of the links can be made, else one line."""
    if rows > MAX_ROWS:
        return f"a chain takes {MAX_ROWS} rows, found {rows}"
    for link in links:
        for size in link.shape:
            if size % LANES:
                return f"a chain takes sizes that are multiples of {LANES}, found {size}"
    if any(link.enter in ("input", "stream") for link in links[1:]):
        return "a chain reads its input, or the stream as it was, first"
    for size in (*(link.shape[0] for link in links), links[-1].shape[1]):
        if chunks(size, 2 * blocks).width > _MOST_COLUMNS:
            return f"{size} columns have no equal parts of {_MOST_COLUMNS} or fewer for all blocks"
    if stages_that_fit(links, rows, blocks, alone=False) < MIN_STAGES:
        k_size = max(link.shape[0] for link in links)
        return f"{rows} rows of K = {k_size} do not fit beside the weights in shared memory"
    return None


def heuristic(blocks: int) -> dict[str, int]:
    """Settings on a GPU of `blocks` processors: all the stages that shared memory has room for,
    since what memory sends while a projection is entered need not be waited for afterwards.
    Nothing goes to L2 ahead of them: on an H200 that took longer, see docs/performance.md."""
    return {"blocks": blocks, "stages": 16, "ahead": 0, "consumers": 2, "alone": 1}


def enters_alone(links: Sequence[Link], rows: int, columns: int) -> bool:
    """Whether each block may enter what is no gate without the others: it has all of a row then.

    What few blocks would have to read is read by every one, but nobody waits: one barrier less,
    and no values that go through memory and back. Rows must be one, and short.
    """
    narrow = [columns, *(link.shape[0] for link in links if link.enter not in GATES)]
    return rows == 1 and all(
        k % tiles.TILE_K == 0 and k // tiles.TILE_K <= _MOST_ALONE for k in narrow
    )


def stages_that_fit(links: Sequence[Link], rows: int, blocks: int, alone: bool) -> int:
    """Tiles that fit in shared memory beside a block's activations."""
    tile_rows = wgmma_columns(rows)
    held = max(tiles.grid(link.shape)[1] // parts_of(link, rows, blocks, alone) for link in links)
    return (_SHARED_BYTES - held * tile_rows * tiles.TILE_K) // tiles.TILE_BYTES


def parts_of(link: Link, rows: int, blocks: int, alone: bool) -> int:
    """Parts along K of a link: one where each block has all activations anyway."""
    return 1 if alone and link.enter not in GATES else parts(link.shape, rows, blocks)


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
        read = held * wgmma_columns(rows) * tiles.TILE_K
        return read > room, read + (share / held + 1) * (_END_BYTES + _ADD_BYTES * rows)

    return min((p for p in range(1, along_k + 1) if not (along_k % p or blocks % p)), key=cost)


class Chunks(NamedTuple):
    """How a row of columns is shared: `width` to each of the first `workers`."""

    width: int
    workers: int


def chunks(size: int, workers: int) -> Chunks:
    """The narrowest equal parts of whole turns of a warp's lanes, as many as there are workers."""
    turns = size // LANES
    for each in range(1, turns + 1):
        if turns % each == 0 and turns // each <= workers:
            return Chunks(each * LANES, turns // each)
    raise AssertionError("one chunk always fits")


def layout(each: int):
    """[rows, columns] of a warpgroup: a warp a row, a lane `each` columns side by side."""
    tiling = plgpu.Tiling(((_WARPS, LANES * each), (each,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a chain's kernel is compiled for.

    Attributes:
      links: the projections.
      stacked: layers in the stack of each one's weights.
      rows: of activations that are real.
      columns: of the residual stream.
      leaves: N of the last product, or None where it is added to the stream.
      interpret: for the interpreter, which has one block, and neither layouts nor atomics.
      blocks, stages, ahead, consumers, alone, marks: see `chain.run`.
    """

    links: tuple[Link, ...]
    stacked: tuple[int, ...]
    rows: int
    columns: int
    leaves: int | None
    interpret: bool
    blocks: int
    stages: int
    ahead: int
    consumers: int
    alone: int
    marks: bool = False

    def enters_alone(self, i: int) -> bool:
        """Whether a block enters link i without the others."""
        return bool(self.alone) and self.links[i].enter not in GATES

    @property
    def adds_alone(self) -> bool:
        """Whether each block adds the last product to the whole stream."""
        return bool(self.alone) and self.leaves is None

    @property
    def meetings(self) -> int:
        """Barriers of the grid in a launch: before each first read of what others have left."""
        each = (1 if i == 0 or self.enters_alone(i) else 2 for i in range(len(self.links)))
        return sum(each) + 1

    @property
    def pairs(self) -> int:
        return decode.teams(self.consumers)

    @property
    def workers(self) -> int:
        """Warpgroups that enter and multiply, of all blocks."""
        return self.blocks * self.consumers

    @property
    def padded(self) -> int:
        return padded_rows(self.rows)

    @property
    def tile_rows(self) -> int:
        return wgmma_columns(self.rows)

    @property
    def copies(self) -> int:
        """Of sums. Where pairs of a block would add at once, the interpreter has one for each."""
        return self.pairs if self.interpret else 1

    @functools.cached_property
    def grids(self) -> list[tuple[int, int]]:
        """Tiles along N and K of each link."""
        return [tiles.grid(link.shape) for link in self.links]

    @functools.cached_property
    def counts(self) -> list[int]:
        """Parts along K of each link."""
        return [parts_of(link, self.rows, self.blocks, bool(self.alone)) for link in self.links]

    @functools.cached_property
    def held(self) -> list[int]:
        """Tiles along K of a part: those whose activations a block holds."""
        pairs = zip(self.grids, self.counts, strict=True)
        return [along_k // count for (_, along_k), count in pairs]

    def share(self, i: int, block):
        """(first tile along K of the block's part of link i, its units from, to)."""
        in_part = self.blocks // self.counts[i]
        within = lax.rem(block, in_part)
        units = self.grids[i][0] * self.held[i]
        start, stop = within * units // in_part, (within + 1) * units // in_part
        return lax.div(block, in_part) * self.held[i], start, stop

    # Arrays in registers: a warp a row.

    def read(self, ref, how=None):
        if self.interpret:
            return ref[...]
        return plgpu.load(ref, layout=how or layout(1), optimized=False)

    def cast(self, value, how):
        return value if self.interpret else plgpu.layout_cast(value, how)

    def zeros(self, width: int, dtype):
        return self.cast(jnp.zeros((self.padded, width), dtype), layout(1))

    def over_columns(self, per_row, width: int):
        return lax.broadcast_in_dim(per_row, (self.padded, width), (0,))

    def over_rows(self, per_column):
        shape = (self.padded, per_column.size)
        return self.cast(lax.broadcast_in_dim(per_column, shape, (1,)), layout(1))

    def column_index(self, width: int):
        shape = (self.padded, width)
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, 1)
        return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout(1))

    def rounded(self, value):
        """int32, half to even. A product before it is rounded once, with the sum, on a GPU."""
        if self.interpret:
            return jnp.round(value).astype(jnp.int32)
        return lax.bitcast_convert_type(value + _ROUND, jnp.int32) - _ROUND_BITS
