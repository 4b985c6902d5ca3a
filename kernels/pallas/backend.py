"""The GPU backend: Pallas kernels on Mosaic GPU, for Hopper's wgmma and TMA.

Weights come in tiles (`tiles.repack`), the whole stack with a layer index, so nothing is
copied. Products are exact in int32; scales enter behind them, in XLA, by the reference's own
formula, so both backends give the same floats.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .. import reference, target, tuning
from ..packing import NUM_DIGITS, Packed, pack_numpy
from . import tiles

# `plgpu.kernel` as it is called here; older ones differ, and jax 0.10 cannot interpret it.
MIN_JAX = (0, 11, 2)
# wgmma on int8 with one operand in registers, TMA. Not Blackwell, which has neither.
COMPUTE_CAPABILITY = "9.0"
# The accumulator of a bit position holds up to 128 * 128 * K / 4.
_MAX_K = 2**31 // (128 * 128 // 4) - 1


def why_not(platform: str, x, w: Packed | None) -> str | None:
    """None where the kernels run, on a GPU that has passed their self-test; else one line.

    Raises:
      tuning.TunedFileError: they would, but not by the device's tuned file.
    """
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
    tuning.settings(device.kind, (0, 0), 1)  # whether it can be read
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
    with jax.ensure_compile_time_eval():
        return self_test()


def self_test() -> str | None:
    """A ragged product of each number of rows against numpy integers; None, or what differs."""
    random = np.random.default_rng(0)
    k_size, n = 1300, 333
    values = random.integers(-1, 2, (2, 1, k_size, n)).astype(np.int8)
    w = Packed(jnp.asarray(pack_numpy(values, "trit2")), jnp.ones((2, 1, 1, 1)), shape=(k_size, n))
    w = tiles.repack(w)
    for rows in (1, 11, 40):
        x = random.integers(-128, 128, (1, rows, k_size)).astype(np.int8)
        expected = x[0].astype(np.int64) @ values[1, 0].astype(np.int64)
        try:
            found = run(jnp.asarray(x), None, w, jnp.int32(1), heuristic(x[0], w))
        except Exception as error:  # whatever compiler or driver say
            return f"its self-test raised {type(error).__name__}: {str(error).splitlines()[0]}"
        if not np.array_equal(np.asarray(found), expected):
            return f"its self-test failed: {rows} rows differ from the integer product"
    return None


def heuristic(x, w: Packed) -> Mapping[str, int]:
    """The decode kernel's settings on the target device: tuned ones, where a file has them.

    Raises:
      tuning.TunedFileError: it is for another layout, or no such file at all.
    """
    from . import decode

    device = target.current()
    if x is not None and w is not None:
        rows = x.shape[-2] * (1 if x.dtype == jnp.int8 else NUM_DIGITS)
        tuned = tuning.settings(device.kind, w.shape, rows)
        if tuned is not None:
            return tuned
    return decode.heuristic(device.core_count)


def run(
    digits: jax.Array,
    x_scale: jax.Array | None,
    w: Packed,
    layer: jax.Array,
    config: Mapping[str, int],
    interpret: bool = False,
) -> jax.Array:
    """The packed product of one layer of a stack; arguments as for `reference.run`.

    Rows beyond what one pass holds, digits counted, read the weights again.

    config: of `decode.accumulate`; interpret: as there.
    """
    from . import decode

    flat = digits.reshape(-1, digits.shape[-1])
    parts = [
        decode.accumulate(flat[i : i + decode.MAX_ROWS], w.data, w.shape, layer, config, interpret)
        for i in range(0, flat.shape[0], decode.MAX_ROWS)
    ]
    sums = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    if x_scale is None:
        return sums[:, 0]
    share = reference.combine(digits, x_scale, w, layer)
    return functools.reduce(jnp.add, (share(sums[:, p], p, 0, 0) for p in range(w.num_planes)))
