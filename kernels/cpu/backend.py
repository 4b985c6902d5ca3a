"""The CPU backend: C++ kernels through the XLA FFI, on XLA's own threads.

They read the canonical layout, so there is nothing to repack: a checkpoint, a noise
model and the kernel see the same bytes. The whole stack and a layer index go in, so
nothing is copied.
"""

import functools
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ..packing import CANONICAL, FORMATS, Packed, pack_numpy
from .build import BuildError, instruction_sets


def threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def why_not(platform: str, x, w: Packed | None) -> str | None:
    """None where the library builds, loads and passes its self-test; else one line."""
    del x
    if platform != "cpu":
        return f"it runs on cpu, this is {platform}"
    if w is not None and w.layout != CANONICAL:
        return f"it reads the canonical layout, found {w.layout!r}"
    return _unusable()


@functools.cache
def _unusable() -> str | None:
    try:
        instruction_sets()
    except BuildError as error:
        return str(error)
    with jax.ensure_compile_time_eval():
        return self_test()


def self_test() -> str | None:
    """Every instruction set on a ragged product against numpy integers; None, or what differs.

    A library built against other headers registers without complaint and fails when
    called; this finds that out before a model does.
    """
    random = np.random.default_rng(0)
    for format, fmt in FORMATS.items():
        values = random.integers(fmt.low, fmt.high + 1, (1, 1, 333, 37)).astype(np.int8)
        data = jnp.asarray(pack_numpy(values, format))
        w = Packed(data, jnp.ones((1, 1, 1, 1)), None, format, shape=(333, 37))
        x = random.integers(-128, 128, (1, 5, 333)).astype(np.int8)
        expected = x[0].astype(np.int64) @ values[0, 0].astype(np.int64)
        for isa in instruction_sets():
            try:
                found = run(jnp.asarray(x), None, w, jnp.int32(0), {"isa": isa, "threads": 1})
            except Exception as error:  # whatever the runtime says of a mismatched library
                return f"its self-test raised {type(error).__name__}: {str(error).splitlines()[0]}"
            if not np.array_equal(np.asarray(found), expected):
                return f"its self-test failed: {isa}, {format} differs from the integer product"
    return None


def heuristic(x=None, w: Packed | None = None) -> Mapping[str, int | str]:
    """The fastest instruction set and all processors."""
    del x, w
    return {"isa": next(iter(instruction_sets())), "threads": threads()}


def run(
    digits: jax.Array,
    x_scale: jax.Array | None,
    w: Packed,
    layer: jax.Array,
    config: Mapping[str, int | str],
) -> jax.Array:
    """The packed product of one layer of a stack; arguments as for `reference.run`.

    config: {"isa": a name in `instruction_sets()`, "threads": how many}.
    """
    instruction_sets()  # registers the targets, also when called by name first
    _, rows, k_size = digits.shape
    attributes = dict(bits=np.int64(FORMATS[w.format].bits), **_attributes(config))
    flat = digits.reshape(-1, k_size)
    out = (rows, w.shape[1])
    if x_scale is None:
        call = jax.ffi.ffi_call("ternax_accumulate", jax.ShapeDtypeStruct(out, jnp.int32))
        return call(flat, w.data, layer, **attributes)
    zero = jnp.zeros((0,), jnp.float32) if w.zero is None else w.zero
    call = jax.ffi.ffi_call("ternax_matmul", jax.ShapeDtypeStruct(out, jnp.float32))
    return call(flat, x_scale.reshape(-1), w.data, w.scale, zero, layer, **attributes)


# The gates of a projection's input, as the library numbers them.
GATES = {None: 0, "silu": 1, "relu2": 2}


def project(
    x: jax.Array,
    norm: jax.Array | None,
    w: Packed,
    residual: jax.Array | None,
    layer: jax.Array,
    *,
    gate: str | None,
    eps: float,
    config: Mapping[str, int | str] | None = None,
) -> jax.Array:
    """A projection with all that stands round it, in one call: no array between is written.

    residual + int8(norm(gate(x))) W, where int8 is one scale a token. The formulas are those
    of the compositions in `ternax.nn.linear`, but sums are taken in another order and products
    may be fused with additions: an input between two int8 codes may take the other one.

    Args:
      x: f32 [M, K]; with a gate [M, 2 K], act(first half) * second half.
      norm: f32 [K], RMSNorm's weight, or None.
      w: integer codes [L, P, N, bytes].
      residual: f32 [M, N], added to the product, or None.
      layer: int32 [].
      gate: a key of GATES.
      eps: of the norm.
      config: as for `run`.

    Returns:
      f32 [M, N].
    """
    none = jnp.zeros((0,), jnp.float32)
    call = jax.ffi.ffi_call(
        "ternax_project", jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32)
    )
    return call(
        x,
        none if norm is None else norm,
        w.data,
        w.scale,
        none if w.zero is None else w.zero,
        layer,
        none if residual is None else residual,
        bits=np.int64(FORMATS[w.format].bits),
        gate=np.int64(GATES[gate]),
        eps=np.float32(eps),
        **_attributes(config or heuristic()),
    )


def step(qkv, rope, k, v, k_scale, v_scale, start, length, layer, config=None):
    """Rotates q and k, puts k and v into the cache in place, and attends.

    Args:
      qkv: f32 [B, T, (H + 2 G) E], as the fused projection leaves it.
      rope: cosines and sines, two f32 [B, T, 1, E / 2].
      k, v: [L, B, G, S, E]: uint16 (bf16's bits), int8 or f32; copied by XLA unless donated.
      k_scale, v_scale: f32 [L, B, G, S] for int8, else None.
      start: int32 [B], first slot in use of each row.
      length: int32 [], slots in use before these tokens.
      layer: int32 [].

    Returns:
      (f32 [B, T, H, E], k, v, k_scale, v_scale).
    """
    batch, tokens, columns = qkv.shape
    groups, width = k.shape[2], k.shape[4]
    none = jnp.zeros((0,), jnp.float32)
    cosine, sine = (table.reshape(batch, tokens, width // 2) for table in rope)
    stores = (k, v, none if k_scale is None else k_scale, none if v_scale is None else v_scale)
    out = jax.ShapeDtypeStruct((batch, tokens, columns // width - 2 * groups, width), jnp.float32)
    call = jax.ffi.ffi_call(
        "ternax_step",
        (out, *(jax.ShapeDtypeStruct(store.shape, store.dtype) for store in stores)),
        input_output_aliases={3: 1, 4: 2, 5: 3, 6: 4} if k_scale is not None else {3: 1, 4: 2},
    )
    out, k, v, *scales = call(
        qkv,
        cosine,
        sine,
        *stores,
        start,
        length,
        layer,
        **_attributes(config or heuristic()),
    )
    return out, k, v, *(scales if k_scale is not None else (None, None))


def zeros(shape: tuple[int, ...], dtype) -> jax.Array:
    """An array of zeros on huge pages, where the system gives them: see `kernels.memory`."""
    instruction_sets()
    call = jax.ffi.ffi_call("ternax_zeros", jax.ShapeDtypeStruct(shape, dtype))
    return call(threads=np.int64(threads()))


def _attributes(config) -> dict[str, np.int64]:
    if config["threads"] < 1:
        raise ValueError(f"threads must be at least 1, found {config['threads']}")
    return dict(
        isa=np.int64(instruction_sets()[config["isa"]]), threads=np.int64(config["threads"])
    )
