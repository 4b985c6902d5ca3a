"""`Scheme`: the protocol every quantizer of weights follows, and its granularities.

A scheme knows weights, never kernels. `quantize` is the whole of it; what trains,
packs, decodes and is studied under noise follows from the `Quantized` it returns.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.errors import NumericCheckFailed, UsageError
from ternax.quantized import Quantized

# BitNet b1.58 clamps the mean of |W| here (arXiv:2402.17764, reference code): an
# all-zero matrix then quantizes to zeros instead of NaN.
EPS = 1e-5
GRANULARITIES = ("tensor", "row", "group")


def straight_through(w: jax.Array, quantized: jax.Array) -> jax.Array:
    """`quantized`, to the bit, with the gradient of `w`."""
    return jax.lax.stop_gradient(quantized) + (w - jax.lax.stop_gradient(w))


class Scheme(nnx.Module):
    """Quantizes one weight matrix. One instance per linear; may own Params, never Rngs.

    Class attributes tell the conformance suite what to hold the scheme to:
      codes_idempotent: quantizing the dequantized weight gives the same codes.
      scale_equivariant: quantize(c w) has the codes of w and c times its scale, c > 0.
      codes_follow_sign: a code that is not zero has the sign of its weight.
    """

    codes_idempotent = True
    scale_equivariant = True
    codes_follow_sign = True

    def __init__(self, shape: tuple[int, int], *, rngs: nnx.Rngs | None = None):
        """shape: (K, N) of the weight. rngs: for schemes that own Params."""
        del rngs
        self.shape = (shape[0], shape[1])

    def quantize(self, w: jax.Array, stats: jax.Array | None = None) -> Quantized:
        """w: f32 [K, N]; stats: calibration X^T X [K, K] or None -> Quantized."""
        raise NotImplementedError

    def fake_quant(self, w: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """The dequantized weight in training: f32 [K, N], gradient straight through."""
        del key
        return straight_through(w, self.quantize(w).dequantize())


def fitting_group(k_size: int, size: int) -> tuple[str, int]:
    """("group", `size` or the largest of 64, 32 and 16 below it that divides K), or ("row", size).

    What a scheme does whose default is groups, for a matrix that `size` does not divide.
    """
    sizes = [size, *(smaller for smaller in (64, 32, 16) if smaller < size)]
    found = next((each for each in sizes if k_size % each == 0), None)
    return ("group", found) if found else ("row", size)


class BlockScheme(Scheme):
    """A scheme that treats each block of weights sharing a scale alike.

    `granularity` is what shares a scale: "tensor" (the whole matrix), "row" (one
    output, all of K) or "group" (`group_size` neighbours along K of one output).
    Subclasses write `quantize_blocks` on [G, K / G, N] with the axes to reduce.
    """

    format = "trit2"

    def __init__(self, shape, *, granularity: str = "tensor", group_size: int = 128, rngs=None):
        super().__init__(shape, rngs=rngs)
        if granularity not in GRANULARITIES:
            raise UsageError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, found {granularity!r}"
            )
        k_size = shape[0]
        if granularity == "group" and (group_size < 16 or group_size % 16 or k_size % group_size):
            raise UsageError(
                f"group_size must be a multiple of 16 that divides K = {k_size}, found {group_size}"
            )
        self.groups = k_size // group_size if granularity == "group" else 1
        self.axes = (0, 1, 2) if granularity == "tensor" else (1,)

    def quantize_blocks(self, w: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """w: f32 [G, K / G, N] -> (codes, same shape; scale [G or 1, 1, N or 1])."""
        raise NotImplementedError

    def quantize(self, w, stats=None):
        del stats
        k_size, n = w.shape
        blocks = w.astype(jnp.float32).reshape(self.groups, k_size // self.groups, n)
        codes, scale = self.quantize_blocks(blocks, self.axes)
        codes = codes.reshape(1, k_size, n).astype(jnp.int8)
        return Quantized(codes, jnp.swapaxes(scale, 0, 1).astype(jnp.float32), format=self.format)


def check_finite(w: jax.Array, name: str) -> None:
    """Refuses NaN and infinity in a concrete weight, by name."""
    if not isinstance(w, jax.core.Tracer) and not bool(jnp.isfinite(w).all()):
        bad = int(w.size - jnp.isfinite(w).sum())
        raise NumericCheckFailed(
            f"{name}: expected finite weights, found {bad} of {w.size} NaN or infinite"
        )
