"""The packed product of a matrix whose K is split over devices, for use inside `shard_map`.

Every device multiplies its part of x with its part of W. Where one scale stands for all of K
the int32 partial sums are added and scaled once, so the accumulators are those of one device,
to the bit. With scales in groups along K each device's groups are scaled first, and floats add.
"""

import jax
import jax.numpy as jnp
from jax import lax

from . import reference, target
from .backends import choose
from .packing import FORMATS, Packed
from .ternary_matmul import ternary_matmul, to_digits


def ternary_matmul_across(
    x: jax.Array,
    w: Packed,
    axis: str,
    *,
    one_scale: bool,
    layer: jax.Array | int | None = None,
    x_scale: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """y = x W, the sum over the devices of the mesh axis `axis`.

    Args:
      x: int8 [..., K] with `x_scale` that all devices share, or float [..., K]; K is the part
        that this device has.
      w: its part of the weights, as for `ternary_matmul`.
      one_scale: whether the whole matrix, of all devices, has one scale along K.
      layer, x_scale, backend: as for `ternary_matmul`.

    Returns:
      f32 [..., N], the same on every device.
    """
    exact = one_scale and w.format in FORMATS and w.num_planes == 1 and w.zero is None
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if not exact:
        if floating and w.format in FORMATS:
            digits, scale = to_digits(x.reshape(-1, x.shape[-1]), axis)
            y = _scaled(digits, scale, w, layer, backend)
            y = y.reshape(*x.shape[:-1], w.shape[1])
        else:
            y = ternary_matmul(
                x, w, layer=layer, x_scale=x_scale, out_dtype=jnp.float32, backend=backend
            )
        return lax.psum(y, axis)
    rows = x.reshape(-1, x.shape[-1])
    if floating:
        digits, scale = to_digits(rows, axis)
    else:
        assert x_scale is not None  # int8 x has one: `ternary_matmul` says so of its callers
        digits, scale = rows[None], x_scale.reshape(-1, 1)
    partial = ternary_matmul(
        digits.reshape(-1, digits.shape[-1]), w, layer=layer, out_dtype=jnp.int32, backend=backend
    )
    total = lax.psum(partial, axis)
    stacked, index = _stack(w, layer)
    y = reference.combine(digits, scale, stacked, index)(total, 0, 0, 0)
    return y.reshape(*x.shape[:-1], w.shape[1])


def _scaled(digits, scale, w: Packed, layer, backend):
    """Digits that all devices made with one scale, through the chosen backend: f32 [M, N]."""
    stacked, index = _stack(w, layer)
    chosen = choose(target.current().platform, digits[0], stacked, backend)
    return chosen.run(digits, scale, stacked, index, dict(chosen.heuristic(digits[0], stacked)))


def _stack(w: Packed, layer):
    stacked = w if w.data.ndim == 4 else jax.tree.map(lambda leaf: leaf[None], w)
    return stacked, jnp.asarray(0 if layer is None else layer, jnp.int32)
