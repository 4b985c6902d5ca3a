"""`nf4` and `nvfp4`: 4-bit formats to compare with. They train and evaluate, as floats.

Nothing here packs them: their values are a table's, and the kernels multiply integers.
"""

import jax
import jax.numpy as jnp

from ternax.quant.scheme import EPS, Scheme, fitting_group
from ternax.quantized import CODEBOOKS, Quantized

_E4M3_MAX = 448.0
_E2M1_MAX = 6.0


def _blocks(w: jax.Array, size: int) -> jax.Array:
    """w: [K, N] -> [G, K / G, N], in groups of `size` along K or the next smaller that fits."""
    k_size, n = w.shape
    kind, size = fitting_group(k_size, size)
    return w.astype(jnp.float32).reshape(k_size // size if kind == "group" else 1, -1, n)


def nearest_code(values: jax.Array, format: str) -> jax.Array:
    """int8 like `values`: the place of the nearest value of the format's table.

    Halfway between two of them an even place of the table's value 0 wins, as e2m1's rounding
    to even has it, since its mantissas alternate along the table.
    """
    table = jnp.asarray(CODEBOOKS[format].values, jnp.float32)
    middles, zero = (table[1:] + table[:-1]) / 2, CODEBOOKS[format].values.index(0)
    even_below = (jnp.arange(len(middles)) - zero) % 2 == 0
    codes = jnp.zeros(values.shape, jnp.int8)
    for middle, keep_below in zip(middles, even_below, strict=True):
        codes += jnp.where(keep_below, values > middle, values >= middle)
    return codes


def round_to_e4m3(x: jax.Array) -> jax.Array:
    """x >= 0 to the nearest E4M3 number, half to even, at most 448: f32 like x.

    Written out, since compilers may drop a conversion to a narrow type and back.
    """
    _, exponent = jnp.frexp(x)
    step = jnp.ldexp(jnp.ones_like(x), jnp.maximum(exponent - 1, -6) - 3)
    return jnp.minimum(jnp.round(x / step) * step, _E4M3_MAX)


class NF4(Scheme):
    """4-bit NormalFloat: blocks of 64 along K, each scaled by its largest |W|, f32.

    Without the second quantization of scales: 4.5 bits a weight.
    Source: arXiv:2305.14314 (QLoRA).
    """

    block_size = 64

    def quantize(self, w, stats=None):
        del stats
        blocks = _blocks(w, self.block_size)
        scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=1, keepdims=True), EPS)
        codes = nearest_code(blocks / scale, "nf4").reshape(1, *w.shape)
        return Quantized(codes, jnp.swapaxes(scale, 0, 1), format="nf4")


class NVFP4(Scheme):
    """NVFP4: e2m1 values in blocks of 16 along K, an E4M3 scale a block, an f32 one a matrix.

    The matrix's scale puts its largest |W| at 6 times 448; a block's is its own largest |W| / 6,
    rounded in units of that: 4.5 bits a weight. `Quantized.scale` holds their product.
    Source: NVIDIA, "Pretraining large language models with NVFP4" (arXiv:2509.25149).
    """

    codes_idempotent = False  # a block's scale below E4M3's normal range may round anew
    block_size = 16

    def quantize(self, w, stats=None):
        del stats
        blocks = _blocks(w, self.block_size)
        peak = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
        whole = jnp.maximum(jnp.max(peak), EPS) / (_E2M1_MAX * _E4M3_MAX)
        scale = round_to_e4m3(peak / _E2M1_MAX / whole) * whole
        # A block too small for any E4M3 scale is zero.
        codes = nearest_code(blocks / jnp.where(scale > 0, scale, jnp.inf), "nvfp4")
        return Quantized(codes.reshape(1, *w.shape), jnp.swapaxes(scale, 0, 1), format="nvfp4")
