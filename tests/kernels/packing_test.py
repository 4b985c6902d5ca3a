"""The packed layout: frozen by hand-written bytes, inverted exactly, the same in numpy and jnp."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import packing
from ternax.kernels.packing import FORMATS, Packed

FORMAT_NAMES = sorted(FORMATS)
pack = jax.jit(packing.pack, static_argnums=1)
unpack = jax.jit(packing.unpack, static_argnums=(1, 2))


@st.composite
def matrices(draw, max_k=70, max_n=9, lead=((), (2,), (2, 1))):
    """(format, int8 [..., K, N] of every value the format has)."""
    format = draw(st.sampled_from(FORMAT_NAMES))
    shape = (*draw(st.sampled_from(lead)), draw(st.integers(1, max_k)), draw(st.integers(1, max_n)))
    return format, values(format, shape, draw(st.integers(0, 2**32 - 1)))


def values(format, shape, seed=0):
    low, high = FORMATS[format].low, FORMATS[format].high
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int8)


# --- The layout, fixed -------------------------------------------------------------------


def test_golden_trit2():
    #          p = 0         p = 1       p = 2           p = 3        second block
    row = [-1, 0, 1, 0, 1, 1, 1, 1, -1, -1, -1, -1, 0, 1, -1, 0, 1, -1]
    # Codes of byte 0, high bits left: 01 00 10 00, then 10 00 10 01, and so on. The second
    # block holds two codes, 2 and 0, and fourteen times the code of zero, 01.
    expected = [0b01001000, 0b10001001, 0b00001010, 0b01001001]
    expected += [0b01010110, 0b01010100, 0b01010101, 0b01010101]
    assert packing.pack_numpy(np.array([row], np.int8).T, "trit2").tolist() == [expected]


def test_golden_int4():
    row = [-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 0]
    expected = [0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7, 0x88]
    assert packing.pack_numpy(np.array([row], np.int8).T, "int4").tolist() == [expected]


def test_golden_int8():
    row = [-127, -1, 0, 1, 127]
    expected = [1, 127, 128, 129, 255] + 11 * [128]
    assert packing.pack_numpy(np.array([row], np.int8).T, "int8").tolist() == [expected]


def test_golden_rows_are_columns_of_the_matrix():
    columns = np.array([[1, -1], [0, 0]], np.int8)  # K = 2, N = 2: row n holds column n
    assert packing.pack_numpy(columns, "trit2").tolist() == [
        [0b01010110, 0b01010101, 0b01010101, 0b01010101],
        [0b01010100, 0b01010101, 0b01010101, 0b01010101],
    ]


def test_layout_version_moves_with_the_layout():
    # Stored files name this version. Whoever has to change a golden above changes it too.
    assert (packing.LAYOUT_VERSION, packing.BLOCK) == (1, 16)


@pytest.mark.parametrize("k", range(64))
def test_trit2_position_is_the_documented_one(k):
    j, p, b = k // 16, k // 4 % 4, k % 4
    assert k == 16 * j + 4 * p + b
    assert packing.code_position(k, 2) == (4 * j + b, 2 * p)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_positions_fill_every_bit_once(format):
    bits, codes = FORMATS[format].bits, 5 * packing.BLOCK
    used = [
        8 * byte + bit + i
        for byte, bit in (packing.code_position(k, bits) for k in range(codes))
        for i in range(bits)
    ]
    assert sorted(used) == list(range(codes * bits))
    assert FORMATS[format].row_bytes(codes) == codes * bits // 8


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_every_value_of_a_format_has_a_valid_code(format):
    fmt = FORMATS[format]
    assert 0 < fmt.bits <= 8 and 0 <= fmt.low + fmt.offset and fmt.high + fmt.offset < 2**fmt.bits
    every = np.arange(fmt.low, fmt.high + 1, dtype=np.int8)[:, None]
    assert not packing.has_invalid_codes(packing.pack_numpy(every, format), format)


# --- Packing and back --------------------------------------------------------------------


@hypothesis.settings(max_examples=100)
@hypothesis.given(matrices())
def test_numpy_unpack_inverts_pack(case):
    format, matrix = case
    rows = packing.pack_numpy(matrix, format)
    *lead, k_size, n = matrix.shape
    assert rows.shape == (*lead, n, FORMATS[format].row_bytes(k_size)) and rows.dtype == np.uint8
    np.testing.assert_array_equal(packing.unpack_numpy(rows, format, k_size), matrix)


@hypothesis.given(matrices())
def test_jnp_is_the_numpy_definition(case):
    format, matrix = case
    rows = packing.pack_numpy(matrix, format)
    np.testing.assert_array_equal(pack(matrix, format), rows)
    back = unpack(rows, format, matrix.shape[-2])
    assert back.dtype == jnp.int8
    np.testing.assert_array_equal(back, matrix)


@hypothesis.given(st.sampled_from(FORMAT_NAMES), st.integers(0, 2**32 - 1))
def test_any_bytes_unpack_alike(format, seed):
    # Noise makes bytes that no quantizer emits: trit code 3 reads +2 in both.
    rows = np.random.default_rng(seed).integers(0, 256, (3, FORMATS[format].row_bytes(40)))
    rows = rows.astype(np.uint8)
    expected = packing.unpack_numpy(rows, format, 40)
    np.testing.assert_array_equal(unpack(rows, format, 40), expected)
    if format == "trit2":
        assert packing.unpack_numpy(np.full((1, 4), 255, np.uint8), format, 16).min() == 2


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("k_size", [1, 15, 17])
def test_padding_is_the_code_of_zero(format, k_size):
    matrix = values(format, (k_size, 3))
    filled = np.concatenate([matrix, np.zeros((-k_size % 16, 3), np.int8)])
    for rows in (packing.pack_numpy(matrix, format), pack(matrix, format)):
        np.testing.assert_array_equal(rows, packing.pack_numpy(filled, format))


@hypothesis.settings(max_examples=100)
@hypothesis.given(matrices(lead=((),)), st.data())
def test_splitting_commutes_with_packing(case, data):
    format, matrix = case
    k_size, n = matrix.shape
    rows = packing.pack_numpy(matrix, format)
    at = data.draw(st.integers(0, n))
    parts = [packing.pack_numpy(part, format) for part in (matrix[:, :at], matrix[:, at:])]
    np.testing.assert_array_equal(np.concatenate(parts), rows)
    at = 16 * data.draw(st.integers(0, k_size // 16))
    parts = [packing.pack_numpy(part, format) for part in (matrix[:at], matrix[at:])]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), rows)


# --- Codes no quantizer emits ------------------------------------------------------------

INVALID = {"trit2": 3, "int4": 0, "int8": 0}


has_invalid_codes = jax.jit(packing.has_invalid_codes, static_argnums=1)


@hypothesis.given(st.sampled_from(FORMAT_NAMES), st.integers(0, 39), st.integers(0, 2))
def test_one_invalid_code_is_found_anywhere(format, k, n):
    bits = FORMATS[format].bits
    rows = packing.pack_numpy(values(format, (40, 3), seed=k), format)
    assert not has_invalid_codes(rows, format)
    byte, bit = packing.code_position(k, bits)
    mask = (2**bits - 1) << bit
    rows[n, byte] = (int(rows[n, byte]) & ~mask) | INVALID[format] << bit
    assert has_invalid_codes(rows, format)


# --- What kernels take from it -----------------------------------------------------------


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_plane_order_follows_the_bytes(format, lead):
    fmt, k_size = FORMATS[format], 48
    x = np.random.default_rng(0).normal(size=(*lead, k_size)).astype(np.float32)
    planes = np.asarray(packing.plane_order(jnp.asarray(x), format))
    assert planes.shape == (fmt.planes, *lead, k_size // fmt.planes)
    for k in range(k_size):
        byte, bit = packing.code_position(k, fmt.bits)
        np.testing.assert_array_equal(planes[bit // fmt.bits, ..., byte], x[..., k])


@pytest.mark.parametrize("groups, width", [(1, 1), (1, 5), (3, 1), (3, 5)])
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_unpack_rows_dequantizes(format, groups, width):
    rng = np.random.default_rng(groups * width)
    k_size, n = 48, 5
    matrix = values(format, (1, k_size, n))
    scale = rng.uniform(0.5, 2, (1, groups, width)).astype(np.float32)
    index = np.array([[4, 0], [2, 2]])
    for zero in (None, rng.normal(size=scale.shape).astype(np.float32)):
        shift = np.zeros_like(scale) if zero is None else zero
        spread = functools.partial(np.repeat, repeats=k_size // groups, axis=0)
        dense = (matrix[0] + spread(shift[0])) * spread(scale[0])
        w = Packed(
            packing.pack_numpy(matrix, format),
            jnp.asarray(scale),
            None if zero is None else jnp.asarray(zero),
            format,
            shape=(k_size, n),
        )
        rows = packing.unpack_rows(jax.tree.map(jnp.asarray, w), jnp.asarray(index))
        assert rows.shape == (2, 2, k_size) and rows.dtype == jnp.float32
        np.testing.assert_allclose(rows, dense.T[index], rtol=1e-6)


@pytest.mark.parametrize("k_size", [1, 21])
def test_unpack_rows_leaves_padding_behind(k_size):
    matrix = values("trit2", (1, k_size, 4))
    w = Packed(pack(matrix, "trit2"), jnp.full((1, 1, 1), 0.5), shape=(k_size, 4))
    np.testing.assert_array_equal(packing.unpack_rows(w, jnp.arange(4)), 0.5 * matrix[0].T)


@pytest.mark.parametrize("format", sorted(packing.FLOAT_FORMATS))
def test_float_formats_store_what_they_say(format):
    x = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    x[0, :4] = [0.0, -0.0, np.inf, 1 + 2**-8]  # the last is a tie: bf16 rounds it to even, 1.0
    stored = packing.float_to_bits(jnp.asarray(x), format)
    assert stored.dtype == packing.FLOAT_FORMATS[format]
    expected = x if format == "f32" else x.astype(jnp.bfloat16).astype(np.float32)
    assert format == "f32" or expected[0, 3] == 1.0
    np.testing.assert_array_equal(packing.bits_to_float(stored), expected)
    w = Packed(stored[None], jnp.ones((1, 1, 1)), format=format, shape=(7, 3))
    np.testing.assert_array_equal(packing.unpack_rows(w, jnp.array([2, 0])), expected[[2, 0]])


def test_nbytes_counts_every_leaf_and_past_two_gigabytes():
    abstract = jax.ShapeDtypeStruct
    w = Packed(
        abstract((80, 1, 57344, 2048), np.uint8),
        abstract((80, 1, 1, 57344), np.float32),
        abstract((80, 1, 1, 1), np.float32),
        shape=(8192, 57344),
    )
    assert w.nbytes == 80 * (57344 * 2048 + 57344 * 4 + 4) > 2**33
    assert (w.groups, w.num_planes) == (1, 1)
