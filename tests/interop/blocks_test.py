"""Every kind of block equals the gguf package's, both ways."""

import gguf
import numpy as np
import pytest
from gguf import quants

from ternax.interop import blocks

KIND = gguf.GGMLQuantizationType


def weights(seed: int, rows: int = 5, columns: int = 512) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    found[1] = 0
    found[2, :256] *= 1e-3
    return found


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "TQ1_0", "TQ2_0"])
def test_reading(kind):
    raw = quants.quantize(weights(0), KIND[kind])
    expected = quants.dequantize(raw, KIND[kind])
    raw = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(blocks.to_floats(raw, kind, 512), expected)


def test_reading_q6_k():
    """No Python writes Q6_K, so any bytes do: scales of f16 that are finite."""
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (6, 420), dtype=np.uint8)
    for at in (208, 418):
        raw[:, at : at + 2] = rng.normal(size=(6, 1)).astype(np.float16).view(np.uint8)
    expected = quants.dequantize(raw, KIND.Q6_K)
    np.testing.assert_array_equal(blocks.to_floats(raw.reshape(-1), "Q6_K", 512), expected)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_writing(kind):
    values = weights(2)
    expected = np.ascontiguousarray(quants.quantize(values, KIND[kind])).view(np.uint8)
    np.testing.assert_array_equal(blocks.from_floats(values, kind), expected.reshape(-1))


def test_integers_keep_their_codes():
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.01, 1, 7).astype(np.float16)
    eight = rng.integers(-127, 128, (7, 32)).astype(np.int8)
    four = rng.integers(-8, 8, (7, 32)).astype(np.int8)
    for codes, encode, kind in ((eight, blocks.q8_0, KIND.Q8_0), (four, blocks.q4_0, KIND.Q4_0)):
        raw = encode(codes, scale)
        width = gguf.GGML_QUANT_SIZES[kind][1]
        found = quants.dequantize(raw.reshape(7, width), kind)
        np.testing.assert_array_equal(found, codes * scale.astype(np.float32)[:, None])


def test_nothing_else_is_written():
    with pytest.raises(ValueError, match="Q6_K"):
        blocks.from_floats(weights(4), "Q6_K")
