"""The canonical packed layout: the one contract between quantizers and kernels.

A weight matrix W [K, N] of small integers is stored as N rows of bytes. A value v
becomes the unsigned code `v + offset`; codes take `bits` bits each:

    format   bits   offset   codes
    trit2    2      1        0, 1, 2 = -1, 0, +1; 3 is invalid
    int4     4      8        1 .. 15 = -7 .. +7
    int8     8      128      1 .. 255 = -127 .. +127

Along K a row is cut into blocks of 16 codes, `2 * bits` bytes each. In block j,
byte b holds, at bit `bits * p`, the code of

    k = 16 j + 2 bits p + b          p = 0 .. 8 / bits - 1,   b = 0 .. 2 bits - 1

so the codes at one bit position of consecutive bytes are runs of consecutive k.
The float formats bf16 and f32 store W's rows as they are, for what is not quantized.
For trit2, byte b (0..3) of block j holds k = 16j + 4p + b at bits 2p:

    byte 4j+0   [ k=16j+12 | 16j+8 | 16j+4 | 16j+0 ]      high bits left
    byte 4j+1   [ k=16j+13 | 16j+9 | 16j+5 | 16j+1 ]
    ...

K is padded to a multiple of 16 with the code of 0; a matrix may be split at any
multiple of 16 along K and anywhere along N. Kernels that want another order repack
from this one; saved files and bit-level noise use these bytes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

LAYOUT_VERSION = 1
# Float activations travel as balanced int8 digits of this base, see ternary_matmul.to_digits.
DIGIT_BASE = 128
NUM_DIGITS = 3
CANONICAL = "canonical"
BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Format:
    """How one value becomes bits. `low` and `high` bound what a quantizer may emit."""

    bits: int
    offset: int
    low: int
    high: int

    @property
    def planes(self) -> int:
        """Codes in one byte: the number of bit positions p."""
        return 8 // self.bits

    def row_bytes(self, k: int) -> int:
        """Bytes of one row of `k` codes, padding included."""
        return math.ceil(k / BLOCK) * 2 * self.bits


# What stores a float format. bf16 is kept as its bits: XLA:CPU (jax 0.10) turns every
# update of a bf16 array into a round trip of the whole array through f32.
FLOAT_FORMATS = {"bf16": jnp.uint16, "f32": jnp.float32}
FORMATS = {
    "trit2": Format(bits=2, offset=1, low=-1, high=1),
    "int4": Format(bits=4, offset=8, low=-7, high=7),
    "int8": Format(bits=8, offset=128, low=-127, high=127),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized weight as kernels read it: W = sum over planes of scale * (v + zero).

    Attributes:
      data: uint8 [..., P, N, row_bytes], or [..., 1, N, K] of a float format; the
        leading axes are empty or one stack of layers, P counts trit planes (1 for all
        but trit-plane schemes).
      scale: f32 [..., P, G, 1 or N]; G groups of K / G along K.
      zero: f32 like `scale`, added to the value before scaling, or None.
      format: a key of FORMATS or of FLOAT_FORMATS (then `scale` is 1 and not read).
      layout: CANONICAL, or the tag of one kernel's own order.
      shape: (K, N) of the matrix, without padding.
      parts: (name, width) of each matrix fused along N, in order; widths sum to N.
    """

    data: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    format: str = dataclasses.field(default="trit2", metadata=dict(static=True))
    layout: str = dataclasses.field(default=CANONICAL, metadata=dict(static=True))
    shape: tuple[int, int] = dataclasses.field(default=(0, 0), metadata=dict(static=True))
    parts: tuple[tuple[str, int], ...] = dataclasses.field(default=(), metadata=dict(static=True))

    @property
    def groups(self) -> int:
        return self.scale.shape[-2]

    @property
    def num_planes(self) -> int:
        return self.data.shape[-3]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves; also right for abstract arrays and past 2^31."""
        leaves = [self.data, self.scale] + ([] if self.zero is None else [self.zero])
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def code_position(k: int, bits: int) -> tuple[int, int]:
    """(byte within a row, bit within that byte) of code k: the layout in one formula."""
    j, r = divmod(k, BLOCK)
    p, b = divmod(r, 2 * bits)
    return 2 * bits * j + b, bits * p


def real_bits(k_size: int, format: str) -> np.ndarray:
    """uint8 [row_bytes]: ones where a row's bits belong to one of its K codes, not to padding."""
    fmt = FORMATS[format]
    real = np.zeros(fmt.row_bytes(k_size), np.uint8)
    for k in range(k_size):
        byte, bit = code_position(k, fmt.bits)
        real[byte] |= (2**fmt.bits - 1) << bit
    return real


def pack_numpy(values: np.ndarray, format: str) -> np.ndarray:
    """The definition. values: int8 [..., K, N] -> uint8 [..., N, row_bytes]."""
    fmt = FORMATS[format]
    k_size, n = values.shape[-2:]
    padded = math.ceil(k_size / BLOCK) * BLOCK
    rows = np.zeros((*values.shape[:-2], n, fmt.row_bytes(k_size)), np.uint8)
    for k in range(padded):
        byte, bit = code_position(k, fmt.bits)
        code = values[..., k, :].astype(np.int16) + fmt.offset if k < k_size else fmt.offset
        rows[..., byte] |= np.asarray(code << bit).astype(np.uint8)
    return rows


