"""How fast each backend multiplies, beside how fast this machine reads memory.

    python -m ternax.kernels.bench --backend=reference --shapes=70b --batch=1,4

One JSON line a backend, shape and batch. Each product reads another layer of a stack
larger than the last-level cache, and between samples the same bytes are summed: a shared
machine's bandwidth moves by a factor of two within minutes. Backends and batches of a shape
are measured in turn, sample by sample, and their ratio is one of pairs. Products run inside one
compiled loop, as they do in a decode step, so no dispatch is in the time.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import reading
from .backends import BACKENDS, BackendError, choose
from .memory import zeros
from .packing import FORMATS, Packed
from .shapes import SHAPES, products
from .ternary_matmul import ternary_matmul

MIN_SAMPLES = 5
# A stack is this many times the last-level cache, which is taken for this if unknown.
_ROTATION = 4
_CACHE_BYTES = 64 << 20
# A sample goes over the stack this many times, so that starting it is less than a hundredth.
_PASSES = 4


class UsageError(ValueError):
    """A name or number that cannot be used; exit code 2."""


class DoesNotFit(ValueError):
    """More memory than is free; exit code 3."""


def find_shapes(names: str) -> list[tuple[str, int, int, str]]:
    """(name, K, N, format) of "70b" (all of a model), "70b:down" or "8192x28672".

    A head is int8 under float activations, as models store it; all else is trit2 under int8.
    """
    found = []
    for name in names.split(","):
        k_size, _, n = name.partition("x")
        if k_size.isdecimal() and n.isdecimal() and int(k_size) and int(n):
            found.append((name, int(k_size), int(n), "trit2"))
        elif known := products(name):
            for each, shape in known.items():
                found.append((each, *shape, "int8" if each.endswith(":head") else "trit2"))
        else:
            raise UsageError(
                f"--shapes: expected KxN, or one of {', '.join(SHAPES)}, alone or as model:part "
                f"with part among {', '.join(SHAPES['70b'])}; found {name!r}"
            )
    return found


def find_backends(name: str) -> list[str]:
    """Those that can run: all that can for "all", else the named ones or an error.

    A name may carry settings of the backend's own: "cpu:isa=avx2:threads=1".
    """
    platform = jax.default_backend()
    if name != "all":
        for each in name.split(","):
            choose(platform, name=each.partition(":")[0])
        return name.split(",")
    found = []
    for each, backend in BACKENDS.items():
        reason = backend.why_not(platform, None, None)
        if reason:
            print(f"skipped {each}: {reason}", file=sys.stderr)
        else:
            found.append(each)
    return found


def settings(backend: str) -> dict[str, int | str]:
    """What "cpu:isa=avx2:threads=1" sets, numbers as numbers."""
    pairs = [part.partition("=") for part in backend.split(":")[1:]]
    return {key: int(value) if value.isdecimal() else value for key, _, value in pairs}


def cache_bytes() -> int:
    """Size of the largest cache of the first processor, or a guess."""
    sizes = [0]
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1]
        sizes.append(int(number) << {"K": 10, "M": 20}.get(unit, 0) if number.isdecimal() else 0)
    return max(sizes) or _CACHE_BYTES


def free_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(s.split()[1]) << 10 for s in lines if s.startswith("MemAvailable")), None)


def stack_shape(k_size: int, n: int, format: str) -> tuple[int, int, int, int]:
    """[L, 1, N, row bytes] with L large enough to leave the cache behind."""
    row = FORMATS[format].row_bytes(k_size)
    return -(-_ROTATION * cache_bytes() // (n * row)), 1, n, row


def check_fits(shapes) -> None:
    """Raises DoesNotFit before anything is allocated."""
    free = free_bytes()
    for name, k_size, n, format in shapes:
        layers, _, _, row = stack_shape(k_size, n, format)
        need = layers * n * row
        if free is not None and need > 0.8 * free:
            raise DoesNotFit(
                f"--shapes: {name} needs {need / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB are "
                "free; name single parts of the model, as in --shapes=70b:down"
            )


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0, keep_unused=True)
def fill(data, format) -> jax.Array:
    """Valid codes of a counter hash in place of `data`: half of the trits are zero."""
    x = lax.iota(jnp.uint32, data.size // 4) * jnp.uint32(2654435761)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x ^= x >> 15
    if format == "trit2":
        nonzero = x & jnp.uint32(0x55555555)
        codes = ((nonzero & (x >> 1)) << 1) | (nonzero ^ jnp.uint32(0x55555555))
    else:  # no integer code is 0
        codes = x | jnp.uint32(0x01010101 if format == "int8" else 0x11111111)
    return lax.bitcast_convert_type(codes, jnp.uint8).reshape(data.shape)


@functools.partial(jax.jit, static_argnums=0)
def _products(backend, x, w: Packed) -> jax.Array:
    """Every layer's product, _PASSES times, summed: none is left out, x cannot be prepared once."""

    name, own = backend.partition(":")[0], settings(backend)
    config = dict(BACKENDS[name].heuristic(x, w))
    if unknown := own.keys() - config.keys():
        raise UsageError(
            f"--backend: {name} has no setting {min(unknown)!r}; it has {', '.join(config)}"
        )
    config |= own

    layers = w.data.shape[0]

    def body(i, total):
        if x.dtype == jnp.int8:
            rows, scale = x ^ i.astype(jnp.int8), jnp.ones((x.shape[0], 1), jnp.float32)
        else:
            rows, scale = x * i.astype(jnp.float32), None
        y = ternary_matmul(
            rows,
            w,
            layer=i % layers,
            x_scale=scale,
            out_dtype=jnp.float32,
            backend=name,
            config=config,
        )
        return total + y.sum()

    return lax.fori_loop(0, _PASSES * layers, body, jnp.float32(0))


