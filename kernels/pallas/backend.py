"""The GPU backend: Pallas kernels on Mosaic GPU, for Hopper's wgmma and TMA.

Trits come in tiles (`tiles.repack`), int8 codes as they are, each the whole stack with a layer
index, so nothing is copied. Products are exact in int32; scales enter behind them, in XLA, by
the reference's own formula, so both backends give the same floats.
"""

import concurrent.futures
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .. import reference, target, tuning
from ..packing import CANONICAL, FORMATS, NUM_DIGITS, Packed, pack_numpy
from . import attention_settings, tiles

# `plgpu.kernel` as it is called here; older ones differ, and jax 0.10 cannot interpret it.
MIN_JAX = (0, 11, 2)
# wgmma on int8 with one operand in registers, TMA. Not Blackwell, which has neither.
COMPUTE_CAPABILITY = "9.0"
# Of each format: the layout that its kernel reads, and the longest K. The accumulator of one of
# four bit positions of trits holds up to 128 * 128 * K / 4, that of int8 128 * 128 * K.
_LAYOUTS = {"trit2": tiles.LAYOUT, "int8": CANONICAL}
_MAX_K = {"trit2": 2**31 // (128 * 128 // 4) - 1, "int8": 2**31 // (128 * 128) - 1}
# Each pass over a table holds a few rows, and the sums of all passes lie in memory together: a
# whole text is better off with the reference, which has neither.
_MAX_TABLE_ROWS = 256


def why_not(platform: str, x, w: Packed | None) -> str | None:
    """None where the kernels run, on a GPU that has passed their self-test; else one line.

    Says aloud where a GPU has failed it.

    Raises:
      tuning.TunedFileError: they would, but not by the device's tuned file.
    """
    if reason := unable(platform):
        return reason
    device = target.current()
    tuning.settings(device.kind, (0, 0), 1)  # whether it can be read
    if reason := _unfit(x, w):
        return reason
    formats = (_LAYOUTS if w is None else (w.format,)) if device.present else ()
    return next(filter(None, map(_unusable, formats)), None)


def unable(platform: str) -> str | None:
    """None where what Mosaic GPU compiles for Hopper can run; else one line."""
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
    return None


def _unfit(x, w: Packed | None) -> str | None:
    """What of a weight the kernels cannot read, or of a table the reference reads as well."""
    if w is None:
        return None
    if w.format not in _LAYOUTS:
        return f"it multiplies {' and '.join(_LAYOUTS)}, found {w.format}"
    if w.groups != 1:
        return f"it takes one scale group along K, found {w.groups}"
    if w.format == "int8" and w.num_planes != 1:
        return f"it takes one plane of int8, found {w.num_planes}"
    if w.shape[0] > _MAX_K[w.format]:
        return f"its accumulators hold K up to {_MAX_K[w.format]}, found {w.shape[0]}"
    if w.layout != _LAYOUTS[w.format]:
        return f"it reads {w.format} in the layout {_LAYOUTS[w.format]!r}, found {w.layout!r}"
    if w.format == "int8" and x is not None and x.shape[0] > _MAX_TABLE_ROWS:
        return f"it takes int8 times up to {_MAX_TABLE_ROWS} rows of x, found {x.shape[0]}"
    return None


@functools.cache
def _unusable(format: str) -> str | None:
    return _tried(f"kernels of {format}", functools.partial(self_test, format))


def _tried(what: str, test: Callable[[], str | None]) -> str | None:
    """What a self-test returns, said aloud where it is a reason not to use `what`.

    It runs in a thread of its own: whoever asks may be tracing, a thread does not.
    `jax.ensure_compile_time_eval` would take a kernel's own indices for constants.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reason = pool.submit(test).result()
    if reason:
        warnings.warn(f"{what} on Mosaic GPU are not used: {reason}", stacklevel=4)
    return reason


def self_test(format: str) -> str | None:
    """Ragged products of several numbers of rows against numpy integers; None, or what differs.

    Scales are powers of two, which are exact.
    """
    # Many rows added up, and in wide pieces written at once; blocks that go over several tiles
    # of a table.
    split, table = {"split": 1}, {"blocks": 2}
    whole = {"split": 0, "strip": 2, "rows": 80, "slices": 8}
    cases: dict[str, list[tuple[int, dict[str, int]]]] = {
        "trit2": [(1, {}), (11, {}), (40, split), (140, whole)],
        "int8": [(3, table), (105, table)],
    }
    random, high = np.random.default_rng(0), FORMATS[format].high
    k_size, n = 1300, 600
    values = random.integers(-high, high + 1, (2, 1, k_size, n)).astype(np.int8)
    data, scale = jnp.asarray(pack_numpy(values, format)), jnp.ones((2, 1, 1, 1))
    w = Packed(data, scale, format=format, shape=(k_size, n))
    w = tiles.repack(w) if format == "trit2" else w
    for count, settings in cases[format]:
        x = random.integers(-128, 128, (1, count, k_size)).astype(np.int8)
        expected = x[0].astype(np.int64) @ values[1, 0].astype(np.int64)
        config = {**heuristic(x[0], w), **settings}
        product = jax.jit(lambda x, s, w, config=config: run(x, s, w, jnp.int32(1), config))
        x_scale = 2.0 ** random.integers(-3, 3, (count, 1)).astype(np.float32)
        try:
            found = np.asarray(product(jnp.asarray(x), jnp.asarray(x_scale), w)) / x_scale
        except Exception as error:  # whatever compiler or driver say
            line = str(error).partition("\n")[0]
            return f"its self-test of {format} raised {type(error).__name__}: {line}"
        if not np.array_equal(found, expected):
            return f"its self-test of {format} failed: {count} rows differ from integer products"
    return None


def _kernel(w: Packed | None):
    """The module of the kernel that multiplies w by few rows."""
    from . import decode, head

    return head if w is not None and w.format == "int8" else decode


def heuristic(x, w: Packed) -> Mapping[str, int]:
    """The settings, on the target device, of the kernel for as many rows as x has: tuned ones of
    the decode kernel, where a file has them.

    x may be float, then each of its rows is one for each digit.

    Raises:
      tuning.TunedFileError: the file is for another layout, or no such file at all.
    """
    from . import decode, matrix_pieces

    device = target.current()
    blocks = device.core_count
    rows = 1 if x is None else x.shape[0] * (1 if x.dtype == jnp.int8 else NUM_DIGITS)
    if _kernel(w) is decode and rows > decode.MAX_ROWS:
        return matrix_pieces.heuristic(w.shape, w.num_planes, rows, blocks)
    if _kernel(w) is decode and x is not None and w is not None:
        tuned = tuning.settings(device.kind, w.shape, rows)
        if tuned is not None:
            return tuned
    return _kernel(w).heuristic(blocks)


def chain_heuristic(shapes: Sequence[tuple[int, int]], rows: int) -> Mapping[str, int]:
    """The same of a chain whose links have these (K, N)."""
    from . import chain

    device = target.current()
    widest = max(shapes, key=lambda shape: shape[0] * shape[1])
    tuned = tuning.settings(device.kind, widest, rows, "chain") or {}
    # A file may be older than a setting.
    found = {k: tuned.get(k, v) for k, v in chain.heuristic(device.core_count).items()}
    # Blocks wait for one another: more than there are processors would wait for ever.
    return found | {"blocks": min(found["blocks"], device.core_count)}


def run(
    digits: jax.Array,
    x_scale: jax.Array | None,
    w: Packed,
    layer: jax.Array,
    config: Mapping[str, int],
    interpret: bool = False,
) -> jax.Array:
    """The packed product of one layer of a stack; arguments as for `reference.run`.

    config: of `matrix.accumulate`; or of `accumulate` of the format's other kernel, which reads
    the weights again for rows beyond what one pass holds, digits counted. interpret: as there.
    """
    flat = digits.reshape(-1, digits.shape[-1])
    arguments = w.data, w.shape, layer, config, interpret
    if "strip" in config:
        from . import matrix

        plain = digits.shape[0] * w.num_planes == 1 and w.zero is None
        if plain and x_scale is not None and not config["split"]:
            scale = jnp.broadcast_to(w.scale[layer, 0, 0], w.shape[1])
            return matrix.scaled(flat, (x_scale[:, 0], scale), *arguments)
        sums = matrix.accumulate(flat, *arguments)
    else:
        kernel = _kernel(w)
        starts = range(0, flat.shape[0], kernel.MAX_ROWS)
        parts = [kernel.accumulate(flat[i : i + kernel.MAX_ROWS], *arguments) for i in starts]
        sums = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    if x_scale is None:
        return sums[:, 0]
    share = reference.combine(digits, x_scale, w, layer)
    return functools.reduce(jnp.add, (share(sums[:, p], p, 0, 0) for p in range(w.num_planes)))


def why_not_attend(qkv, k) -> str | None:
    """None where `attend` takes these arguments, in a program that this backend runs; says aloud
    where a GPU has failed the self-test."""
    reason = attention_settings.why_not(qkv, k)
    return reason or (_unusable_attention() if target.current().present else None)


@functools.cache
def _unusable_attention() -> str | None:
    from . import attention_self_test

    return _tried("kernels of decode attention", attention_self_test.self_test)


def why_not_chain() -> str | None:
    """None where chains run; says aloud where a GPU has failed their self-test."""
    return _unusable_chain() if target.current().present else None


@functools.cache
def _unusable_chain() -> str | None:
    from . import chain_self_test

    return _tried("chains", chain_self_test.self_test)


def attend(qkv, rope, k, v, k_scale, v_scale, start, length, layer):
    """One token a row, as `kernels.attention.step_attention` has it, by `attention.step`."""
    from . import attention

    heads = qkv.shape[-1] // k.shape[-1] - 2 * k.shape[2]
    config = attention_settings.heuristic(target.current().core_count, heads, k)
    return attention.step(qkv, rope, k, v, k_scale, v_scale, start, length, layer, config)
