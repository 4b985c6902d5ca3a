"""Noise on packed words: 32 bits at a time, in any number of rows, at the speed of hashing.

A row of codes is W words; a word holds 16 trits, and `lane` numbers their places from the low
bits up. Every draw hashes (key, row, word, lane), so that rows may be struck in any order, split
over chunks or devices, fused with other matrices or not.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ternax.counter_hash import GOLDEN, below, lane_draw, mix
from ternax.kernels.packing import BLOCK, FLOAT_FORMATS, FORMATS, Packed, real_bits
from ternax.noise.model import NoiseModel

# What a draw decides: two of one place must not be the same bits.
WHERE, WHAT, COIN, ROWS = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How the rows of one matrix are stored.

    Attributes:
      format: a key of FORMATS or FLOAT_FORMATS.
      k_size: codes of a row.
    """

    format: str
    k_size: int

    @property
    def lane_bits(self) -> int:
        """Bits of one value."""
        if self.format in FORMATS:
            return FORMATS[self.format].bits
        return 8 * jnp.dtype(FLOAT_FORMATS[self.format]).itemsize

    @property
    def row_bytes(self) -> int:
        if self.format in FORMATS:
            return FORMATS[self.format].row_bytes(self.k_size)
        return -(-self.k_size * self.lane_bits // 32) * 4

    @property
    def words(self) -> int:
        """Words of a row."""
        return self.row_bytes // 4

    def real(self) -> np.ndarray:
        """uint32 [W]: ones at bits of values, zeros at padding."""
        if self.format in FORMATS:
            return real_bits(self.k_size, self.format).view(np.uint32)
        bits = np.zeros(self.row_bytes, np.uint8)
        bits[: self.k_size * self.lane_bits // 8] = 255
        return bits.view(np.uint32)

    def to_words(self, rows: jax.Array) -> jax.Array:
        """Stored rows [R, ...] as uint32 [R, W]."""
        if self.format in FLOAT_FORMATS:
            rows = _bytes_of(rows)
            rows = jnp.pad(rows, ((0, 0), (0, self.row_bytes - rows.shape[1])))
        return lax.bitcast_convert_type(rows.reshape(len(rows), self.words, 4), jnp.uint32)

    def from_words(self, words: jax.Array) -> jax.Array:
        """Inverse of `to_words`."""
        rows = lax.bitcast_convert_type(words, jnp.uint8).reshape(len(words), -1)
        if self.format in FORMATS:
            return rows
        dtype = FLOAT_FORMATS[self.format]
        size = jnp.dtype(dtype).itemsize
        rows = rows[:, : self.k_size * size].reshape(len(words), self.k_size, size)
        return lax.bitcast_convert_type(rows, dtype)


def _bytes_of(rows: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(rows, jnp.uint8).reshape(len(rows), -1)


def key_words(key: jax.Array) -> jax.Array:
    """uint32 [2] of a key, old style or new."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return key.reshape(-1)[-2:].astype(jnp.uint32)


def draws(key: jax.Array, index: jax.Array, lane, purpose: int) -> jax.Array:
    """uint32 draws of the places (index, lane). key: uint32 [2]; index: uint32 [...]."""
    salt = jnp.uint32((GOLDEN * purpose) & 0xFFFFFFFF)
    return lane_draw(mix(index + mix(key[0] ^ salt)), key[1] + salt, lane)


def bit_flips(key: jax.Array, index: jax.Array, bits: int, rate) -> jax.Array:
    """uint32, in whose `bits` low bits each is set at the rate. key: uint32 [2]."""
    flips = jnp.zeros(index.shape, jnp.uint32)
    for bit in range(bits):
        hit = below(draws(key, index, bit, WHERE), rate)
        flips |= jnp.where(hit, jnp.uint32(1 << bit), jnp.uint32(0))
    return flips


def lane_swap(lane):
    """Lane of a trit within its word <-> its k within the block of 16: 4x4, transposed."""
    return lane % 4 * 4 + lane // 4


def differing(old: jax.Array, new: jax.Array, lane_bits: int) -> jax.Array:
    """int32 []: lanes of `lane_bits` bits in which two arrays of words differ."""
    x = old ^ new
    ones = 0
    for shift in range(0, 32, lane_bits):
        ones |= 1 << shift
    step = 1
    while step < lane_bits:
        x |= x >> step
        step *= 2
    return jnp.sum(lax.population_count(x & jnp.uint32(ones)).astype(jnp.int32))


class WordNoise(NoiseModel):
    """A noise that packed words can be struck with, without being unpacked."""

    def strike(self, key, words, rows, matrix: Matrix, strength, statistic) -> jax.Array:
        """The noisy words; padding may come out as anything.

        Args:
          key: uint32 [2].
          words: uint32 [R, W].
          rows: uint32 [R, 1], which rows of the matrix they are; planes count on.
          strength: f32 [], may be traced.
          statistic: f32 [], what `statistic` names, or None.
        """
        raise NotImplementedError

    def struck(self, key, words, rows, matrix: Matrix, strength, statistic) -> jax.Array:
        """`strike` with padding as it was."""
        noisy = self.strike(key, words, rows, matrix, strength, statistic)
        real = matrix.real()
        if (real == 0xFFFFFFFF).all():
            return noisy
        return (noisy & real) | (words & ~real)

    def apply_packed(self, key, packed: Packed, strength):
        """A Packed of any leading axes -> (Packed, int32 [] values that differ)."""
        matrix = Matrix(packed.format, packed.shape[0])
        data = packed.data
        old = matrix.to_words(data.reshape(-1, data.shape[-1]))
        rows = jnp.arange(len(old), dtype=jnp.uint32)[:, None]
        known = measure(self.statistic, old, matrix)
        if known is not None:
            known = concluded(self.statistic, known, len(old) * matrix.k_size)
        new = self.struck(key_words(key), old, rows, matrix, strength, known)
        noisy = dataclasses.replace(packed, data=matrix.from_words(new).reshape(data.shape))
        return noisy, differing(old, new, matrix.lane_bits)


def measure(statistic: str | None, words: jax.Array, matrix: Matrix):
    """Of rows of a matrix: int32 [] trits not 0 for "density", f32 [] |value| for "peak", or None.

    Counts of parts add up and peaks' largest is the whole's; `concluded` makes them a statistic.
    """
    if statistic == "density" and matrix.format == "trit2":
        real = matrix.real()
        return differing(words & real, jnp.uint32(0x55555555) & real, 2)
    if statistic == "peak" and matrix.format in FLOAT_FORMATS:
        return jnp.max(jnp.abs(jnp.stack(float_lanes(words, matrix))))
    return None


def concluded(statistic: str | None, found, count: int):
    """f32 []: the statistic of a matrix of `count` values, from what `measure` found of it."""
    return found.astype(jnp.float32) / count if statistic == "density" else found


def float_lanes(words: jax.Array, matrix: Matrix) -> list[jax.Array]:
    """The floats of words as f32, lane by lane."""
    if matrix.lane_bits == 32:
        return [lax.bitcast_convert_type(words, jnp.float32)]
    return [
        lax.bitcast_convert_type(bits, jnp.float32)
        for bits in (words << 16, words & jnp.uint32(0xFFFF0000))
    ]


def words_of(k_size: int) -> int:
    """Words of a row of trits."""
    return -(-k_size // BLOCK)
