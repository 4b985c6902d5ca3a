"""Integer and float baselines that stand beside the ternary schemes: int8, int4, none."""

import jax.numpy as jnp

from ternax.errors import UsageError
from ternax.kernels.packing import FLOAT_FORMATS, FORMATS, float_to_bits
from ternax.quant.scheme import EPS, BlockScheme, Scheme, fitting_group
from ternax.quantized import Quantized


class _AbsMax(BlockScheme):
    """Symmetric rounding to the format's range: scale = max|W| / high."""

    def quantize_blocks(self, w, axes):
        high = FORMATS[self.format].high
        scale = jnp.maximum(jnp.max(jnp.abs(w), axis=axes, keepdims=True), EPS) / high
        return jnp.clip(jnp.round(w / scale), -high, high), scale


class Int8(_AbsMax):
    """int8 absmax, one scale a row."""

    format = "int8"

    def __init__(self, shape, *, granularity="row", group_size=128, rngs=None):
        super().__init__(shape, granularity=granularity, group_size=group_size, rngs=rngs)


class Int4(_AbsMax):
    """int4 absmax, one scale for each `group_size` weights of a row (the largest divisor of K)."""

    format = "int4"

    def __init__(self, shape, *, granularity="group", group_size=128, rngs=None):
        if granularity == "group" and group_size == 128:
            granularity, group_size = fitting_group(shape[0], group_size)
        super().__init__(shape, granularity=granularity, group_size=group_size, rngs=rngs)


class Unquantized(Scheme):
    """No quantization: the weight rounded to `dtype` ("bf16" or "f32")."""

    def __init__(self, shape, *, dtype: str = "bf16", rngs=None):
        super().__init__(shape, rngs=rngs)
        if dtype not in FLOAT_FORMATS:
            raise UsageError(f"dtype must be one of {', '.join(FLOAT_FORMATS)}, found {dtype!r}")
        self.dtype = dtype

    def quantize(self, w, stats=None):
        del stats
        values = float_to_bits(w, self.dtype)[None]
        return Quantized(values, jnp.ones((1, 1, 1), jnp.float32), format=self.dtype)
