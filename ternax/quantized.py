"""`Quantized`: what a scheme returns. Codes, scale, zero point, and the storage format."""

import dataclasses

import jax
import jax.numpy as jnp

from ternax.kernels.packing import BLOCK, FLOAT_FORMATS, FORMATS, Packed, bits_to_float, pack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """W [K, N] ~ sum over planes of scale * (codes + zero).

    Attributes:
      codes: int8 [P, K, N] within the format's range; P = 1 but for trit-plane
        schemes. In format "bf16" or "f32" the values, as `float_to_bits` stores them.
      scale: f32 [P, G, 1] or [P, G, N]; G groups of K / G along K; G = 1 is one scale
        for all of K.
      zero: f32 like `scale`, or None for a symmetric grid.
      format: how a value is stored, a key of `kernels.packing.FORMATS` or FLOAT_FORMATS.

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
        packed = jax.eval_shape(lambda: self.pack())
        return 8 * packed.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self) -> jax.Array:
        """f32 [K, N]."""
        planes, k_size, n = self.codes.shape
        if self.format in FLOAT_FORMATS:
            return bits_to_float(self.codes[0])
        groups = self.scale.shape[-2]
        values = self.codes.astype(jnp.float32).reshape(planes, groups, k_size // groups, n)
        if self.zero is not None:
            values += self.zero[:, :, None, :]
        return (values * self.scale[:, :, None, :]).sum(0).reshape(k_size, n)

    def pack(self, name: str = "") -> Packed:
        """The canonical packed form, one part called `name`."""
        if self.format in FLOAT_FORMATS:
            data = jnp.swapaxes(self.codes, -1, -2)
        else:
            data = pack(self.codes, self.format)
        shape = self.shape
        return Packed(
            data, self.scale, self.zero, self.format, shape=shape, parts=((name, shape[1]),)
        )

    def density(self) -> jax.Array:
        """f32 []: share of codes that are not zero."""
        return jnp.mean(self.codes != 0, dtype=jnp.float32)


def check(quantized: Quantized) -> None:
    """Raises ValueError where `quantized` breaks the invariants above. Needs concrete arrays."""
    planes, k_size, n = quantized.codes.shape
    if quantized.format not in FORMATS and quantized.format not in FLOAT_FORMATS:
        legal = ", ".join([*FORMATS, *FLOAT_FORMATS])
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
    if quantized.format in FORMATS:
        if quantized.codes.dtype != jnp.int8:
            raise ValueError(f"codes must be int8, found {quantized.codes.dtype}")
        fmt = FORMATS[quantized.format]
        low, high = int(quantized.codes.min()), int(quantized.codes.max())
        if low < fmt.low or high > fmt.high:
            raise ValueError(
                f"{quantized.format} codes must lie in [{fmt.low}, {fmt.high}], "
                f"found [{low}, {high}]"
            )
