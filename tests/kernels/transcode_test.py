"""Foreign layouts: frozen by other programs' bytes, right by a slow oracle, the same in C++."""

import ctypes
import mmap
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ternax.kernels import packing, transcode
from ternax.kernels.cpu.build import BuildError
from ternax.kernels.transcode import LAYOUTS, LayoutError

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "goldens"
NAMES = sorted(LAYOUTS)
TWO_BIT = [name for name in NAMES if name != "tq1_0"]

try:
    ISAS = list(transcode.instruction_sets())
except BuildError:
    ISAS = []


def random_case(name, shape, seed=0):
    """(int8 [K, N], canonical rows, a scale that the layout takes)."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-1, 2, shape).astype(np.int8)
    spec = LAYOUTS[name]
    scale = None
    if spec.scale:
        scale = rng.normal(size=spec.scale_shape(shape)).astype(spec.scale)
        scale = scale[()] if spec.tail_bytes else scale
    return values, packing.pack_numpy(values, "trit2"), scale


def shapes(name, blocks=6, rows=5):
    spec = LAYOUTS[name]
    return st.tuples(
        st.integers(1, 150 if spec.k_multiple == 1 else blocks).map(lambda i: i * spec.k_multiple),
        st.integers(1, rows).map(lambda i: i * spec.n_multiple),
    )


cases = st.sampled_from(NAMES).flatmap(
    lambda name: st.tuples(st.just(name), shapes(name), st.integers(0, 2**32 - 1))
)


def same_scale(a, b):
    return (a is None and b is None) or (
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    )


# --- The oracle: every element by itself, from the formats' text -------------------------


def place(name, k, n, k_size, n_size):
    """(byte of the matrix, low bit) of the code of W[k, n]."""
    if name == "hf":
        quarter, row = divmod(n, n_size // 4)
        return row * k_size + k, 2 * quarter
    if name == "i2_s_rows":
        row, quarter = divmod(n, 4)
        return row * k_size + k, 6 - 2 * quarter
    if name == "tq2_0":
        block, i = divmod(n * k_size + k, 256)
        half, i = divmod(i, 128)
        return 66 * block + 32 * half + i % 32, 2 * (i // 32)
    width = {"i2_s_x86": 32, "i2_s_arm": 16}[name]
    block, i = divmod(n * k_size + k, 4 * width)
    return width * block + i % width, 6 - 2 * (i // width)


def oracle_bytes(name, values, scale):
    k_size, n_size = values.shape
    out = bytearray(LAYOUTS[name].nbytes(values.shape))
    if name == "tq1_0":
        for block in range(k_size * n_size // 256):
            trits = [int(v) + 1 for v in values.T.reshape(-1)[256 * block :][:256]]
            runs = [[trits[m + 32 * i] for i in range(5)] for m in range(32)]
            runs += [[trits[160 + m + 16 * i] for i in range(5)] for m in range(16)]
            runs += [[trits[240 + m + 4 * i] for i in range(4)] + [0] for m in range(4)]
            for m, run in enumerate(runs):
                number = 0
                for trit in run:
                    number = 3 * number + trit
                out[54 * block + m] = -(-number * 256 // 243)
    else:
        for n in range(n_size):
            for k in range(k_size):
                byte, bit = place(name, k, n, k_size, n_size)
                out[byte] |= (int(values[k, n]) + 1) << bit
    if name.startswith("tq"):
        size = LAYOUTS[name].block_bytes
        for block, d in enumerate(scale.reshape(-1)):
            out[size * block + size - 2 : size * block + size] = d.tobytes()
    elif scale is not None:
        out[-32:-28] = scale.tobytes()
    return np.frombuffer(bytes(out), np.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks, rows", [(1, 1), (3, 2)])
def test_numpy_is_the_formats_text(name, blocks, rows):
    spec = LAYOUTS[name]
    k = 37 * blocks if spec.k_multiple == 1 else spec.k_multiple * blocks
    values, codes, scale = random_case(name, (k, spec.n_multiple * rows))
    expected = oracle_bytes(name, values, scale)
    found = transcode.from_canonical_numpy(codes, scale, name, values.shape)
    np.testing.assert_array_equal(found, expected)
    back, back_scale = transcode.to_canonical_numpy(expected, name, values.shape)
    np.testing.assert_array_equal(back, codes)
    assert same_scale(back_scale, scale)


# --- Other programs' bytes ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
@pytest.mark.parametrize(
    "to, back",
    [("to_canonical", "from_canonical"), ("to_canonical_numpy", "from_canonical_numpy")],
)
def test_golden_gguf(name, to, back):
    golden = np.load(GOLDENS / "gguf_ternary.npz")
    shape = golden["values"].shape
    codes, scale = getattr(transcode, to)(golden[name], name, shape)
    np.testing.assert_array_equal(packing.unpack_numpy(codes, "trit2", shape[0]), golden["values"])
    assert same_scale(scale, golden["scale"])
    written = getattr(transcode, back)(codes, scale, name, shape)
    np.testing.assert_array_equal(written, golden[name].reshape(-1))


def test_golden_gguf_of_any_byte():
    golden = np.load(GOLDENS / "gguf_ternary.npz")
    codes, _ = transcode.to_canonical(golden["noise"], "tq1_0", (256, 1))
    values = packing.unpack_numpy(codes, "trit2", 256)
    np.testing.assert_array_equal(values.T, golden["noise_values"])


@pytest.mark.parametrize("name", ["x86", "arm", "rows"])
@pytest.mark.parametrize(
    "to, back",
    [("to_canonical", "from_canonical"), ("to_canonical_numpy", "from_canonical_numpy")],
)
def test_golden_i2_s_of_bitnet_cpp(name, to, back):
    golden = np.load(GOLDENS / "bitnet_i2_s.npz")
    layout, shape = f"i2_s_{name}", golden["values"].shape
    codes, scale = getattr(transcode, to)(golden[name], layout, shape)
    np.testing.assert_array_equal(packing.unpack_numpy(codes, "trit2", shape[0]), golden["values"])
    assert scale == golden["scale"]
    written = getattr(transcode, back)(codes, scale, layout, shape)
    np.testing.assert_array_equal(written, golden[name])


def test_golden_hf():
    # The example in the docstring of transformers' unpack_weights.
    packed = np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8)
    rows = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]]
    codes, scale = transcode.to_canonical(packed, "hf", (2, 8))
    assert scale is None
    np.testing.assert_array_equal(packing.unpack_numpy(codes, "trit2", 2).T, rows)
    written = transcode.from_canonical(codes, None, "hf", (2, 8))
    np.testing.assert_array_equal(written.reshape(2, 2), packed)


@pytest.mark.parametrize("name, width", [("i2_s_x86", 32), ("i2_s_arm", 16)])
def test_golden_i2_s(name, width):
    values = np.zeros((4 * width, 1), np.int8)
    values[[0, width, 2 * width + 1, 4 * width - 1], 0] = [1, -1, 1, -1]
    expected = [0b10_00_01_01, 0b01_01_10_01] + [0b01010101] * (width - 3) + [0b01_01_01_00]
    codes = packing.pack_numpy(values, "trit2")
    found = transcode.from_canonical(codes, np.float32(1.5), name, values.shape)
    assert found.tolist() == [*expected, *np.float32(1.5).tobytes(), *([0] * 28)]


# --- Round trips -------------------------------------------------------------------------


@hypothesis.settings(max_examples=60)
@hypothesis.given(cases)
def test_canonical_there_and_back(case):
    name, shape, seed = case
    _, codes, scale = random_case(name, shape, seed)
    stored = transcode.from_canonical(codes, scale, name, shape)
    assert stored.shape == (LAYOUTS[name].nbytes(shape),) and stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, transcode.from_canonical_numpy(codes, scale, name, shape))
    back, back_scale = transcode.to_canonical(stored, name, shape)
    np.testing.assert_array_equal(back, codes)
    assert same_scale(back_scale, scale)


@hypothesis.settings(max_examples=60)
@hypothesis.given(cases)
def test_foreign_there_and_back(case):
    name, shape, seed = case
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 256, LAYOUTS[name].nbytes(shape), dtype=np.uint8)
    if name == "tq1_0":  # a number under 243 has one byte; any other decodes, but is not kept
        numbers = rng.integers(0, 81, stored.size) * 3
        stored = ((numbers * 256 + 242) // 243).astype(np.uint8)
    else:
        stored &= ~(stored & stored >> 1 & 0x55)  # 3 becomes 2
    if LAYOUTS[name].tail_bytes:
        stored[-28:] = 0
    codes, scale = transcode.to_canonical(stored, name, shape)
    expected, expected_scale = transcode.to_canonical_numpy(stored, name, shape)
    np.testing.assert_array_equal(codes, expected)
    assert same_scale(scale, expected_scale)
    np.testing.assert_array_equal(transcode.from_canonical(codes, scale, name, shape), stored)


@pytest.mark.parametrize("kind", ["bytes", "memoryview", "mmap"])
def test_buffers_are_read_where_they_lie(kind, tmp_path):
    values, codes, scale = random_case("tq2_0", (256, 3))
    stored = transcode.from_canonical(codes, scale, "tq2_0", values.shape)
    path = tmp_path / "weights"
    path.write_bytes(b"odd" + stored.tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        whole = {"bytes": path.read_bytes(), "memoryview": memoryview(path.read_bytes())}
        data = memoryview(whole.get(kind, mapped))[3:]
        found, _ = transcode.to_canonical(data, "tq2_0", values.shape)
        np.testing.assert_array_equal(found, codes)
        data.release()


def test_out_is_written_in_place():
    values, codes, _ = random_case("hf", (50, 8))
    stack = np.full((3, *codes.shape), 255, np.uint8)
    stored = transcode.from_canonical(codes, None, "hf", values.shape)
    found, _ = transcode.to_canonical(stored, "hf", values.shape, out=stack[1])
    assert found.base is stack
    np.testing.assert_array_equal(stack[1], codes)
    assert (stack[[0, 2]] == 255).all()


# --- The C++ -----------------------------------------------------------------------------

needs_library = pytest.mark.skipif(not ISAS, reason="no C++ compiler")
K_TAILS = dict.fromkeys(("hf", "i2_s_rows"), [1, 15, 16, 17, 63, 64, 65, 130, 1000])


def call(name, back, source, target, scale, shape, threads, isa):
    spec = LAYOUTS[name]
    scale = None if spec.tail_bytes else scale
    return transcode._call(spec, back, source, target, scale, shape, threads, isa)


def guarded(array, offset=0):
    """A copy of `array` at an odd address between bytes that must stay as they are."""
    whole = np.full(array.nbytes + 256, 0xEE, np.uint8)
    inner = whole[64 + offset : 64 + offset + array.nbytes]
    inner[:] = array.reshape(-1).view(np.uint8)
    return whole, inner


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_every_instruction_set_is_the_numpy_definition(name, isa):
    spec = LAYOUTS[name]
    for i, k in enumerate(K_TAILS.get(name, [spec.k_multiple * i for i in (1, 2, 3, 7)])):
        for rows in (1, 2, 5, 67):
            shape = (k, spec.n_multiple * rows)
            _, codes, scale = random_case(name, shape, seed=i)
            expected = transcode.from_canonical_numpy(codes, scale, name, shape)
            whole, inner = guarded(np.zeros_like(expected), offset=i % 3)
            body = slice(None, -spec.tail_bytes if spec.tail_bytes else None)
            assert call(name, True, codes, inner, scale, shape, 1, isa) == 0
            np.testing.assert_array_equal(inner[body], expected[body], err_msg=f"{shape}")
            assert (np.delete(whole, np.arange(inner.size) + 64 + i % 3) == 0xEE).all()

            whole, inner = guarded(np.zeros_like(codes), offset=i % 3)
            found = None if scale is None or spec.tail_bytes else np.zeros_like(scale)
            assert call(name, False, expected, inner, found, shape, 1, isa) == 0
            np.testing.assert_array_equal(inner.reshape(codes.shape), codes, err_msg=f"{shape}")
            assert (np.delete(whole, np.arange(inner.size) + 64 + i % 3) == 0xEE).all()
            assert found is None or same_scale(found, scale)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_tq1_0_of_every_byte(isa):
    stored = np.zeros((256, 54), np.uint8)
    stored[:, :52] = (np.arange(256)[:, None] + np.arange(52)) % 256
    shape = (256, 256)
    expected, _ = transcode.to_canonical_numpy(stored, "tq1_0", shape)
    found, scale = np.zeros_like(expected), np.zeros((256, 1), np.float16)
    assert call("tq1_0", False, stored, found, scale, shape, 1, isa) == 0
    np.testing.assert_array_equal(found, expected)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", range(1, 9))
def test_threads_share_every_unit_once(name, threads, isa):
    shape = (2816, 852) if threads < 8 else (5120, 4096)  # the last is stored past the caches
    _, codes, scale = random_case(name, (shape[0], 4), seed=threads)
    codes = np.tile(codes, (shape[1] // 4, 1))
    codes[shape[1] // 2 :] = np.roll(codes[shape[1] // 2 :], 1, axis=0)
    if scale is not None and not LAYOUTS[name].tail_bytes:
        scale = np.tile(scale, (shape[1] // 4, 1))
    expected = transcode.from_canonical_numpy(codes, scale, name, shape)
    found = expected.copy()
    found[: -LAYOUTS[name].tail_bytes or None] = 0
    assert call(name, True, codes, found, scale, shape, threads, isa) == 0
    np.testing.assert_array_equal(found, expected)
    back = np.zeros_like(codes)
    assert call(name, False, expected, back, scale, shape, threads, isa) == 0
    np.testing.assert_array_equal(back, codes)


# --- What is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["numpy", *ISAS])
@pytest.mark.parametrize("name", TWO_BIT)
def test_every_code_3_is_counted(name, isa):
    spec = LAYOUTS[name]
    shape = (70 if spec.k_multiple == 1 else 3 * spec.k_multiple, 36)
    rng = np.random.default_rng(1)
    values, codes, scale = random_case(name, shape)
    stored = transcode.from_canonical_numpy(codes, scale, name, shape)
    for count in (1, 2, 500):
        bad, bad_rows = stored.copy(), codes.copy()
        for i in rng.choice(shape[0] * shape[1], count, replace=False):
            n, k = divmod(int(i), shape[0])
            byte, bit = place(name, k, n, *shape)
            bad[byte] |= 3 << bit
            byte, bit = packing.code_position(k, 2)
            bad_rows[n, byte] |= 3 << bit
        if isa == "numpy":
            with pytest.raises(LayoutError, match=f"code 3 {count} times"):
                transcode.to_canonical_numpy(bad, name, shape)
            with pytest.raises(LayoutError, match=f"code 3 {count} times"):
                transcode.from_canonical_numpy(bad_rows, scale, name, shape)
        else:
            assert call(name, False, bad, codes.copy(), scale, shape, 2, isa) == count
            assert call(name, True, bad_rows, stored.copy(), scale, shape, 2, isa) == count


def test_tq1_0_refuses_code_3_of_canonical_rows():
    _, codes, scale = random_case("tq1_0", (256, 2))
    codes[1, 7] |= 0b11
    for write in (transcode.from_canonical, transcode.from_canonical_numpy):
        with pytest.raises(LayoutError, match="code 3 1 times"):
            write(codes, scale, "tq1_0", (256, 2))


def refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, shape, match",
    [
        ("q8_0", (256, 4), "no layout is named 'q8_0'; there are: hf, tq1_0"),
        ("hf", (16, 6), "expected N to be a positive multiple of 4, found N = 6"),
        ("hf", (0, 4), "found K = 0"),
        ("tq1_0", (384, 4), "expected K to be a positive multiple of 256, found K = 384"),
        ("tq2_0", (8640, 1), "found K = 8640"),
        ("i2_s_x86", (8640, 1), "multiple of 128, found K = 8640"),
        ("i2_s_arm", (8640, 0), "found N = 0"),
    ],
)
def test_shapes_without_a_form_are_refused(name, shape, match):
    for read in (transcode.to_canonical, transcode.to_canonical_numpy):
        refused(match, read, b"", name, shape)
    for write in (transcode.from_canonical, transcode.from_canonical_numpy):
        refused(match, write, np.zeros((1, 1), np.uint8), None, name, shape)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_bytes_codes_and_scales_are_refused(name):
    spec = LAYOUTS[name]
    shape = (512, 8)
    _, codes, scale = random_case(name, shape)
    stored = transcode.from_canonical(codes, scale, name, shape)
    for data in (stored[:-1], np.append(stored, stored[:1]), b""):
        refused(f"expected {stored.size} bytes", transcode.to_canonical, data, name, shape)
    refused("expected contiguous", transcode.to_canonical, stored[::2], name, shape)
    refused("expected contiguous", transcode.to_canonical, memoryview(stored)[::2], name, shape)
    refused("expected contiguous uint8", transcode.to_canonical, stored.view(np.int8), name, shape)
    for out in (codes[:-1], codes.view(np.int8), np.tile(codes, 2)[:, ::2]):
        refused("out: expected", transcode.to_canonical, stored, name, shape, out=out)
    for rows in (codes[1:], codes.astype(np.int32), codes.tolist(), np.asfortranarray(codes)):
        refused("codes: expected", transcode.from_canonical, rows, scale, name, shape)
    wrong = [np.float64(1)] if spec.scale else [np.float32(1)]
    wrong += [None, np.ones((8, 3), np.float16)] if spec.scale else []
    for other in wrong:
        refused("found", transcode.from_canonical, codes, other, name, shape)
    if ISAS:
        refused("threads: ", transcode.to_canonical, stored, name, shape, threads=0)


def test_without_a_compiler_numpy_serves(monkeypatch):
    monkeypatch.setattr(transcode, "_why_not", lambda: "no C++ compiler found")
    monkeypatch.setattr(transcode, "library", lambda: ctypes.CDLL("none"))
    assert transcode.why_not() == "no C++ compiler found"
    for name in NAMES:
        values, codes, scale = random_case(name, (256, 4))
        stored = transcode.from_canonical(codes, scale, name, values.shape)
        out = np.empty_like(codes)
        found, found_scale = transcode.to_canonical(stored, name, values.shape, out=out)
        assert found is out and same_scale(found_scale, scale)
        np.testing.assert_array_equal(out, codes)
