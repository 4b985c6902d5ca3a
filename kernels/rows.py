"""Rows of floats as canonical int8 codes and a scale each, at memory speed: tables being loaded."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from . import transcode
from .packing import FORMATS

INT8 = FORMATS["int8"]
# dtype of stored floats (bf16 as its bits) -> its number in kernels/cpu/transcode.cc.
KINDS: Mapping[np.dtype, int] = MappingProxyType(
    {np.dtype(np.uint16): 0, np.dtype(np.float16): 1, np.dtype(np.float32): 2}
)
# The least magnitude that a scale is made of: quant.scheme.EPS, as a test holds.
_EPS = np.float32(1e-5)


def int8_rows(rows, codes, scale, *, threads: int | None = None) -> float:
    """`quant.integer.Int8` of each row, to the bit of what XLA computes.

    Args:
      rows: [n, K], contiguous, of a dtype in KINDS; uint16 holds bf16's bits.
      codes: uint8 [n, K padded to 16], contiguous: written.
      scale: f32 [n], contiguous: written.
      threads: how many to use; None means all processors.

    Returns:
      The largest magnitude; infinity where a value is not finite, and then `codes` mean nothing.
    """
    n, k = rows.shape
    if rows.dtype not in KINDS or not rows.flags.carray:
        raise ValueError(f"rows: expected contiguous {', '.join(map(str, KINDS))}, {rows.dtype}")
    for name, array, shape, dtype in (
        ("codes", codes, (n, INT8.row_bytes(k)), np.uint8),
        ("scale", scale, (n,), np.float32),
    ):
        if array.shape != shape or array.dtype != dtype or not array.flags.carray:
            raise ValueError(
                f"{name}: expected {np.dtype(dtype)} {shape}, {array.dtype} {array.shape}"
            )
    if transcode.why_not() is not None:
        return int8_rows_numpy(rows, codes, scale)
    isa = next(iter(transcode.instruction_sets().values()))
    count = transcode.processors() if threads is None else threads
    pointers = (array.ctypes.data for array in (rows, codes, scale))
    return transcode.library().ternax_int8_rows(KINDS[rows.dtype], isa, count, *pointers, k, n)


def int8_rows_numpy(rows, codes, scale) -> float:
    """The definition of `int8_rows`. Both quotients are products with a rounded inverse, as XLA
    has them."""
    values = rows.astype(np.float32)
    if rows.dtype == np.uint16:
        values = (rows.astype(np.uint32) << 16).view(np.float32)
    if not np.isfinite(values).all():
        return float("inf")
    top = np.abs(values).max(axis=1)
    scale[...] = np.maximum(top, _EPS) * np.float32(1 / INT8.high)
    inverse = (np.float32(1) / scale)[:, None]
    codes[...] = INT8.offset
    codes[:, : rows.shape[1]] = (np.rint(values * inverse) + INT8.offset).astype(np.uint8)
    return float(top.max())
