"""Rows to int8 codes: the definition, the C++ on each instruction set, and XLA, bit for bit."""

import numpy as np
import pytest

from ternax.edit import pack_rows
from ternax.kernels import rows as module
from ternax.kernels import transcode
from ternax.kernels.packing import bits_to_float
from ternax.kernels.rows import int8_rows, int8_rows_numpy
from ternax.quant.scheme import EPS


def floats(shape, dtype, seed=0):
    """Rows of many sizes: of zeros, of subnormals, with ties."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape).astype(np.float32)
    values *= 10.0 ** rng.uniform(-6, 3, (shape[0], 1)).astype(np.float32)
    values[0] = 0
    values[1 % shape[0], ::2] = 1e-7
    values[2 % shape[0]] = np.arange(shape[1]) % 255 - 127
    values[3 % shape[0]] = (np.arange(shape[1]) % 254 - 126.5) / 2
    if dtype == np.uint16:
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def empty(rows):
    n, k = rows.shape
    return np.full((n, -(-k // 16) * 16), 7, np.uint8), np.empty(n, np.float32)


@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (40, 4096), (3000, 2000)])
def test_all_ways_agree(dtype, shape):
    rows = floats(shape, dtype)
    codes, scale = empty(rows)
    most = int8_rows_numpy(rows, codes, scale)
    packed = pack_rows(bits_to_float(rows) if dtype == np.uint16 else rows.astype("f4"), "int8")
    np.testing.assert_array_equal(packed.data[0], codes)
    np.testing.assert_array_equal(packed.scale[0, 0], scale)
    for threads in (1, 3):
        found, found_scale = empty(rows)
        assert int8_rows(rows, found, found_scale, threads=threads) == most
        np.testing.assert_array_equal(found, codes)
        np.testing.assert_array_equal(found_scale, scale)


@pytest.mark.skipif(transcode.why_not() is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32])
def test_every_instruction_set(isa, dtype):
    if isa not in transcode.instruction_sets():
        pytest.skip(f"this processor has no {isa}")
    rows = floats((40, 4099), dtype)
    (codes, scale), (found, found_scale) = empty(rows), empty(rows)
    most = int8_rows_numpy(rows, codes, scale)
    arrays = (array.ctypes.data for array in (rows, found, found_scale))
    call = transcode.library().ternax_int8_rows
    assert call(
        module.KINDS[rows.dtype], transcode.instruction_sets()[isa], 2, *arrays, 4099, 40
    ) == (most)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(found_scale, scale)


@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32])
@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_told(dtype, odd):
    rows = floats((5, 100), np.float32)
    rows[3, 77] = odd
    if dtype == np.uint16:
        rows = (rows.view(np.uint32) >> 16).astype(np.uint16)
    rows = rows.astype(dtype)
    assert int8_rows(rows, *empty(rows)) == np.inf == int8_rows_numpy(rows, *empty(rows))


def test_the_least_magnitude_is_the_schemes():
    assert module._EPS == np.float32(EPS)


def test_arrays_that_do_not_fit_are_refused():
    rows = floats((4, 20), np.float32)
    codes, scale = empty(rows)
    for arguments in (
        (rows.T, codes, scale),
        (rows, codes[:, :20], scale),
        (rows, codes, scale[1:]),
    ):
        with pytest.raises(ValueError, match="expected"):
            int8_rows(*arguments)
    with pytest.raises(ValueError, match="expected contiguous"):
        int8_rows(rows.astype(np.int32), codes, scale)
