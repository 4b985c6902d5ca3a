"""`Quantized`: what a scheme returns. Codes, scale, zero point, and the storage format."""

import dataclasses

import jax
import jax.numpy as jnp

from ternax.errors import UsageError
from ternax.kernels.packing import BLOCK, FLOAT_FORMATS, FORMATS, Packed, bits_to_float, pack


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A format whose codes are places in a table of values; no kernel multiplies it packed.

    Attributes:
      values: what code 0, 1, ... stands for, rising.
      bits: of one code.
      scale_bits: of one scale, as the format stores it.
      matrix_bits: of what a whole matrix shares.
    """

    values: tuple[float, ...]
    bits: int
    scale_bits: int
    matrix_bits: int = 0


# Comparison formats. NF4: the quantiles of a Gaussian of arXiv:2305.14314, appendix E, with an
# f32 scale a block. NVFP4: e2m1, with an E4M3 scale a block and an f32 one a matrix.
CODEBOOKS = {
    "nf4": Codebook(
        (
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ),
        bits=4,
        scale_bits=32,
    ),
    "nvfp4": Codebook(
        (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6),
        bits=4,
        scale_bits=8,
        matrix_bits=32,
    ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """W [K, N] ~ sum over planes of scale * (codes + zero).

    Attributes:
      codes: int8 [P, K, N] within the format's range; P = 1 but for trit-plane
        schemes. In format "bf16" or "f32" the values, as `float_to_bits` stores them; in a
        format of CODEBOOKS the places of the values.
      scale: f32 [P, G, 1] or [P, G, N]; G groups of K / G along K; G = 1 is one scale
        for all of K.
      zero: f32 like `scale`, or None for a symmetric grid.
      format: how a value is stored, a key of `kernels.packing.FORMATS`, FLOAT_FORMATS or
        CODEBOOKS.

    Invariants: K is a multiple of G; with G > 1, K / G is a multiple of 16.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    format: str = dataclasses.field(default="trit2", metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        k_size, n = self.codes.shape[-2:]
        return k_size, n

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight: codes and scales, padding of K included."""
        if self.format in CODEBOOKS:
            book, (k_size, n) = CODEBOOKS[self.format], self.shape
            scales = book.scale_bits * self.scale.size + book.matrix_bits
            return book.bits + scales / (k_size * n)
        packed = jax.eval_shape(Quantized.pack, self)
        return 8 * packed.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self) -> jax.Array:
        """f32 [K, N]."""
        planes, k_size, n = self.codes.shape
        if self.format in FLOAT_FORMATS:
            return bits_to_float(self.codes[0])
        groups = self.scale.shape[-2]
        values = self.codes.astype(jnp.float32)
        if self.format in CODEBOOKS:
            values = jnp.asarray(CODEBOOKS[self.format].values, jnp.float32)[self.codes]
        values = values.reshape(planes, groups, k_size // groups, n)
        if self.zero is not None:
            values += self.zero[:, :, None, :]
        return (values * self.scale[:, :, None, :]).sum(0).reshape(k_size, n)

    def pack(self, name: str = "") -> Packed:
        """The canonical packed form, one part called `name`. UsageError for a codebook format."""
        if self.format in CODEBOOKS:
            raise UsageError(
                f"format {self.format} cannot be packed: no kernel multiplies it; it is there to "
                "compare with, as floats (packed=False); packed are "
                f"{', '.join([*FORMATS, *FLOAT_FORMATS])}"
            )
        if self.format in FLOAT_FORMATS:
            data = jnp.swapaxes(self.codes, -1, -2)
        else:
            data = pack(self.codes, self.format)
        shape = self.shape
        return Packed(
            data, self.scale, self.zero, self.format, shape=shape, parts=((name, shape[1]),)
        )

    def density(self) -> jax.Array:
        """f32 []: share of codes that stand for something else than zero."""
        if self.format in CODEBOOKS:
            zero = CODEBOOKS[self.format].values.index(0)
            return jnp.mean(self.codes != zero, dtype=jnp.float32)
        return jnp.mean(self.codes != 0, dtype=jnp.float32)


def code_range(format: str) -> tuple[int, int]:
    """The least and the greatest code of an integer or codebook format."""
    if format in CODEBOOKS:
        return 0, len(CODEBOOKS[format].values) - 1
    return FORMATS[format].low, FORMATS[format].high


def check(quantized: Quantized) -> None:
    """Raises ValueError where `quantized` breaks the invariants above. Needs concrete arrays."""
    planes, k_size, n = quantized.codes.shape
    legal_formats = [*FORMATS, *FLOAT_FORMATS, *CODEBOOKS]
    if quantized.format not in legal_formats:
        legal = ", ".join(legal_formats)
        raise ValueError(f"format must be one of {legal}, found {quantized.format!r}")
    for name, leaf in (("scale", quantized.scale), ("zero", quantized.zero)):
        if leaf is None:
            continue
        if leaf.ndim != 3 or leaf.shape[0] != planes or leaf.shape[2] not in (1, n):
            raise ValueError(f"{name} must be [{planes}, G, 1 or {n}], found {leaf.shape}")
        if k_size % leaf.shape[1]:
            raise ValueError(f"{name} has {leaf.shape[1]} groups, which do not divide K = {k_size}")
        if leaf.shape[1] > 1 and k_size // leaf.shape[1] % BLOCK:
            raise ValueError(
                f"{name} has groups of {k_size // leaf.shape[1]} along K, which must be "
                f"multiples of {BLOCK}"
            )
        if leaf.shape != quantized.scale.shape:
            raise ValueError(
                f"{name} must be shaped like scale {quantized.scale.shape}, found {leaf.shape}"
            )
        if not bool(jnp.isfinite(leaf).all()):
            raise ValueError(f"{name} holds a value that is not finite")
    if quantized.format not in FLOAT_FORMATS:
        if quantized.codes.dtype != jnp.int8:
            raise ValueError(f"codes must be int8, found {quantized.codes.dtype}")
        legal_low, legal_high = code_range(quantized.format)
        low, high = int(quantized.codes.min()), int(quantized.codes.max())
        if low < legal_low or high > legal_high:
            raise ValueError(
                f"{quantized.format} codes must lie in [{legal_low}, {legal_high}], "
                f"found [{low}, {high}]"
            )