def reader(data: jax.Array):
    """(() -> gigabytes per second of reading `data`, on all processors or the accelerator; how).

    As often behind one another as products go over it, and for the same reason.
    """
    if jax.default_backend() != "cpu":
        read = jax.jit(lambda d: jnp.max(lax.bitcast_convert_type(d.reshape(-1, 4), jnp.uint32)))
        read(data).block_until_ready()

        def run():
            jax.block_until_ready([read(data) for _ in range(_PASSES)])

        method = "max of uint32"
    else:
        affinity = getattr(os, "sched_getaffinity", None)
        threads = len(affinity(0)) if affinity else os.cpu_count() or 1
        words = np.asarray(data).reshape(-1)
        words = words[: words.size // (8 * threads) * 8 * threads].view(np.uint64)
        parts = words.reshape(threads, -1)
        one, method = reading.reader()
        pool = concurrent.futures.ThreadPoolExecutor(threads)

        def run():
            list(pool.map(lambda part: [one(part) for _ in range(_PASSES)], parts))

    def rate():
        start = time.perf_counter()
        run()
        return _PASSES * data.nbytes / (time.perf_counter() - start) / 1e9

    return rate, method


def repacked(backend: str, w: Packed) -> Packed:
    """Trits in the order that a backend reads."""
    repack = BACKENDS[backend.partition(":")[0]].repack
    return w if repack is None or w.format != "trit2" else jax.jit(repack)(w)


def _compiled(backend: str, x: jax.Array, w: Packed):
    """() -> seconds of one product, over _PASSES passes of every layer."""
    try:
        _products(backend, x, w).block_until_ready()
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError) or not settings(backend):
            raise
        raise UsageError(f"--backend: {backend!r} cannot run: {error}") from error

    def run():
        start = time.perf_counter()
        _products(backend, x, w).block_until_ready()
        return (time.perf_counter() - start) / (_PASSES * w.data.shape[0])

    return run


def measure(backends, shape, batches, seconds: float):
    """Yields one record for each backend and batch of one shape, whose weights are made once.

    They are measured in turn, sample by sample, so that sample i of each met the same machine.
    """
    name, k_size, n, format = shape
    # On the pages that models' weights lie on.
    data = fill(zeros(stack_shape(k_size, n, format), jnp.uint8), format)
    layers = data.shape[0]
    w = Packed(data, jnp.ones((layers, 1, 1, 1), jnp.float32), None, format, shape=(k_size, n))
    read, read_by = reader(data)
    own = {backend: repacked(backend, w) for backend in backends}
    rows = {}
    for batch in batches:
        x = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (batch, k_size)), jnp.int8)
        rows[batch] = x if format == "trit2" else x.astype(jnp.float32)
    runs = {(b, batch): _compiled(b, x, own[b]) for batch, x in rows.items() for b in backends}
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    stop = time.perf_counter() + seconds * len(runs)
    while len(next(iter(samples.values()))) < MIN_SAMPLES or time.perf_counter() < stop:
        for key, run in runs.items():
            rates[key].append(read())
            samples[key].append(run() * 1e3)
    for backend, batch in runs:
        median = statistics.median(samples[backend, batch])
        rate = statistics.median(rates[backend, batch])
        packed = data.nbytes / layers / median / 1e6
        yield {
            "backend": backend,
            "shape": name,
            "k": k_size,
            "n": n,
            "batch": batch,
            "format": format,
            "inputs": rows[batch].dtype.name,
            "layers": layers,
            "median_ms": round(median, 5),
            "packed_gb_per_s": round(packed, 3),
            "read_gb_per_s": round(rate, 3),
            "share_of_read": round(packed / rate, 4),
            "read_by": read_by,
            "samples_ms": [round(sample, 5) for sample in samples[backend, batch]],
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def parse(argv):
    """The flags; numbers are checked here, names where they are looked up."""
    parser = _Parser(prog="python -m ternax.kernels.bench", allow_abbrev=False)
    flag = functools.partial(parser.add_argument, metavar="...")
    flag("--backend", default="all", help=f"of {', '.join(BACKENDS)}, as in cpu:isa=avx2 [all]")
    flag("--shapes", default="70b", help="a model, model:part or KxN, behind commas [70b]")
    flag("--batch", default="1", help="rows of activations, behind commas [1]")
    flag("--seconds", default="1", help=f"a line, {MIN_SAMPLES} samples at least [1]")
    args = parser.parse_args(argv)
    batches = args.batch.split(",")
    if not all(text.isdecimal() and int(text) for text in batches):
        raise UsageError(f"--batch: expected integers of at least 1, found {args.batch!r}")
    try:
        args.seconds = float(args.seconds)
    except ValueError:
        raise UsageError(f"--seconds: expected a number, found {args.seconds!r}") from None
    args.batch = [int(text) for text in batches]
    return args


def main(argv=None) -> int:
    try:
        args = parse(argv)
        shapes = find_shapes(args.shapes)
        backends = find_backends(args.backend)
        check_fits(shapes)
        for shape in shapes:
            for record in measure(backends, shape, args.batch, args.seconds):
                print(json.dumps(record), flush=True)
    except (UsageError, BackendError, DoesNotFit) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, DoesNotFit) else 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
