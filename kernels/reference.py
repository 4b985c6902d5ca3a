"""The reference backend: plain XLA, right for every shape, format and platform.

One loop over blocks of rows. A block's bytes are sliced from the stack inside the
fusion that unpacks them, so no packed byte is copied; the unpacked int8 block stays
in cache and meets the activations in an int8 dot.

Measured on 2 cores (Zen 4, jax 0.10.2), batch 1, 8192x28672, ms a call: this form
17.8; planes concatenated before one dot 20.1; one 3-d shift before one dot 89;
multiply and reduce in one fusion 24.7. A batch under 4 is padded to 4: XLA's int8
dot is several times slower at 1 row than at 4.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from .packing import (
    BLOCK,
    CANONICAL,
    DIGIT_BASE,
    FLOAT_FORMATS,
    FORMATS,
    Packed,
    bits_to_float,
    plane_order,
)

# A block's packed bytes: large enough to occupy all cores, small enough for the cache.
_BLOCK_BYTES = 1 << 20
_MIN_ROWS = 4


def why_not(platform: str, x, w: Packed | None) -> str | None:
    """None: it runs everywhere. One exception: another kernel's private layout."""
    del platform, x
    if w is not None and w.layout != CANONICAL:
        return f"it reads the canonical layout, found {w.layout!r}"
    return None


