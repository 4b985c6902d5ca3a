"""What decode attention on Mosaic GPU can take, and the settings that it takes it with."""

import math

import jax.numpy as jnp

# Query heads that share a key head, at most; columns of wgmma come in eights.
MAX_SHARED = 16
WIDTHS = (64, 128)
# Slots of a tile, once or twice the rows of a wgmma.
TILES = (64, 128)
# Shared memory of a processor that its blocks may have, what the hardware takes for two set aside.
SHARED_BYTES = 226 * 1024
# bf16 that sum to a float32: 3 x 8 bits of significand.
TERMS = 3
# Rows of the array that splits leave their sums in.
MAX_SPLITS = 64


def why_not(qkv, k) -> str | None:
    """None where `attention.step` can take a call with these arguments; else one line."""
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
    columns = columns_of(heads // groups)
    # Operands of queries and weights, their sums; for int8, a tile as bf16; scratch, barriers.
    other = columns * (TERMS * 2 * (width + tile) + 8 * width) + 4 * width * 4 + 5 * 1024
    if k.dtype == jnp.int8:
        other += 2 * tile * width * 2
    room = SHARED_BYTES // (1 if alone else 2) - other
    stages = room // (2 * tile * width * k.dtype.itemsize)
    return {"splits": splits, "tile": tile, "stages": min(4, stages)}


def columns_of(shared: int) -> int:
    """Columns of wgmma, in eights, for the queries that share a key head."""
    return -(-shared // 8) * 8
