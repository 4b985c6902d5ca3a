"""Step `exactness`: every kernel against integer products, and attention against floats.

The oracle takes trits out of the canonical bytes and multiplies int32 by int32 on the device,
by a program that shares nothing with the kernels.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ternax.gpu.made import Step
from ternax.kernels import attention, backends, bench, ring, shapes, target
from ternax.kernels.packing import FORMATS, Packed, float_to_bits, unpack
from ternax.kernels.pallas import backend as mosaic
from ternax.kernels.pallas import decode

# Ragged along K and N, shorter than a tile, of several tiles.
RAGGED = ((1300, 333), (64, 192), (512, 128), (500, 1000), (4096, 40))
ROWS = (1, 3, 8, 16, 17, 64)
REAL = {"70b": (1, 16, 64), "8b": (1, 16), "2b4t": (1, 16)}
HEAD_ROWS = (3, 12, 48)
LONG_ROWS, LONG = 2048, ("70b:qkv", "70b:down")
# Largest error of attention, over the largest value: its probabilities times values may be
# rounded to bf16, a relative 2^-8, and errors of many slots average out.
ATTENTION_ERROR = 2.0**-8


def run(step: Step, rows: Callable[[int], bool] = lambda count: True) -> None:
    """A Record a kernel, shape and number of `rows`; `max_abs_error` is 0 where it is exact."""
    names = names_here(step)
    for label, shape, counts, format in cases(step.rehearse):
        counts = tuple(filter(rows, counts))
        if step.left_s < 0:
            step.say(f"exactness: no time left for {label} and what follows")
            break
        # Of large shapes the reference would take the time that kernels have.
        able = [name for name in names if ":" not in label or name != "reference"]
        if counts and able:
            _check(step, able, label, weights(shape, format), counts)


def names_here(step: Step) -> list[str]:
    """Backends that can run here; the others say why not."""
    found = []
    for name in backends.BACKENDS:
        try:
            backends.choose(target.current().platform, name=name)
        except ValueError as error:
            step.say(f"without {name}: {str(error).splitlines()[0]}")
        else:
            found.append(name)
    return found


def cases(rehearse: bool):
    """(label, (K, N), numbers of rows, format): heads are int8, with three rows a token."""
    for shape in RAGGED[:2] if rehearse else RAGGED:
        yield "{}x{}".format(*shape), shape, ROWS[:2] if rehearse else ROWS, "trit2"
    yield "{}x{}, int8".format(*RAGGED[0]), RAGGED[0], HEAD_ROWS, "int8"
    for model, rows in () if rehearse else REAL.items():
        for name, shape in shapes.products(model).items():
            if name.endswith(":head"):
                yield name, shape, HEAD_ROWS, "int8"
            else:
                yield name, shape, (*rows, *([LONG_ROWS] if name in LONG else [])), "trit2"


def weights(shape: tuple[int, int], format: str = "trit2") -> Packed:
    """Two layers of random codes, in canonical bytes; the second is multiplied."""
    k_size, n = shape
    data = bench.fill(jnp.zeros((2, 1, n, FORMATS[format].row_bytes(k_size)), jnp.uint8), format)
    return Packed(data, jnp.ones((2, 1, 1, 1), jnp.float32), None, format, shape=shape)


@functools.partial(jax.jit, static_argnums=(2, 3))
def oracle(x: jax.Array, rows: jax.Array, k_size: int, format: str = "trit2") -> jax.Array:
    """x: int8 [M, K], rows: uint8 [N, row bytes] -> int32 [M, N]."""
    values = unpack(rows, format, k_size)
    # Behind the barrier the compiler cannot see that they are small.
    a, b = lax.optimization_barrier((x.astype(jnp.int32), values.astype(jnp.int32)))
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _check(step: Step, names: list[str], label: str, w: Packed, rows: Sequence[int]) -> None:
    """Products of the first rows of the same activations, against one product of the oracle."""
    x = jnp.asarray(ring.host_rows(max(rows), w.shape[0]))
    expected = oracle(x, w.data[1, 0], w.shape[0], w.format)
    own = {name: bench.repacked(name, w) for name in names}
    with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
        waiting = {}
        for name in names:
            for count in rows:
                try:
                    lowered = _lowered(name, x[:count], own[name])
                    waiting[name, count] = pool.submit(lowered.compile)
                except Exception as error:
                    _failed(step, name, label, count, error)
        for (name, count), future in waiting.items():
            try:
                found = future.result()(x[:count], own[name], jnp.int32(1))
                off = jnp.abs(found - expected[:count])
                wrong, most = int(jnp.sum(off != 0)), int(jnp.max(off))
            except Exception as error:
                _failed(step, name, label, count, error)
                continue
            if wrong:
                step.say(f"exactness: {name}, {label} x {count} WRONG in {wrong} sums")
            note = f"exactness, {count} rows: {f'WRONG in {wrong} sums' if wrong else 'exact'}"
            step.keep("kernel", {"max_abs_error": most}, note, **_of(name, label, count))


def _lowered(name: str, x: jax.Array, w: Packed) -> jax.stages.Lowered:
    backend = backends.BACKENDS[name]
    config = dict(backend.heuristic(x, w))
    # Of many rows a kernel stores what is scaled already; by 1, which is exact below 2^24.
    scale = jnp.ones((x.shape[0], 1)) if x.shape[0] > decode.MAX_ROWS else None

    def product(x, w, layer):
        return backend.run(x[None], scale, w, layer, config).astype(jnp.int32)

    return jax.jit(product).lower(x, w, jnp.int32(1))


def _failed(step: Step, name: str, label: str, count: int, error: Exception) -> None:
    said = (str(error).strip() or "it said nothing").splitlines()[0][:200]
    step.say(f"exactness: {name}, {label} x {count} FAILED: {type(error).__name__}: {said}")
    note = f"exactness, {count} rows: FAILED to run: {type(error).__name__}: {said}"
    step.keep("kernel", {}, note, **_of(name, label, count))


def _of(name: str, label: str, count: int) -> dict:
    return dict(config=label, inputs="int8", backend=name, batch=count)


def attend(step: Step) -> None:
    """One token over caches, each backend beside the reference: heads of 70b, 8b, 2b4t."""
    heads = [(4, 2, 32)] if step.rehearse else [(64, 8, 128), (32, 8, 128), (20, 5, 128)]
    slots, batch, names = *((32, 2) if step.rehearse else (1024, 3)), names_here(step)
    for (query, groups, width), dtype in ((h, d) for h in heads for d in ("bf16", "int8")):
        arguments = cache_arguments(query, groups, width, slots, batch, dtype)
        expected = None
        for name in ("reference", *(n for n in names if n != "reference")):
            step_of = jax.jit(functools.partial(attention.step_attention, backend=name))
            label = f"attention {query}/{groups} x {width}, {dtype} cache of {slots} slots"
            try:
                found = [
                    np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(step_of(*arguments))
                ]
            except Exception as error:
                said = (str(error).strip() or "it said nothing").splitlines()[0][:200]
                step.say(f"exactness: {name}, {label} FAILED: {type(error).__name__}: {said}")
                continue
            if expected is None:
                expected = found
                continue
            off = float(np.max(np.abs(found[0] - expected[0])) / np.max(np.abs(expected[0])))
            # Codes may differ by one where a quotient lies between two.
            stored = max(
                float(np.max(np.abs(a - b))) for a, b in zip(found[1:], expected[1:], strict=True)
            )
            wrong = "" if off <= ATTENTION_ERROR and stored <= 1 else "WRONG: "
            if wrong:
                step.say(f"exactness: {name}, {label} WRONG: off by {off:.3g} of the largest")
            step.keep(
                "kernel",
                {"relative_error": off, "max_abs_error": stored},
                f"exactness, {wrong}largest error over the largest value; in the cache: "
                f"{stored:g} at most{way(name, arguments[0], arguments[2])}",
                config=label,
                backend=name,
                batch=batch,
                context=slots,
            )


def way(name: str, qkv: jax.Array, k: jax.Array) -> str:
    """ "; by XLA: ..." for a backend whose own kernel does not take these; "" where it does."""
    if name != "mosaic":
        return ""
    reason = mosaic.why_not_attend(qkv, k)
    return f"; by XLA: {reason}" if reason else ""


def cache_arguments(
    query: int, groups: int, width: int, slots: int, batch: int, dtype: str, layers: int = 2
):
    """Arguments of `step_attention`: a cache in use up to its last slot but two, in layer 1."""
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    qkv = normal(batch, 1, (query + 2 * groups) * width)
    angle = normal(batch, 1, 1, width // 2)
    stored = [normal(layers, batch, groups, slots, width) for _ in "kv"]
    scales: list[jax.Array | None] = [None, None]
    if dtype == "int8":
        peaks = [jnp.max(jnp.abs(store), axis=-1) / 127 for store in stored]
        codes = [jnp.round(s / p[..., None]) for s, p in zip(stored, peaks, strict=True)]
        stored, scales = [code.astype(jnp.int8) for code in codes], [*peaks]
    else:
        stored = [float_to_bits(store, "bf16") for store in stored]
    start = jax.random.randint(next(keys), (batch,), 0, slots // 2)
    rope = jnp.cos(angle), jnp.sin(angle)
    return qkv, rope, *stored, *scales, start, jnp.int32(slots - 3), jnp.int32(1)
