"""The GPU backend: Pallas kernels on Mosaic GPU, for Hopper's wgmma and TMA.

Weights come in tiles (`tiles.repack`), the whole stack with a layer index, so nothing is
copied. Products are exact in int32; scales enter behind them, in XLA, by the reference's own
formula, so both backends give the same floats.
"""

import concurrent.futures
import functools
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .. import reference, target
from ..packing import Packed, pack_numpy
from . import tiles

# `plgpu.kernel` as it is called here; older ones differ, and jax 0.10 cannot interpret it.
MIN_JAX = (0, 11, 2)
# wgmma on int8 with one operand in registers, TMA. Not Blackwell, which has neither.
COMPUTE_CAPABILITY = "9.0"
# Of a float activation, see `ternary_matmul.to_digits`.
_DIGITS = 3
# The accumulator of a bit position holds up to 128 * 128 * K / 4.
_MAX_K = 2**31 // (128 * 128 // 4) - 1


def why_not(platform: str, x, w: Packed | None) -> str | None:
    """None where the kernels run, on a GPU that has passed their self-test; else one line."""
    del x
    if platform != "gpu":
        return f"it runs on gpu, this is {platform}"
    if jax.__version_info__ < MIN_JAX:
        needs = ".".join(map(str, MIN_JAX))
        return f"it needs jax {needs} or later (Python 3.12), found {jax.__version__}"
    device = target.current()
    if device.compute_capability != COMPUTE_CAPABILITY:
        return (
            f"it needs compute capability {COMPUTE_CAPABILITY} (H100, H200), {device.kind} has "
            f"{device.compute_capability or 'none'}"
        )
    return _unfit(w) or (_unusable() if device.present else None)


def _unfit(w: Packed | None) -> str | None:
    """What of a weight the kernels cannot read."""
    if w is None:
        return None
    if w.format != "trit2":
        return f"it multiplies trit2, found {w.format}"
    if w.groups != 1:
        return f"it takes one scale group along K, found {w.groups}"
    if w.shape[0] > _MAX_K:
        return f"its accumulators hold K up to {_MAX_K}, found {w.shape[0]}"
    if w.layout != tiles.LAYOUT:
        return f"it reads the layout {tiles.LAYOUT!r}, found {w.layout!r}"
    return None


@functools.cache
def _unusable() -> str | None:
    return _aside(self_test)


def _aside(test):
    """What a test returns, called in a thread of its own: whoever asks may be tracing, a thread
    does not. `jax.ensure_compile_time_eval` would take a kernel's own indices for constants."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(test).result()


def self_test() -> str | None:
    """Ragged products of few and many rows against numpy integers; None, or what differs.

    Many rows both added up and written at once, scaled: by powers of two, which are exact.
    """
    random = np.random.default_rng(0)
    k_size, n = 1300, 333
    values = random.integers(-1, 2, (2, 1, k_size, n)).astype(np.int8)
    w = Packed(jnp.asarray(pack_numpy(values, "trit2")), jnp.ones((2, 1, 1, 1)), shape=(k_size, n))
    w = tiles.repack(w)
    for rows, changes in (1, {}), (11, {}), (40, {"split": 1}), (140, {"split": 0}):
        x = random.integers(-128, 128, (1, rows, k_size)).astype(np.int8)
        expected = x[0].astype(np.int64) @ values[1, 0].astype(np.int64)
        scale = 2.0 ** random.integers(-3, 3, (rows, 1)).astype(np.float32)
        config = {**heuristic(x[0], w), **changes}
        try:
            y = run(jnp.asarray(x), jnp.asarray(scale), w, jnp.int32(1), config)
            found = np.asarray(y) / scale
        except Exception as error:  # whatever compiler or driver say
            return f"its self-test raised {type(error).__name__}: {str(error).splitlines()[0]}"
        if not np.array_equal(found, expected):
            return f"its self-test failed: {rows} rows differ from the integer product"
    return None


def heuristic(x, w: Packed) -> Mapping[str, int]:
    """The settings, on the target device, of the kernel for as many rows as x has.

    x may be float, then each of its rows is one for each digit.
    """
    from . import decode, matrix_pieces

    blocks = target.current().core_count
    rows = 1 if x is None else x.shape[0] * (1 if x.dtype == jnp.int8 else _DIGITS)
    if rows <= decode.MAX_ROWS:
        return decode.heuristic(blocks)
    return matrix_pieces.heuristic(w.shape, w.num_planes, rows, blocks)


def run(
    digits: jax.Array,
    x_scale: jax.Array | None,
    w: Packed,
    layer: jax.Array,
    config: Mapping[str, int],
    interpret: bool = False,
) -> jax.Array:
    """The packed product of one layer of a stack; arguments as for `reference.run`.

    config: of `matrix.accumulate`; or of `decode.accumulate`, which reads the weights again for
    rows beyond what one pass holds, digits counted. interpret: as there.
    """
    from . import decode, matrix

    flat = digits.reshape(-1, digits.shape[-1])
    arguments = w.data, w.shape, layer, config, interpret
    if "strip" in config:
        plain = digits.shape[0] * w.num_planes == 1 and w.zero is None
        if plain and x_scale is not None and not config["split"]:
            scale = jnp.broadcast_to(w.scale[layer, 0, 0], w.shape[1])
            return matrix.scaled(flat, (x_scale[:, 0], scale), *arguments)
        sums = matrix.accumulate(flat, *arguments)
    else:
        starts = range(0, flat.shape[0], decode.MAX_ROWS)
        parts = [decode.accumulate(flat[i : i + decode.MAX_ROWS], *arguments) for i in starts]
        sums = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    if x_scale is None:
        return sums[:, 0]
    share = reference.combine(digits, x_scale, w, layer)
    return functools.reduce(jnp.add, (share(sums[:, p], p, 0, 0) for p in range(w.num_planes)))


def why_not_attend(qkv, k) -> str | None:
    """None where `attend` takes these arguments, in a program that this backend runs; says aloud
    where a GPU has failed the self-test."""
    from . import attention

    reason = attention.why_not(qkv, k)
    return reason or (_unusable_attention() if target.current().present else None)


@functools.cache
def _unusable_attention() -> str | None:
    from . import attention_self_test

    reason = _aside(attention_self_test.self_test)
    if reason:
        warnings.warn(f"decode attention on Mosaic GPU is not used: {reason}", stacklevel=3)
    return reason


def attend(qkv, rope, k, v, k_scale, v_scale, start, length, layer):
    """One token a row, as `kernels.attention.step_attention` has it, by `attention.step`."""
    from . import attention

    heads = qkv.shape[-1] // k.shape[-1] - 2 * k.shape[2]
    config = attention.heuristic(target.current().core_count, heads, k)
    return attention.step(qkv, rope, k, v, k_scale, v_scale, start, length, layer, config)
