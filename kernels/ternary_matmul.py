"""`ternary_matmul`: the public packed matmul. Contract, validation, dispatch, gradient.

The product is exact. Activations are int8, or floats that become three int8 digits;
digits x codes are summed in int32, so every backend, batch and split gives the same
accumulators. Floats enter once, when accumulators are scaled.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import reference, target
from .backends import BACKENDS, BackendError, choose
from .packing import BLOCK, DIGIT_BASE, FLOAT_FORMATS, FORMATS, NUM_DIGITS, Packed
from .pallas import tiles

# Balanced base-128 digits of a float activation: v = d0 + 128 d1 + 16384 d2, |v| <= LIMIT.
DIGIT_LIMIT = 127 * DIGIT_BASE ** (NUM_DIGITS - 1)


def to_digits(x: jax.Array, across: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Splits float activations into exact int8 digits.

    x: float [M, K] -> (digits int8 [3, M, K], scale f32 [M, 1]) with
    x ~ (d0 + 128 d1 + 16384 d2) * scale. The scale is a power of two, so that scaling is
    exact and every platform makes the same digits: x is rounded, half to even, to 21 or
    22 bits of the row's maximum (1e-30 at least), |error| <= maximum * 2^-20.98 an element.
    across: the mesh axis that rows are split over, inside `shard_map`: the maximum is of all parts.
    """
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    peak = jnp.maximum(peak if across is None else lax.pmax(peak, across), 1e-30)
    # peak lies in [2^(exponent - 1), 2^exponent); scaled by 2^shift it stays within the limit.
    bits = lax.bitcast_convert_type(peak, jnp.int32)
    exponent = (bits >> 23) - 126
    mantissa = lax.bitcast_convert_type((bits & 0x7FFFFF) | (148 << 23), jnp.float32)  # 2^21 m
    shift = jnp.where(mantissa > 2 * DIGIT_LIMIT, 20, 21) - exponent
    up = lax.bitcast_convert_type((127 + shift) << 23, jnp.float32)
    v = jnp.round(x * up).astype(jnp.int32)
    d0 = ((v + DIGIT_BASE // 2) & (DIGIT_BASE - 1)) - DIGIT_BASE // 2
    v = (v - d0) // DIGIT_BASE
    d1 = ((v + DIGIT_BASE // 2) & (DIGIT_BASE - 1)) - DIGIT_BASE // 2
    d2 = (v - d1) // DIGIT_BASE
    scale = lax.bitcast_convert_type((127 - shift) << 23, jnp.float32)
    return jnp.stack([d0, d1, d2]).astype(jnp.int8), scale


def largest_k(format: str) -> int:
    """The longest K whose int32 sums cannot overflow, whatever codes and activations are.

    Kernels sum codes, 0 .. 2^bits - 1, times activations down to -128 and take the offset
    off at the end, so the bound is that of the codes and not of the values they stand for.
    A kernel may also leave codes at their bit position and shift the sums, of 8 lanes or more.
    """
    fmt = FORMATS[format]
    code = 2**fmt.bits - 1
    in_place = (code << (8 - fmt.bits)) / (8 * fmt.planes)
    return int((2**31 - 1) // (128 * max(code, in_place)))


def ternary_matmul(
    x: jax.Array,
    w: Packed,
    *,
    layer: jax.Array | int | None = None,
    x_scale: jax.Array | None = None,
    out_dtype=jnp.bfloat16,
    backend: str | None = None,
    config: Mapping[str, int] | None = None,
) -> jax.Array:
    """y = x W for packed W.

    Args:
      x: int8 [..., K] with `x_scale` (W2A8), or float [..., K] (W2A16: rounded to 22
        bits of each row's maximum, see `to_digits`).
      w: packed weights; data [P, N, bytes], or [L, P, N, bytes] with `layer`.
      layer: int32 []; which layer of a stack. The stack is never sliced or copied.
      x_scale: f32 [..., 1]; x stands for x * x_scale. Only with int8 x.
      out_dtype: dtype of y. int32 returns the bare accumulators (int8 x, one plane,
        one group, no zero) and reads neither scale.
      backend: a name in BACKENDS, which then runs or raises; None tries the
        platform's order.
      config: the backend's settings; None takes its heuristic.

    Returns:
      [..., N]. Differentiable in float x and in x_scale; W has no gradient.

    Raises:
      BackendError: no backend, or not the named one, can run the call.
      ValueError, TypeError: shapes or dtypes that break the contract.
    """
    validate(x, w, layer, x_scale, out_dtype)
    stacked = w if w.data.ndim == 4 else jax.tree.map(lambda leaf: leaf[None], w)
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)
    rows = x.reshape(-1, x.shape[-1])
    if w.format in FLOAT_FORMATS:
        floats = rows.astype(jnp.float32) * (1.0 if x_scale is None else x_scale.reshape(-1, 1))
        y = _dense_matmul(floats, stacked, index).astype(out_dtype)
        return y.reshape(*x.shape[:-1], w.shape[1])
    chosen = choose(target.current().platform, rows, stacked, backend)
    settings = tuple((config or chosen.heuristic(rows, stacked)).items())
    out_dtype = jnp.dtype(out_dtype)
    if jnp.issubdtype(x.dtype, jnp.floating):
        y = _float_matmul((chosen.name, settings, out_dtype), rows, stacked, index)
    elif x_scale is None or out_dtype == jnp.int32:
        y = chosen.run(rows[None], None, stacked, index, dict(settings))
    else:
        y = _int8_matmul(
            (chosen.name, settings, out_dtype), rows, x_scale.reshape(-1, 1), stacked, index
        )
    return y.reshape(*x.shape[:-1], w.shape[1])


def ternary_matmul_transposed(g: jax.Array, w: Packed, *, layer=None) -> jax.Array:
    """g W^T, f32: the gradient of y = x W. g: [..., N] -> [..., K]. Reference backend."""
    stacked = w if w.data.ndim == 4 else jax.tree.map(lambda leaf: leaf[None], w)
    index = jnp.asarray(0 if layer is None else layer, jnp.int32)
    dx = _transposed(g.reshape(-1, g.shape[-1]), stacked, index)
    return dx.reshape(*g.shape[:-1], w.shape[0])


def _transposed(g, w: Packed, layer):
    """`reference.transposed` of any layout. w: a stack, of which one layer is read."""
    if w.layout == tiles.LAYOUT:
        one = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer), w)
        w, layer = tiles.canonical(one), jnp.int32(0)
    return reference.transposed(g, w, layer)


def _run(static, digits, x_scale, w: Packed, layer):
    """Digits int8 [D, M, K] through the chosen backend, scaled, in out_dtype."""
    name, settings, out_dtype = static
    return BACKENDS[name].run(digits, x_scale, w, layer, dict(settings)).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float_matmul(static, x, w, layer):
    digits, scale = to_digits(x)
    return _run(static, digits, scale, w, layer)


def _float_fwd(static, x, w, layer):
    return _float_matmul(static, x, w, layer), (w, layer, jnp.zeros((), x.dtype))


def _float_bwd(static, saved, g):
    w, layer, like = saved
    dx = _transposed(g.astype(jnp.float32), w, layer)
    return dx.astype(like.dtype), _no_gradient(w), _no_gradient(layer)


_float_matmul.defvjp(_float_fwd, _float_bwd)


@jax.custom_vjp
def _dense_matmul(x, w, layer):
    return reference.run_dense(x, w, layer)


_dense_matmul.defvjp(
    lambda x, w, layer: (_dense_matmul(x, w, layer), (w, layer)),
    lambda saved, g: (_transposed(g, *saved), *map(_no_gradient, saved)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8_matmul(static, x, x_scale, w, layer):
    return _run(static, x[None], x_scale.astype(jnp.float32), w, layer)


def _int8_fwd(static, x, x_scale, w, layer):
    return _int8_matmul(static, x, x_scale, w, layer), (x, x_scale, w, layer)


def _int8_bwd(static, saved, g):
    x, x_scale, w, layer = saved
    unscaled = _int8_matmul(
        (*static[:2], jnp.dtype(jnp.float32)), x, jnp.ones_like(x_scale), w, layer
    )
    d_scale = jnp.sum(g.astype(jnp.float32) * unscaled, axis=-1, keepdims=True)
    return _no_gradient(x), d_scale.astype(x_scale.dtype), _no_gradient(w), _no_gradient(layer)


_int8_matmul.defvjp(_int8_fwd, _int8_bwd)


def _no_gradient(tree):
    """Zero cotangents: float0 for integers, zeros for the float leaves of a weight."""

    def zero(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def validate(x, w: Packed, layer, x_scale, out_dtype) -> None:
    """Raises what `ternary_matmul` says it raises; reads only shapes and dtypes."""
    if w.format not in FORMATS and w.format not in FLOAT_FORMATS:
        legal = ", ".join([*FORMATS, *FLOAT_FORMATS])
        raise BackendError(f"packed format must be one of {legal}, found {w.format!r}")
    k_size, n = w.shape
    if x.shape[-1] != k_size:
        raise ValueError(f"x has {x.shape[-1]} columns, W has K = {k_size} rows")
    integer = w.format in FORMATS
    rows = (n, FORMATS[w.format].row_bytes(k_size) if integer else k_size)
    if w.layout == tiles.LAYOUT:
        rows = tiles.data_shape(w.shape)
    if w.data.shape[-2:] != rows:
        raise ValueError(
            f"packed data must end in {rows} for W {k_size}x{n} in {w.format}, found {w.data.shape}"
        )
    if (w.data.ndim == 4) != (layer is not None):
        raise ValueError(
            "a stack needs `layer` and only a stack takes it; "
            f"data is {w.data.shape}, layer {layer}"
        )
    lead, last = w.data.shape[:-2], w.scale.shape[-1:]
    if w.scale.ndim != w.data.ndim or w.scale.shape[:-2] != lead or last not in ((1,), (n,)):
        raise ValueError(f"scale must be {lead} + (groups, 1 or {n}), found {w.scale.shape}")
    if w.zero is not None and w.zero.shape != w.scale.shape:
        raise ValueError(f"zero must be shaped like scale {w.scale.shape}, found {w.zero.shape}")
    if w.groups > 1 and (k_size % w.groups or (k_size // w.groups) % BLOCK):
        raise ValueError(f"{w.groups} groups must cut K = {k_size} into multiples of {BLOCK}")
    if k_size < 1:
        raise ValueError("W has no rows: K must be at least 1")
    if integer and k_size > largest_k(w.format):
        raise ValueError(
            f"K = {k_size} could overflow the int32 accumulator in {w.format}, "
            f"which holds K up to {largest_k(w.format)}"
        )
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if not floating and x.dtype != jnp.int8:
        raise TypeError(f"x must be int8 or float, found {x.dtype}")
    if floating and x_scale is not None:
        raise TypeError("x_scale belongs to int8 activations; float ones carry their own scale")
    bare = jnp.dtype(out_dtype) == jnp.int32
    plain = integer and w.groups * w.num_planes == 1 and w.zero is None
    if bare and (floating or not plain):
        raise ValueError(
            "int32 output needs int8 x, integer codes, one plane, one group and no zero"
        )
    if not floating and not bare and (x_scale is None or x_scale.shape != (*x.shape[:-1], 1)):
        found = None if x_scale is None else x_scale.shape
        raise ValueError(
            f"int8 x {x.shape} needs x_scale of shape {(*x.shape[:-1], 1)}, found {found}"
        )
