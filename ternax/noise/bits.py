"""Noise on stored bits: of packed codes, in any layout, and of scales."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ternax.counter_hash import below
from ternax.errors import UsageError
from ternax.kernels.packing import BLOCK, FLOAT_FORMATS, FORMATS
from ternax.noise import storage as stored
from ternax.noise.model import NoiseModel, check_choice
from ternax.noise.words import (
    COIN,
    WHAT,
    WHERE,
    Matrix,
    WordNoise,
    bit_flips,
    draws,
    float_lanes,
    key_words,
    lane_swap,
)

POLICIES = ("zero", "saturate", "nearest", "detect", "raw")
_EVEN = 0x55555555


@dataclasses.dataclass(frozen=True)
class PackedNoise(WordNoise):
    """Flips bits of stored values at a rate; a subclass says which.

    Attributes:
      rate: in [0, 1]; of what, the subclass says.
      policy: what is read where the bits are no legal value (code 3 of trit2; the lowest code of
        int4 and int8; of floats, not finite): "zero" 0; "saturate" the largest magnitude there
        is, +1 for a trit, and for floats every value beyond the matrix's own largest is put
        there; "nearest" one of the legal codes that are one bit away; "detect" the right value,
        got again from elsewhere; "raw" what the bits say, +2 for a trit.
      storage: a name of `storage.STORAGES`, how trits lie in memory; "f16", how f32 weights do.
    """

    rate: float
    policy: str = "zero"
    storage: str = stored.CANONICAL
    domain: ClassVar[str] = "packed"
    statistic: ClassVar[str | None] = "peak"

    def __post_init__(self):
        super().__post_init__()
        check_choice("noise", "policy", self.policy, POLICIES)
        check_choice("noise", "storage", self.storage, (*stored.STORAGES, stored.HALF))
        if self.storage == stored.BASE3 and self.policy != "zero":
            raise UsageError(f"noise: {stored.BASE3} has no invalid code, so no policy for it")

    def flips(self, key, index, strength) -> jax.Array:
        """uint32: the bits to flip in words number `index` of the memory image."""
        raise NotImplementedError

    def pattern(self) -> np.ndarray:
        """f64 [256]: probability of each pattern of flips in a byte."""
        raise NotImplementedError

    def strike(self, key, words, rows, matrix: Matrix, strength, statistic):
        if self.storage == stored.CANONICAL:
            noisy = words ^ self.flips(key, _index(rows, words.shape[1]), strength)
        elif self.storage == stored.HALF:
            noisy = self._strike_halves(key, words, rows, matrix, strength)
        elif matrix.format != "trit2":
            raise UsageError(
                f"noise: storage {self.storage} is of trits, found {matrix.format} weights"
            )
        else:
            # Barriers: fused into one, each stage would be computed again for every use.
            codes = lax.optimization_barrier(_codes(words, matrix.k_size))
            data = lax.optimization_barrier(stored.to_bytes(codes, self.storage))
            other = lax.bitcast_convert_type(data.reshape(len(data), -1, 4), jnp.uint32)
            other ^= self.flips(key, _index(rows, other.shape[1]), strength)
            other = lax.optimization_barrier(other)
            data = lax.bitcast_convert_type(other, jnp.uint8).reshape(data.shape)
            codes = stored.from_bytes(data, self.storage, matrix.k_size)
            noisy = _words(lax.optimization_barrier(codes), matrix)
        if matrix.format in FLOAT_FORMATS:
            return _legal_floats(noisy, words, matrix, self.policy, statistic)
        coin = draws(key, _index(rows, words.shape[1]), 0, COIN)
        return _legal_codes(noisy, words, coin, FORMATS[matrix.format].bits, self.policy)

    def _strike_halves(self, key, words, rows, matrix: Matrix, strength):
        """f32 words as float16 would have them; those that nothing hit are not rounded."""
        if matrix.format != "f32":
            raise UsageError(f"noise: storage f16 is of f32 weights, found {matrix.format}")
        values = lax.bitcast_convert_type(words, jnp.float32)
        halves = stored.to_halves(values)
        flips = self.flips(key, _index(rows, halves.shape[1]), strength)
        noisy = stored.from_halves(halves ^ flips, words.shape[1])
        hit = stored.halves_of(flips, words.shape[1]) != 0
        return jnp.where(hit, lax.bitcast_convert_type(noisy, jnp.uint32), words)

    def apply(self, key, value, strength):
        return self.apply_packed(key, value, strength)

    def transition(self, density: float) -> np.ndarray:
        """f64 [3, 4]: P(trit reads as j - 1 | it was i - 1); +2 under "raw" alone."""
        if self.storage == stored.BASE3:
            return np.pad(stored.base3_transition(self.pattern(), density), ((0, 0), (0, 1)))
        byte = np.arange(256)
        # Patterns of the two bits of a trit, over the four places of a byte.
        pairs = np.zeros(4)
        for shift in (0, 2, 4, 6):
            pairs += np.bincount((byte >> shift) & 3, self.pattern(), minlength=4)
        table = np.zeros((3, 4))
        for code in range(3):
            for flip in range(4):
                read = code ^ flip
                if read < 3 or self.policy == "raw":
                    table[code, read] += pairs[flip] / 4
                else:
                    ends = {"zero": [1], "saturate": [2], "nearest": [1, 2], "detect": [code]}
                    for end in ends[self.policy]:
                        table[code, end] += pairs[flip] / 4 / len(ends[self.policy])
        return table

    def moments(self, density):
        table, values = self.transition(density), np.array([-1.0, 0.0, 1.0, 2.0])
        mean = table @ values
        return mean, table @ values**2 - mean**2


@dataclasses.dataclass(frozen=True)
class BitFlip(PackedNoise):
    """Each bit flips at the rate; in bursts, `burst` bits one after the other flip together.

    A burst begins at any bit with probability rate / burst and runs through the memory image,
    rows one behind the other.
    """

    burst: int = 1

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.burst, int) or not 1 <= self.burst <= 32:
            raise UsageError(f"bitflip: burst must be 1 .. 32 bits, found {self.burst!r}")

    def flips(self, key, index, strength):
        starts = _starts(key, index, strength / self.burst)
        if self.burst == 1:
            return starts
        before = _starts(key, index - jnp.uint32(1), strength / self.burst)
        flipped = starts
        for d in range(1, self.burst):
            flipped ^= (starts << d) | (before >> (32 - d))
        return flipped

    def pattern(self):
        # Bit b of a byte is hit by starts b - burst + 1 .. b; one start in common hits both.
        law = np.zeros(256)
        law[0] = 1.0
        byte = np.arange(256)
        for start in range(1 - self.burst, 8):
            hit = sum(1 << b for b in range(max(start, 0), min(start + self.burst, 8)))
            p = self.rate / self.burst
            law = (1 - p) * law + p * law[byte ^ hit]
        return law


@dataclasses.dataclass(frozen=True)
class ByteFault(PackedNoise):
    """A struck byte reads as any byte, each as likely."""

    def flips(self, key, index, strength):
        struck = jnp.zeros_like(index)
        for lane in range(4):
            hit = below(draws(key, index, lane, WHERE), strength)
            struck |= jnp.where(hit, jnp.uint32(0xFF << (8 * lane)), jnp.uint32(0))
        return struck & draws(key, index, 0, WHAT)

    def pattern(self):
        return (1 - self.rate) * (np.arange(256) == 0) + self.rate / 256


@dataclasses.dataclass(frozen=True)
class ScaleBits(NoiseModel):
    """Bits of stored scales flip at the rate.

    Attributes:
      dtype: what a scale is stored as: "f32", "bf16" or "f16".
      secded: each scale is kept with check bits (7 for 32 bits, 6 for 16), which err like the
        others; one error in a word is put right, more stay.
      policy: "zero" reads what is not finite as 0, "raw" as it is.
    """

    rate: float
    dtype: str = "f32"
    secded: bool = False
    policy: str = "zero"
    domain: ClassVar[str] = "scale"

    def __post_init__(self):
        super().__post_init__()
        check_choice("scale_bits", "dtype", self.dtype, ("f32", "bf16", "f16"))
        check_choice("scale_bits", "secded", self.secded, (True, False))
        check_choice("scale_bits", "policy", self.policy, ("zero", "raw"))

    def apply(self, key, value, strength):
        kind = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}[self.dtype]
        bits = 8 * jnp.dtype(kind).itemsize
        unsigned = jnp.uint32 if bits == 32 else jnp.uint16
        index = jnp.arange(value.size, dtype=jnp.uint32).reshape(value.shape)
        words = key_words(key)
        flips = bit_flips(words, index, bits, strength)
        if self.secded:
            errors = lax.population_count(flips)
            for check in range(bits, bits + (7 if bits == 32 else 6)):
                errors += below(draws(words, index, check, WHERE), strength).astype(jnp.uint32)
            flips = jnp.where(errors <= 1, 0, flips)
        raw = lax.bitcast_convert_type(value.astype(kind), unsigned) ^ flips.astype(unsigned)
        noisy = lax.bitcast_convert_type(raw, kind).astype(jnp.float32)
        if self.policy == "zero":
            noisy = jnp.where(jnp.isfinite(noisy), noisy, 0)
        # A scale that nothing hit is what it was, whatever its dtype would round it to.
        noisy = jnp.where(flips == 0, value, noisy)
        return noisy, jnp.sum(flips != 0, dtype=jnp.int32)


class NormBits(ScaleBits):
    """The same of the weights of norms, which are floats too and few."""

    domain: ClassVar[str] = "norms"


def _index(rows, width: int) -> jax.Array:
    """uint32 [R, W]: numbers of the words of rows uint32 [R, 1]."""
    return rows * jnp.uint32(width) + jnp.arange(width, dtype=jnp.uint32)


def _starts(key, index, rate):
    """Words in which each bit is set at the rate."""
    bit = jnp.arange(32, dtype=jnp.uint32)
    hit = below(draws(key, index[..., None], bit, WHERE), rate)
    return jnp.sum(jnp.where(hit, jnp.uint32(1) << bit, 0), axis=-1, dtype=jnp.uint32)


def _codes(words, k_size: int):
    """uint32 [R, W] -> uint8 [R, K], codes 0 .. 3 in the order of k."""
    lanes = lane_swap(np.arange(BLOCK, dtype=np.uint32))
    codes = (words[..., None] >> (2 * lanes)) & 3
    return codes.astype(jnp.uint8).reshape(len(words), -1)[:, :k_size]


def _words(codes, matrix: Matrix):
    """Inverse of `_codes`, padding as code 1."""
    pad = matrix.words * BLOCK - codes.shape[1]
    codes = jnp.pad(codes, ((0, 0), (0, pad)), constant_values=1).astype(jnp.uint32)
    lanes = lane_swap(np.arange(BLOCK, dtype=np.uint32))
    return (codes.reshape(len(codes), -1, BLOCK) << (2 * lanes)).sum(-1, dtype=jnp.uint32)


def _legal_codes(noisy, old, coin, bits: int, policy: str):
    """Words whose illegal codes read as the policy says. coin: uint32, fair bits."""
    if policy == "raw":
        return noisy
    if bits == 2:
        low = jnp.uint32(_EVEN)
        bad = noisy & (noisy >> 1) & low
        # 11 becomes 01 (0) without its high bit, and 10 (+1) without its low one.
        high_off, low_off = noisy & ~(bad << 1), noisy & ~bad
        chosen = coin & low
        both = noisy & ~((bad & chosen) | ((bad & ~chosen) << 1))
        wide = bad * 3
        kept = (noisy & ~wide) | (old & wide)
        return {"zero": high_off, "saturate": low_off, "nearest": both, "detect": kept}[policy]
    offset, out = 1 << (bits - 1), jnp.zeros_like(noisy)
    for lane in range(32 // bits):
        shift = bits * lane
        code = (noisy >> shift) & (2**bits - 1)
        clean = (old >> shift) & (2**bits - 1)
        # The lowest code is illegal; one bit away lies code 1, which is also the extreme.
        end = {"zero": jnp.uint32(offset), "detect": clean}.get(policy, jnp.uint32(1))
        out |= jnp.where(code == 0, end, code) << shift
    return out


def _legal_floats(noisy, old, matrix: Matrix, policy: str, peak):
    """Words of floats that read as the policy says."""
    if policy == "raw":
        return noisy
    lanes = zip(float_lanes(noisy, matrix), float_lanes(old, matrix), strict=True)
    fixed = []
    for value, clean in lanes:
        bad = ~jnp.isfinite(value)
        if policy == "saturate":
            end = jnp.where(jnp.isnan(value), 0, jnp.clip(value, -peak, peak))
            bad |= jnp.abs(value) > peak
        else:
            end = clean if policy == "detect" else jnp.zeros_like(value)
        fixed.append(lax.bitcast_convert_type(jnp.where(bad, end, value), jnp.uint32))
    return fixed[0] if len(fixed) == 1 else (fixed[0] >> 16) | (fixed[1] & jnp.uint32(0xFFFF0000))