def heuristic(x, w: Packed) -> Mapping[str, int]:
    """Rows a block: about `_BLOCK_BYTES` of packed weights, evenly split."""
    del x
    n, group_bytes = w.shape[1], max(1, w.data.shape[-1] // w.groups)
    blocks = max(1, round(n * group_bytes / _BLOCK_BYTES))
    return {"block_rows": -(-n // blocks)}


def _plane(codes: jax.Array, format: str, p: int) -> jax.Array:
    """The codes at bit position p of each byte, as int8 (int8 format: as values)."""
    fmt = FORMATS[format]
    if fmt.bits == 8:
        return lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)
    return ((codes >> (fmt.bits * p)) & (2**fmt.bits - 1)).astype(jnp.int8)


def _code_offset(format: str) -> int:
    """What `_plane` left in: value = code - offset."""
    return 0 if FORMATS[format].bits == 8 else FORMATS[format].offset


def run(
    digits: jax.Array,
    x_scale: jax.Array | None,
    w: Packed,
    layer: jax.Array,
    config: Mapping[str, int],
) -> jax.Array:
    """The packed product of one layer of a stack, see `ternary_matmul`.

    Args:
      digits: int8 [D, M, K]; activations, or their base-128 digits, lowest first.
      x_scale: f32 [M, 1], or None for the bare accumulators of one digit.
      w: stacked weights, data [L, P, N, row_bytes].
      layer: int32 [].
      config: {"block_rows": rows of W in one block}.

    Returns:
      f32 [M, N], or int32 [M, N] without x_scale.
    """
    flat = digits.reshape(-1, digits.shape[-1])
    if x_scale is None:
        return _blocked(flat, w, layer, lambda acc, p, g, n0: acc, config)
    return _blocked(flat, w, layer, combine(digits, x_scale, w, layer), config)


def combine(digits, x_scale, w: Packed, layer):
    """The float half: accumulators of one (plane, group) -> their share of y.

    y = sum over planes and groups of x_scale * scale * (acc + zero * sum of x), with
    acc = acc0 + 128 acc1 + 16384 acc2 where x came in digits.
    """
    count = digits.shape[0]
    x_sum = None if w.zero is None else _group_sums(digits, w)

    def columns(leaf, p, g, n0, size):
        start, take = (n0, size) if leaf.shape[-1] > 1 else (0, 1)
        return lax.dynamic_slice(leaf, (layer, p, g, start), (1, 1, 1, take))[0, 0]

    def combine(acc, p, g, n0):
        size = acc.shape[-1]
        parts = acc.reshape(count, -1, size).astype(jnp.float32)
        total = functools.reduce(lambda high, low: high * DIGIT_BASE + low, parts[::-1])
        if x_sum is not None:
            group_sum = lax.dynamic_index_in_dim(x_sum, g, 0, keepdims=False)[:, None]
            total += columns(w.zero, p, g, n0, size) * group_sum
        return total * (x_scale * columns(w.scale, p, g, n0, size))

    return combine


def _group_sums(digits: jax.Array, w: Packed) -> jax.Array:
    """f32 [G, M]: sum of the activations' values over each K group."""
    place = DIGIT_BASE ** jnp.arange(digits.shape[0], dtype=jnp.int32)
    values = jnp.einsum("dmk,d->mk", digits.astype(jnp.int32), place)
    padded = -(-w.shape[0] // BLOCK) * BLOCK
    values = jnp.pad(values, ((0, 0), (0, padded - w.shape[0])))
    return values.reshape(values.shape[0], w.groups, -1).sum(-1).T.astype(jnp.float32)


def _blocked(
    x: jax.Array, w: Packed, layer: jax.Array, combine, config: Mapping[str, int]
) -> jax.Array:
    """The exact core, and `combine` applied to each block while it is in cache.

    Args:
      x: int8 [R, K]; R rows of activations (or digits of activations).
      w: stacked weights, data [L, P, N, row_bytes].
      layer: int32 []; which layer of the stack.
      combine: (acc, p, g, n0) -> [M, rows]; turns one group's exact int32 partial
        [R, rows] of plane p, group g (both may be traced), rows from n0, into its
        share of the output. Shares are added in ascending (p, g).
      config: {"block_rows": rows of W in one block}.

    Returns:
      [M, N] in `combine`'s dtype.
    """
    fmt = FORMATS[w.format]
    (k_size, n), groups = w.shape, w.groups
    rows = x.shape[0]
    padded = w.data.shape[-1] * fmt.planes
    x = jnp.pad(x, ((0, max(0, _MIN_ROWS - rows)), (0, padded - k_size)))
    group_k, group_bytes = padded // groups, w.data.shape[-1] // groups
    grouped = jnp.moveaxis(x.reshape(x.shape[0], groups, group_k), 1, 0)
    planes = plane_order(grouped, w.format)  # [planes, G, R, group_bytes]
    sums = grouped.astype(jnp.int32).sum(-1)  # [G, R]

    def partial(p, g, n0, size):
        """int32 [R, size]: group g of rows n0 .. n0 + size, exact."""
        codes = lax.dynamic_slice(
            w.data, (layer, p, n0, g * group_bytes), (1, 1, size, group_bytes)
        )[0, 0]
        acc = jnp.zeros((x.shape[0], size), jnp.int32)
        for position in range(fmt.planes):
            digits = lax.dynamic_index_in_dim(planes[position], g, 0, keepdims=False)
            acc += lax.dot_general(
                digits,
                _plane(codes, w.format, position),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32,
            )
        acc -= (
            _code_offset(w.format) * lax.dynamic_index_in_dim(sums, g, 0, keepdims=False)[:, None]
        )
        return acc[:rows]

    def block(n0, size):
        """[M, size]: rows n0 .. n0 + size of the output."""
        if groups * w.num_planes == 1:
            return combine(partial(0, 0, n0, size), 0, 0, n0)
        step = lambda i: combine(  # noqa: E731
            partial(i // groups, i % groups, n0, size), i // groups, i % groups, n0
        )
        return lax.fori_loop(1, groups * w.num_planes, lambda i, y: y + step(i), step(0))

    size = min(config["block_rows"], n)
    out = jax.eval_shape(lambda: block(0, size))
    if size == n:
        return block(0, n)

    def body(i, y):
        return lax.dynamic_update_slice(y, block(i * size, size), (0, i * size))

    y = lax.fori_loop(0, n // size, body, jnp.zeros((out.shape[0], n), out.dtype))
    tail = n % size
    if tail:
        y = lax.dynamic_update_slice(y, block(n - tail, tail), (0, n - tail))
    return y


def run_dense(x: jax.Array, w: Packed, layer: jax.Array) -> jax.Array:
    """x W for a float format, converted block by block. x: f32 [M, K] -> f32 [M, N]."""
    rows, (k_size, n) = x.shape[0], w.shape
    x = jnp.pad(x, ((0, max(0, _MIN_ROWS - rows)), (0, 0)))
    blocks = max(1, round(n * k_size * w.data.dtype.itemsize / _BLOCK_BYTES / 4))
    size = -(-n // blocks)

    def block(n0, size):
        values = lax.dynamic_slice(w.data, (layer, 0, n0, 0), (1, 1, size, k_size))[0, 0]
        return lax.dot_general(x, bits_to_float(values), (((1,), (1,)), ((), ())))[:rows]

    def body(i, y):
        return lax.dynamic_update_slice(y, block(i * size, size), (0, i * size))

    y = lax.fori_loop(0, n // size, body, jnp.zeros((rows, n), jnp.float32))
    tail = n % size
    return lax.dynamic_update_slice(y, block(n - tail, tail), (0, n - tail)) if tail else y


def transposed(g: jax.Array, w: Packed, layer: jax.Array) -> jax.Array:
    """g W^T, for gradients. g: f32 [M, N] -> f32 [M, K]; W dequantized block by block."""
    if w.format in FLOAT_FORMATS:
        values = lax.dynamic_index_in_dim(w.data, layer, keepdims=False)[0]
        return g.astype(jnp.float32) @ bits_to_float(values)
    fmt = FORMATS[w.format]
    (k_size, n), groups = w.shape, w.groups
    rows, row_bytes = g.shape[0], w.data.shape[-1]
    padded = row_bytes * fmt.planes
    size = min(n, max(1, _BLOCK_BYTES // row_bytes))

    def share(p, n0, size):
        codes = lax.dynamic_slice(w.data, (layer, p, n0, 0), (1, 1, size, row_bytes))[0, 0]
        blocks = codes.reshape(size, padded // BLOCK, 1, 2 * fmt.bits)
        shifts = (fmt.bits * jnp.arange(fmt.planes, dtype=jnp.uint8))[:, None]
        values = ((blocks >> shifts) & (2**fmt.bits - 1)).astype(jnp.float32) - fmt.offset
        values = values.reshape(size, groups, padded // groups)
        values = (values + _columns(w.zero, layer, p, n0, size)) * _columns(
            w.scale, layer, p, n0, size
        )
        g_block = lax.dynamic_slice(g, (0, n0), (rows, size)).astype(jnp.float32)
        return jnp.einsum("mn,nk->mk", g_block, values.reshape(size, padded))

    def body(i, dx, size=size):
        return sum((share(p, i * size, size) for p in range(w.num_planes)), dx)

    dx = lax.fori_loop(0, n // size, body, jnp.zeros((rows, padded), jnp.float32))
    tail = n % size
    if tail:
        dx = sum((share(p, n - tail, tail) for p in range(w.num_planes)), dx)
    return dx[:, :k_size]


def _columns(leaf, layer, p, n0, size):
    """Scale or zero of rows n0 .. n0 + size, as [size or 1, G, 1]; 0 where there is none."""
    if leaf is None:
        return 0.0
    width = leaf.shape[-1]
    start, take = (n0, size) if width > 1 else (0, 1)
    part = lax.dynamic_slice(leaf, (layer, p, 0, start), (1, 1, leaf.shape[-2], take))[0, 0]
    return part.T[:, :, None]
