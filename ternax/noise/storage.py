"""Trits as other programs store them, in words: the same faults, other damage.

Independent errors hurt every 2-bit layout alike, but bursts strike neighbours, and which trits
are neighbours is the layout's choice. tq1_0 holds five base-3 digits in a byte, so one flipped
bit changes up to five trits and there is no invalid code. `kernels.transcode` defines the layouts;
here they are formulas on arrays, of codes alone, without the scales between them. K is padded to
whole blocks with the code of 0.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ternax.kernels.packing import FLOAT_FORMATS, FORMATS

CANONICAL = "canonical"
# Codes of a block, and the low bit of its first code: 4 codes a byte, a quarter block apart.
_TWO_BIT = {"tq2_0": (128, 0), "i2_s_x86": (128, 6), "i2_s_arm": (64, 6)}
BASE3 = "tq1_0"
HALF = "f16"  # of weights that are f32 here
STORAGES = (CANONICAL, *_TWO_BIT, BASE3)
_DIGITS = ((0, 160, 5), (160, 240, 5), (240, 256, 4))  # first k, last k, digits a byte
_POWERS = (81, 27, 9, 3, 1)
# What a value takes; 256 digits in 52 bytes.
_BITS = {BASE3: 8 * 52 / 256, HALF: 16}


def bits_of(storage: str, format: str) -> float:
    """Bits of a value. format: a key of FORMATS or FLOAT_FORMATS, how it lies here."""
    if storage in _BITS:
        return _BITS[storage]
    if format in FORMATS:
        return FORMATS[format].bits
    return 8 * jnp.dtype(FLOAT_FORMATS[format]).itemsize


def to_bytes(codes: jax.Array, storage: str) -> jax.Array:
    """uint8 [R, K] of codes 0, 1, 2 -> uint8 [R, B], B a multiple of 4."""
    block = 256 if storage == BASE3 else _TWO_BIT[storage][0]
    rows, k_size = codes.shape
    codes = jnp.pad(codes, ((0, 0), (0, -k_size % block)), constant_values=1)
    blocks = codes.reshape(rows, -1, block).astype(jnp.uint32)
    if storage == BASE3:
        parts = [_base3(blocks[..., first:last], digits) for first, last, digits in _DIGITS]
        found = jnp.concatenate(parts, axis=-1)
    else:
        quarters = blocks.reshape(rows, -1, 4, block // 4)
        found = (quarters << _shifts(storage)).sum(axis=2)
    return found.astype(jnp.uint8).reshape(rows, -1)


def from_bytes(data: jax.Array, storage: str, k_size: int) -> jax.Array:
    """Inverse of `to_bytes`: uint8 [R, K], codes 0 .. 3, of which base 3 has no 3."""
    rows = data.shape[0]
    if storage == BASE3:
        blocks = data.reshape(rows, -1, 52).astype(jnp.uint32)
        parts, first = [], 0
        for low, high, digits in _DIGITS:
            count = (high - low) // digits
            parts.append(_from_base3(blocks[..., first : first + count], digits))
            first += count
        codes = jnp.concatenate(parts, axis=-1)
    else:
        quarter = _TWO_BIT[storage][0] // 4
        blocks = data.reshape(rows, -1, 1, quarter).astype(jnp.uint32)
        codes = (blocks >> _shifts(storage)) & 3
    return codes.astype(jnp.uint8).reshape(rows, -1)[:, :k_size]


def to_halves(values: jax.Array) -> jax.Array:
    """uint32 [R, W] of f32 [R, K]: two float16 a word, W the half of K."""
    halves = lax.bitcast_convert_type(values.astype(jnp.float16), jnp.uint16)
    halves = jnp.pad(halves, ((0, 0), (0, halves.shape[1] % 2))).astype(jnp.uint32)
    return halves[:, ::2] | (halves[:, 1::2] << 16)


def halves_of(words: jax.Array, k_size: int) -> jax.Array:
    """uint16 [R, K]: the bits of each half."""
    both = jnp.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(len(words), -1)
    return both[:, :k_size].astype(jnp.uint16)


def from_halves(words: jax.Array, k_size: int) -> jax.Array:
    """Inverse of `to_halves`, but for what float16 rounds."""
    halves = lax.bitcast_convert_type(halves_of(words, k_size), jnp.float16)
    return halves.astype(jnp.float32)


def _shifts(storage: str) -> np.ndarray:
    first = _TWO_BIT[storage][1]
    return np.abs(first - np.array([[0], [2], [4], [6]])).astype(np.uint32)


def _base3(codes, digits: int):
    """[R, blocks, count * digits] -> bytes [R, blocks, count]: ceil(number * 256 / 243)."""
    rows, blocks, size = codes.shape
    powers = np.array(_POWERS[:digits], np.uint32)[:, None]
    number = (codes.reshape(rows, blocks, digits, size // digits) * powers).sum(axis=2)
    return (number * 256 + 242) // 243


def _from_base3(data, digits: int):
    """Digit n of any byte is (byte * 3^n mod 256) * 3 >> 8."""
    rows, blocks, count = data.shape
    turned = data[:, :, None] * (3 ** np.arange(digits, dtype=np.uint32))[:, None]
    return (((turned & 0xFF) * 3) >> 8).reshape(rows, blocks, digits * count)


def base3_transition(flips: np.ndarray, density: float) -> np.ndarray:
    """f64 [3, 3]: P(code j | code i) of a digit under tq1_0, over its byte's other digits.

    flips: f64 [256], probability of each pattern of flipped bits in a byte. The digits of a
    byte err together; this is the law of one alone.
    """
    law = np.array([density / 2, 1 - density, density / 2])
    byte = np.arange(256)
    table = np.zeros((3, 3))
    for first, last, digits in _DIGITS:
        decoded = np.stack([((byte * 3**n & 0xFF) * 3) >> 8 for n in range(digits)])
        seen, share = np.zeros((digits, 3, 3)), (last - first) / digits / 256
        for word in itertools.product(range(3), repeat=digits):
            number = sum(d * p for d, p in zip(word, _POWERS, strict=False))
            noisy = decoded[:, (number * 256 + 242) // 243 ^ byte]
            for n in range(digits):
                others = np.prod(law[[d for i, d in enumerate(word) if i != n]])
                seen[n, word[n]] += others * np.bincount(noisy[n], flips, minlength=3)
        table += share * seen.sum(axis=0)
    return table
