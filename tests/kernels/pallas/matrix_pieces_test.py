"""The matrix kernel's settings: what fits a GPU."""

import pytest

from ternax.kernels.pallas import matrix_pieces, tiles
from ternax.kernels.shapes import SHAPES

ROWS = (*range(17, 300, 7), 512, 1000, 2048, 5000)


@pytest.mark.parametrize("shape", sorted({*SHAPES["70b"].values(), (2560, 3840), (64, 1)}))
def test_settings_fit_the_gpu(shape):
    for rows in ROWS:
        found = matrix_pieces.heuristic(shape, 1, rows, 132)
        piece, strip = found["rows"], found["strip"]
        assert piece % 16 == 0 and piece * strip <= 256
        assert 0 <= matrix_pieces.whole(rows, piece) - rows < piece
        shared = found["units"] * strip * tiles.TILE_BYTES + found["slices"] * piece * 128
        assert shared <= 232448 - 1024
        # A slice is multiplied in at least 128 cycles, a unit of weights in 512 or more.
        assert found["slices"] >= 5 and found["units"] >= 3


def test_many_rows_take_whole_pieces_and_few_a_part_of_one():
    at = lambda rows, part: matrix_pieces.heuristic(SHAPES["70b"][part], 1, rows, 132)  # noqa: E731
    large = {"blocks": 132, "rows": 128, "strip": 2, "cluster": 2, "units": 3, "slices": 8}
    assert at(2048, "gate_up") == large | {"split": 0}  # 1792 pieces of 66 clusters
    assert at(2048, "o") == large | {"split": 0}  # 256 pieces: 3.9 turns
    assert at(512, "qkv") == large | {"split": 1}  # 80 pieces would be 1.2 turns
    assert at(64, "o")["split"] == 1  # 16 pieces
    assert at(17, "o")["rows"] == 32


def test_strips_end_where_the_matrix_does():
    """30 tiles are 15 times two blocks of one tile, and not a multiple of two blocks of two."""
    found = matrix_pieces.heuristic((2560, 3840), 1, 2048, 132)
    assert found["strip"] == 1 and found["rows"] == 160
    assert matrix_pieces.size_of(30, 13, found) == (2080, 3840)
    wide = found | {"strip": 2}
    assert matrix_pieces.size_of(30, 13, wide) == (2080, 4096)
