"""How the matrix kernel cuts its output into pieces, and how clusters of blocks share them.

A piece is `rows` rows of x by one strip of tiles for each block of a cluster. Clusters share in
one of two ways. Whole: pieces in turn, those of a strip together, so that its weights come from
memory once; a piece is written once, scaled if need be. Split, where pieces are few: equal shares
of all units, as in decode.py, added to the output in int32, whose order does not change a sum.
"""

from . import tiles

# Of a piece, rows times a strip's tiles: its sums are 128 registers of a thread, half of all.
_MOST = 256
# wgmma on int8 takes rows in sixteens, and a cluster of two shares them in eights.
_ROWS = 16
# What a block may hold on Hopper, less 1 KiB for barriers and the system.
_SHARED_BYTES = 226 << 10
_MAX_BARRIERS = 32
# Predicted, none measured: with fewer rows a unit takes as long, as it waits for memory; to begin
# and write a piece takes as long as this many more; and what is left of the speed where sums are
# written, added to and read again.
_MEMORY_ROWS, _PIECE_ROWS, _SPLIT = 56, 8, 0.85


def heuristic(shape: tuple[int, int], planes: int, rows: int, blocks: int) -> dict[str, int]:
    """Settings for `rows` rows of x and W [K, N], on a GPU of `blocks` processors.

    The pieces and the way to share them that promise most of the GPU's time to wanted rows.
    """
    along_n, along_k = tiles.grid(shape)
    cluster = 2
    clusters = max(1, blocks // cluster)
    # Narrow strips where wide ones would reach further over the edge.
    wide = whole(planes * along_n, 2 * cluster) == whole(planes * along_n, cluster)
    strip = 2 if wide else 1
    strips = -(-planes * along_n // (cluster * strip))

    def promise(piece_rows, split):
        along_m = -(-rows // piece_rows)
        jobs = along_m * strips * (along_k if split else 1)
        busy = jobs / whole(jobs, clusters)
        wanted = rows / (along_m * (max(piece_rows, _MEMORY_ROWS) + _PIECE_ROWS))
        return busy * wanted * (_SPLIT if split else 1)

    most = min(_MOST // strip, whole(rows, _ROWS))
    choices = [(size, split) for split in (0, 1) for size in range(most, 0, -_ROWS)]
    piece_rows, split = max(choices, key=lambda choice: promise(*choice))
    units = 4 if strip * piece_rows <= _MOST // 2 else 3
    slices = _SHARED_BYTES - units * strip * tiles.TILE_BYTES
    return {
        "blocks": blocks,
        "rows": piece_rows,
        "strip": strip,
        "cluster": cluster,
        "units": units,
        "slices": min(slices // (piece_rows * tiles.SLICE), _MAX_BARRIERS),
        "split": split,
    }


def size_of(along_n: int, along_m: int, config) -> tuple[int, int]:
    """The output's (M, N) in whole pieces, of `along_n` tiles of weights and `along_m` of x."""
    width = whole(along_n, config["cluster"] * config["strip"]) * tiles.ROWS
    return along_m * config["rows"], width


def whole(count: int, of: int) -> int:
    """`count`, up to a multiple of `of`."""
    return -(-count // of) * of
