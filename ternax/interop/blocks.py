"""Blocks of numbers as GGUF and safetensors store them, to f32 and back, in numpy.

    kind     elements   bytes of a block, in order
    Q4_0     32         f16 d; 16 bytes, codes of k (low half) and of k + 16; w = d (code - 8)
    Q8_0     32         f16 d; 32 int8; w = d code
    Q6_K     256        128 bytes of halves, 64 of quarters, 16 int8 scales, f16 d;
                        w = d scale (code - 32)

A Q6_K block is two of 128. Byte l of its 64 halves holds the low 4 bits of l and of l + 64, byte l
of its 32 quarters the high 2 bits of l, l + 32, l + 64 and l + 96; 16 neighbours share a scale.
Source: `dequantize_row_*` and `quantize_row_*_ref` of ggml-quants.c.
"""

from typing import Any

import numpy as np

from ternax.kernels.transcode import to_canonical_numpy

_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def to_floats(raw: np.ndarray, kind: str, columns: int) -> np.ndarray:
    """uint8 [bytes of whole rows] -> f32 [rows, columns]."""
    if kind in _FLOATS:
        return raw.view(_FLOATS[kind]).astype(np.float32).reshape(-1, columns)
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(-1, columns)
    if kind in ("TQ1_0", "TQ2_0"):
        return _trits(raw, kind.lower(), columns)
    return _DECODERS[kind](raw).reshape(-1, columns)


def as_stored(raw: np.ndarray, kind: str, columns: int) -> np.ndarray:
    """`to_floats`, but floats stay as they are stored, bf16 as uint16: half the bytes to move."""
    if kind == "BF16":
        return raw.view("<u2").reshape(-1, columns)
    if kind in ("F16", "F32"):
        return raw.view(_FLOATS[kind]).reshape(-1, columns)
    return to_floats(raw, kind, columns)


def from_floats(values: np.ndarray, kind: str) -> np.ndarray:
    """f32 [rows, columns] -> uint8 [bytes]. Q8_0 rounds as llama.cpp does; no Q6_K is written."""
    if kind in _FLOATS:
        return np.ascontiguousarray(values, _FLOATS[kind]).view(np.uint8).reshape(-1)
    if kind == "BF16":
        return float_bits(values).view(np.uint8).reshape(-1)
    if kind != "Q8_0":
        raise ValueError(f"nothing is written as {kind}")
    blocks = np.asarray(values, np.float32).reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, 1 / scale, 0).astype(np.float32)
    scaled = blocks * inverse
    codes = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled).astype(np.int8)
    return q8_0(codes, scale)


def float_bits(values: np.ndarray) -> np.ndarray:
    """f32 -> uint16 bits of bf16, rounding half to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def q8_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 [blocks, 32] and a scale each -> uint8 [bytes]."""
    head = scale.reshape(-1, 1).astype("<f2").view(np.uint8)
    return np.concatenate([head, codes.reshape(-1, 32).view(np.uint8)], axis=1).reshape(-1)


def q4_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 [blocks, 32] in -8 .. 7 and a scale each -> uint8 [bytes]."""
    head = scale.reshape(-1, 1).astype("<f2").view(np.uint8)
    bits = (codes.reshape(-1, 2, 16) + 8).astype(np.uint8)
    return np.concatenate([head, bits[:, 0] | bits[:, 1] << 4], axis=1).reshape(-1)


def _q4_0(raw):
    blocks = raw.reshape(-1, 18)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.int8) - 8
    return codes * _scale(blocks[:, :2])


def _q8_0(raw):
    blocks = raw.reshape(-1, 34)
    return blocks[:, 2:].view(np.int8) * _scale(blocks[:, :2])


def _q6_k(raw):
    blocks = raw.reshape(-1, 210)
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | high << 4).astype(np.int8) - 32
    scales = blocks[:, 192:208].copy().view(np.int8).astype(np.float32) * _scale(blocks[:, 208:])
    return codes.reshape(-1, 16, 16) * scales[:, :, None]


_DECODERS = {"Q4_0": _q4_0, "Q8_0": _q8_0, "Q6_K": _q6_k}


def _scale(raw):
    """Two bytes a block -> f32 [blocks, 1]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _trits(raw, layout: str, columns: int):
    rows = raw.size // (columns // 256 * {"tq1_0": 54, "tq2_0": 66}[layout])
    codes, scale = to_canonical_numpy(raw, layout, (columns, rows))
    planes = codes.reshape(rows, -1, 1, 4) >> np.array([[0], [2], [4], [6]], np.uint8)
    trits = ((planes & 3).astype(np.int8) - 1).reshape(rows, -1, 256)
    return (trits * scale.astype(np.float32)[..., None]).reshape(rows, columns)
