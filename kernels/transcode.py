"""Packed ternary weights of other programs, to and from the canonical layout, at memory speed.

W is [K, N]; every layout stores N rows of K codes (value + 1), four codes a byte or five digits
a byte. Code 3 is invalid everywhere. Bits are numbered from the low end of a byte:

    layout     K of    bytes of the matrix      byte, bits              holds code
    hf         1       N/4 * K                  [r, c]      2q          row q N/4 + r, k = c
    tq2_0      256     N * K/256 * 66           m + 32 g    2l          k = 128 g + 32 l + m
    tq1_0      256     N * K/256 * 54           see below
    i2_s_x86   128     N * K/4 + 32             m           6 - 2l      k = 32 l + m
    i2_s_arm   64      N * K/4 + 32             m           6 - 2l      k = 16 l + m
    i2_s_rows  1       N/4 * K + 32             [r, c]      6 - 2q      row 4 r + q, k = c

"K of" is what K must be a multiple of, and so the codes in a block; m counts bytes. hf and
i2_s_rows want N to be a multiple of 4. A block of tq2_0 ends in an f16 scale. i2_s has one f32
scale after all codes, then 28 bytes of no meaning, here zeros; its layout depends on the machine
and the build that wrote the file, which no file says, and each reads as valid codes.

A block of tq1_0 is 32 bytes of digits k = 32 n + m, 16 bytes of k = 160 + 16 n + m, 4 bytes of
k = 240 + 4 n + m, and an f16 scale. A byte holds the digits n = 0 .. 4 (0 .. 3 in the last 4) of
the number 81 d0 + 27 d1 + 9 d2 + 3 d3 + d4 as ceil(number * 256 / 243), so that digit n is
(byte * 3^n mod 256) * 3 >> 8; any byte decodes to digits 0, 1, 2.

Sources: `pack_weights` in transformers' integrations/bitnet.py; `dequantize_row_tq1_0` and `_tq2_0`
in llama.cpp's ggml-quants.c; `quantize_i2_s` in BitNet's src/ggml-bitnet-mad.cpp: i2_s_rows is what
it writes on x86 without ACT_PARALLEL, which its include/gemm-config.h sets.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .cpu import build
from .cpu.backend import threads as processors
from .packing import FORMATS

TRIT = FORMATS["trit2"]
_INVALID = 3
_SOURCES = ("transcode.cc", "transcode.h", "transcode_isa.h", "rows.h")
# A product and a sum are two roundings, as everywhere else.
_FLAGS = ("-ffp-contract=off",)
_SHIFTS = np.array([[0], [2], [4], [6]], np.uint8)
_POWERS = np.array([[1], [3], [9], [27], [81]], np.uint8)
_TQ1_PARTS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))  # first byte, last byte, digits a byte


class LayoutError(ValueError):
    """Bytes, codes or a shape that a layout does not admit; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a layout admits and how long it is.

    Attributes:
      index: its number in kernels/cpu/transcode.cc.
      k_multiple, n_multiple: what K and N must be multiples of.
      block_bytes: bytes of `k_multiple` codes of `n_multiple` rows, scale included.
      tail_bytes: bytes after all codes.
      scale: the dtype of its scale, or None when it stores none.
    """

    index: int
    k_multiple: int
    n_multiple: int
    block_bytes: int
    tail_bytes: int = 0
    scale: str | None = None

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix of `shape` (K, N)."""
        k, n = shape
        blocks = (k // self.k_multiple) * (n // self.n_multiple)
        return blocks * self.block_bytes + self.tail_bytes

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the scale: a scalar in the tail, or one for each block of a row."""
        return () if self.tail_bytes else (shape[1], shape[0] // self.k_multiple)


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "hf": Layout(0, 1, 4, 1),
        "tq1_0": Layout(1, 256, 1, 54, scale="<f2"),
        "tq2_0": Layout(2, 256, 1, 66, scale="<f2"),
        "i2_s_x86": Layout(3, 128, 1, 32, 32, "<f4"),
        "i2_s_arm": Layout(4, 64, 1, 16, 32, "<f4"),
        "i2_s_rows": Layout(5, 1, 4, 1, 32, "<f4"),
    }
)


def to_canonical(data, layout, shape, *, out=None, threads=None):
    """Foreign bytes as canonical trit2 codes, read once.

    Args:
      data: the matrix as stored: uint8 array of any shape, bytes, or a memory map, contiguous.
      layout: a key of LAYOUTS.
      shape: (K, N) of W.
      out: uint8 [N, bytes] to write to, contiguous, such as one layer of a stack; None makes one.
        After an error its content is undefined.
      threads: how many to use; None means all processors.

    Returns:
      (codes uint8 [N, ceil(K / 16) * 4], scale): scale is None for hf, which keeps it elsewhere;
      f16 [N, K / 256] for tq1_0 and tq2_0; f32 [] for the i2_s layouts.

    Raises:
      LayoutError: unknown layout, K or N it does not admit, another number of bytes, or a code 3.
    """
    spec = _spec(layout, shape)
    raw = _bytes(data, spec.nbytes(shape), layout, shape)
    k, n = shape
    want = (n, TRIT.row_bytes(k))
    if out is None:
        out = np.empty(want, np.uint8)
    elif out.shape != want or out.dtype != np.uint8 or not out.flags.carray:
        raise LayoutError(f"out: expected writable contiguous uint8 {want}, found {_found(out)}")
    scale = None
    if spec.tail_bytes:
        scale = raw[-spec.tail_bytes :][:4].view(spec.scale)[0].copy()
    elif spec.scale:
        scale = np.empty(spec.scale_shape(shape), spec.scale)
    if _why_not() is None:
        invalid = _call(
            spec, False, raw, out, scale if not spec.tail_bytes else None, shape, threads
        )
    else:
        out[...], scale, invalid = _decode(raw, layout, shape)
    _refuse(invalid, layout, shape)
    return out, scale


def from_canonical(codes, scale, layout, shape, *, threads=None):
    """Canonical trit2 codes as another layout's bytes, the inverse of `to_canonical`.

    Args:
      codes: uint8 [N, ceil(K / 16) * 4], contiguous. Padding is not stored.
      scale: what `to_canonical` returns for this layout, same shape and dtype; stored as it is.
      layout: a key of LAYOUTS.
      shape: (K, N) of W.
      threads: how many to use; None means all processors.

    Returns:
      uint8 [bytes of the layout].

    Raises:
      LayoutError: unknown layout, K or N it does not admit, codes or a scale of another shape or
        dtype, or a code 3, padding included.
    """
    spec = _spec(layout, shape)
    _check_codes(codes, scale, spec, layout, shape)
    if _why_not() is not None:
        return from_canonical_numpy(codes, scale, layout, shape)
    out = np.empty(spec.nbytes(shape), np.uint8)
    if spec.tail_bytes:
        out[-spec.tail_bytes :] = _tail(scale, spec)
        scale = None
    elif scale is not None:
        scale = np.ascontiguousarray(scale)
    _refuse(_call(spec, True, codes, out, scale, shape, threads), layout, shape)
    return out


def why_not() -> str | None:
    """None where the C++ transcodes; else one line on why numpy does, tens of times slower."""
    return _why_not()


# --- The definition ----------------------------------------------------------------------


def to_canonical_numpy(data, layout, shape):
    """The definition of `to_canonical`. Needs 6 bytes for each code while it runs."""
    spec = _spec(layout, shape)
    raw = _bytes(data, spec.nbytes(shape), layout, shape)
    rows, scale, invalid = _decode(raw, layout, shape)
    _refuse(invalid, layout, shape)
    return rows, scale


def from_canonical_numpy(codes, scale, layout, shape):
    """The definition of `from_canonical`."""
    spec = _spec(layout, shape)
    _check_codes(codes, scale, spec, layout, shape)
    k, n = shape
    every = ((codes.reshape(n, -1, 1, 4) >> _SHIFTS) & 3).reshape(n, -1)
    _refuse(int((every == _INVALID).sum()), layout, shape)
    every = every[:, :k]
    if layout == "hf":
        quarters = every.reshape(4, n // 4, k) << _SHIFTS[:, :, None]
        return np.bitwise_or.reduce(quarters, axis=0).reshape(-1)
    if layout == "tq1_0":
        blocks = every.reshape(-1, 256)
        parts, at = [], 0
        for first, last, digits in _TQ1_PARTS:
            width = (last - first) * digits
            part = blocks[:, at : at + width].reshape(-1, digits, last - first).astype(np.uint32)
            number = (part * _POWERS[::-1][:digits]).sum(1)
            parts.append(((number * 256 + 242) // 243).astype(np.uint8))
            at += width
        return np.concatenate([*parts, _scale_bytes(scale)], axis=1).reshape(-1)
    if layout == "tq2_0":
        groups = every.reshape(-1, 2, 4, 32) << _SHIFTS
        packed = np.bitwise_or.reduce(groups, axis=2).reshape(-1, 64)
        return np.concatenate([packed, _scale_bytes(scale)], axis=1).reshape(-1)
    width = k if layout == "i2_s_rows" else spec.k_multiple // 4
    blocks = every.reshape(-1, 4, width) << _SHIFTS[::-1]
    return np.concatenate([np.bitwise_or.reduce(blocks, axis=1).reshape(-1), _tail(scale, spec)])


def _decode(raw, layout, shape):
    """(canonical rows, scale, how many codes 3) of the bytes of a layout."""
    spec, (k, n) = LAYOUTS[layout], shape
    scale = None
    if layout == "hf":
        every = (raw.reshape(1, n // 4, k) >> _SHIFTS[:, :, None]) & 3
    elif spec.tail_bytes:
        scale = raw[-spec.tail_bytes :][:4].view(spec.scale)[0].copy()
        width = k if layout == "i2_s_rows" else spec.block_bytes
        blocks = raw[: -spec.tail_bytes].reshape(-1, 1, width)
        every = (blocks >> _SHIFTS[::-1]) & 3
    else:
        blocks = raw.reshape(-1, spec.block_bytes)
        scale = blocks[:, -2:].copy().view(spec.scale).reshape(spec.scale_shape(shape))
        if layout == "tq2_0":
            every = (blocks[:, :64].reshape(-1, 2, 1, 32) >> _SHIFTS) & 3
        else:
            shifted = [
                (blocks[:, None, first:last] * _POWERS[:digits]).reshape(len(blocks), -1)
                for first, last, digits in _TQ1_PARTS
            ]
            every = (np.concatenate(shifted, axis=1).astype(np.uint16) * 3 >> 8).astype(np.uint8)
    every = every.reshape(n, k)
    invalid = int((every == _INVALID).sum())
    every = np.pad(every, ((0, 0), (0, -k % 16)), constant_values=TRIT.offset)
    # The fields of a byte occupy disjoint bits, so their union is the byte.
    rows = np.bitwise_or.reduce(every.reshape(n, -1, 4, 4) << _SHIFTS, axis=2)
    return rows.reshape(n, TRIT.row_bytes(k)), scale, invalid


def _scale_bytes(scale):
    return np.ascontiguousarray(scale).reshape(-1, 1).view(np.uint8)


def _tail(scale, spec):
    tail = np.zeros(spec.tail_bytes, np.uint8)
    tail[:4] = np.asarray(scale, spec.scale).reshape(1).view(np.uint8)
    return tail


# --- What is refused ---------------------------------------------------------------------


def _spec(layout, shape) -> Layout:
    if layout not in LAYOUTS:
        raise LayoutError(f"no layout is named {layout!r}; there are: {', '.join(LAYOUTS)}")
    spec, (k, n) = LAYOUTS[layout], shape
    for name, size, multiple in (("K", k, spec.k_multiple), ("N", n, spec.n_multiple)):
        if size < 1 or size % multiple:
            raise LayoutError(
                f"{layout}: expected {name} to be a positive multiple of {multiple}, found "
                f"{name} = {size}; such a matrix has no {layout} form: choose another layout"
            )
    return spec


def _found(value) -> str:
    array = np.asarray(value)
    gaps = "" if array.flags.c_contiguous else ", with gaps"
    return f"{array.dtype} {array.shape}{gaps}"


def _bytes(data, count, layout, shape):
    """`data` as uint8 [count], without a copy."""
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or not data.flags.c_contiguous:
            raise LayoutError(f"{layout}: expected contiguous uint8, found {_found(data)}: copy it")
        raw = data.reshape(-1)
    else:
        view = memoryview(data)
        if not view.c_contiguous:
            raise LayoutError(f"{layout}: expected contiguous bytes, found gaps: copy them")
        raw = np.frombuffer(view, np.uint8)
    if raw.size != count:
        raise LayoutError(
            f"{layout}: expected {count} bytes for K, N = {shape[0]}, {shape[1]}, found "
            f"{raw.size}; the tensor is cut short, or of another layout or shape"
        )
    return raw


def _check_codes(codes, scale, spec, layout, shape):
    want = (shape[1], TRIT.row_bytes(shape[0]))
    good = isinstance(codes, np.ndarray) and codes.shape == want and codes.dtype == np.uint8
    if not good or not codes.flags.c_contiguous:
        raise LayoutError(
            f"codes: expected contiguous uint8 {want}, found {_found(codes)}; pass one layer and "
            "plane of Packed.data as a numpy array"
        )
    if spec.scale is None:
        if scale is not None:
            raise LayoutError(f"{layout} stores no scale: expected None, found {_found(scale)}")
        return
    want_scale, dtype = spec.scale_shape(shape), np.dtype(spec.scale)
    array = np.asarray(scale)
    if array.shape != want_scale or array.dtype != dtype:
        raise LayoutError(
            f"{layout}: expected a scale of {dtype} {want_scale}, found {_found(scale)}: convert it"
        )


def _refuse(invalid, layout, shape):
    if invalid:
        raise LayoutError(
            f"{layout}: expected codes 0, 1, 2, found code 3 {invalid} times among "
            f"{shape[0] * shape[1]}; the bytes are damaged or of another layout"
        )


# --- The C++ -----------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL:
    """The built library, loaded. Raises BuildError."""
    try:
        loaded = ctypes.CDLL(str(build.build(_FLAGS, _SOURCES, "the transcoder")))
    except OSError as error:
        raise build.BuildError(f"cannot load the built library: {error}") from error
    return declare(loaded)


def declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Gives the functions of kernels/cpu/transcode.cc their types."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.ternax_transcode_isa_name.restype = ctypes.c_char_p
    loaded.ternax_transcode.restype = size
    loaded.ternax_transcode.argtypes = [number] * 4 + [pointer] * 3 + [size] * 2
    loaded.ternax_int8_rows.restype = ctypes.c_float
    loaded.ternax_int8_rows.argtypes = [number] * 3 + [pointer] * 3 + [size] * 2
    return loaded


@functools.cache
def _why_not() -> str | None:
    try:
        instruction_sets()
    except build.BuildError as error:
        return str(error)
    return None


@functools.cache
def instruction_sets() -> dict[str, int]:
    """Name -> index of the instruction sets this CPU can run, fastest first. Raises BuildError."""
    loaded, found, index = library(), {}, 0
    while (name := loaded.ternax_transcode_isa_name(index)) is not None:
        if loaded.ternax_transcode_isa_supported(index):
            found[name.decode()] = index
        index += 1
    return found


def _call(spec, back, source, target, scale, shape, threads, isa=None) -> int:
    """How many codes 3 `source` holds; all of it has become `target`. ctypes drops the GIL."""
    index = next(iter(instruction_sets().values())) if isa is None else instruction_sets()[isa]
    count = processors() if threads is None else threads
    if count < 1:
        raise LayoutError(f"threads: expected at least 1, found {threads}")
    return library().ternax_transcode(
        spec.index,
        back,
        index,
        count,
        source.ctypes.data,
        target.ctypes.data,
        None if scale is None else scale.ctypes.data,
        *shape,
    )