def unpack_numpy(rows: np.ndarray, format: str, k_size: int) -> np.ndarray:
    """Inverse of `pack_numpy`: uint8 [..., N, row_bytes] -> int8 [..., K, N]; code 3 reads +2."""
    fmt = FORMATS[format]
    values = np.empty((*rows.shape[:-2], k_size, rows.shape[-2]), np.int8)
    for k in range(k_size):
        byte, bit = code_position(k, fmt.bits)
        codes = (rows[..., byte] >> bit) & (2**fmt.bits - 1)
        values[..., k, :] = codes.astype(np.int16) - fmt.offset
    return values


def pack(values: jax.Array, format: str) -> jax.Array:
    """`pack_numpy` in jnp. values: int8 [..., K, N] -> uint8 [..., N, row_bytes]."""
    fmt = FORMATS[format]
    *lead, k_size, n = values.shape
    pad = -k_size % BLOCK
    codes = (values.astype(jnp.int16) + fmt.offset).astype(jnp.uint8)
    codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, pad), (0, 0)], constant_values=fmt.offset)
    codes = jnp.swapaxes(codes, -1, -2).reshape(*lead, n, -1, fmt.planes, 2 * fmt.bits)
    shifts = (fmt.bits * jnp.arange(fmt.planes, dtype=jnp.uint8))[:, None]
    # The planes of a byte occupy disjoint bits, so their sum is their union.
    return (codes << shifts).sum(-2, dtype=jnp.uint8).reshape(*lead, n, fmt.row_bytes(k_size))


def unpack(rows: jax.Array, format: str, k_size: int) -> jax.Array:
    """`unpack_numpy` in jnp. rows: uint8 [..., N, row_bytes] -> int8 [..., K, N]."""
    fmt = FORMATS[format]
    *lead, n, _ = rows.shape
    blocks = rows.reshape(*lead, n, -1, 1, 2 * fmt.bits)
    shifts = (fmt.bits * jnp.arange(fmt.planes, dtype=jnp.uint8))[:, None]
    codes = (blocks >> shifts) & (2**fmt.bits - 1)
    values = (codes.astype(jnp.int16) - fmt.offset).astype(jnp.int8)
    return jnp.swapaxes(values.reshape(*lead, n, -1)[..., :k_size], -1, -2)


def plane_order(x: jax.Array, format: str) -> jax.Array:
    """Reorders activations to match whole bit planes. x: [..., K] -> [planes, ..., K / planes].

    K must be a multiple of 16. Entry i of plane p is the activation of the code at
    bit `bits * p` of byte i of a row, so a kernel masks bytes and never moves codes.
    """
    fmt = FORMATS[format]
    *lead, k_size = x.shape
    blocks = x.reshape(*lead, k_size // BLOCK, fmt.planes, 2 * fmt.bits)
    return jnp.moveaxis(blocks, -2, 0).reshape(fmt.planes, *lead, k_size // fmt.planes)


def float_to_bits(values: jax.Array, format: str) -> jax.Array:
    """Floats as a float format stores them: uint16 bits for "bf16", f32 for "f32"."""
    if format == "bf16":
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(jnp.float32)


def bits_to_float(data: jax.Array) -> jax.Array:
    """Inverse of `float_to_bits`, as f32; the dtype tells which format it was."""
    if data.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(data.astype(jnp.uint32) << 16, jnp.float32)
    return data.astype(jnp.float32)


def unpack_rows(w: Packed, index: jax.Array) -> jax.Array:
    """Rows of an unstacked, one-plane W, dequantized. index: int32 [...] -> f32 [..., K]."""
    rows = w.data[0, index]
    if w.format in FLOAT_FORMATS:
        return bits_to_float(rows)
    k_size = w.shape[0]
    values = unpack(rows[..., None, :], w.format, k_size)[..., 0].astype(jnp.float32)

    def columns(leaf):
        """[..., K]: each group's entry of the row, repeated over the group."""
        picked = leaf[0][:, index] if leaf.shape[-1] > 1 else leaf[0][:, jnp.zeros_like(index)]
        return jnp.repeat(jnp.moveaxis(picked, 0, -1), k_size // w.groups, axis=-1)

    return (values if w.zero is None else values + columns(w.zero)) * columns(w.scale)


def has_invalid_codes(data: jax.Array, format: str) -> jax.Array:
    """bool []: whether any byte holds a code no quantizer emits (trit2: 3; int4, int8: 0)."""
    fmt = FORMATS[format]
    invalid = 3 if format == "trit2" else 0
    bad = jnp.bool_(False)
    for p in range(fmt.planes):
        bad |= (((data >> (fmt.bits * p)) & (2**fmt.bits - 1)) == invalid).any()
    return bad
