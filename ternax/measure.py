"""Read bandwidth, energy and percentiles; the facts of `ternax.machine` under the same name.

What cannot be measured here is None, never zero. jax and numpy are imported only
where they are needed.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import statistics
import time
from typing import Any

from ternax.machine import (  # noqa: F401  (callers say measure.memory_available_bytes)
    cpu_model,
    device_name,
    instruction_sets,
    last_level_cache_bytes,
    limit_threads,
    memory_available_bytes,
    memory_total_bytes,
    on_host,
    peak_resident_bytes,
    read_number,
    read_text,
    reset_peak,
    resident_bytes,
    sharing,
    threads_available,
)

_POWERCAP = pathlib.Path("/sys/class/powercap")


def percentile(samples, q: float) -> float:
    """The `q`-th percentile (0 to 100) of `samples`, interpolated between neighbours."""
    ordered = sorted(samples)
    if not ordered or not 0 <= q <= 100:
        raise ValueError(f"percentile {q} of {len(ordered)} samples")
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """The rate at which memory streams are read.

    Attributes:
      samples_gb_per_s: every sample, 1e9 bytes per second, in the order taken.
      threads: host threads that read; 0 on an accelerator.
      buffer_bytes: size of what was read over and over.
      method: how, in words.
      copy_gb_per_s: on an accelerator, samples of bytes read plus bytes written by a copy.
    """

    samples_gb_per_s: tuple[float, ...]
    threads: int
    buffer_bytes: int
    method: str
    copy_gb_per_s: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.samples_gb_per_s)


_BLOCK_BYTES = 1 << 20


def read_bandwidth(
    threads: int | None = None, seconds: float = 1.0, max_bytes: int = 1 << 30, device=None
) -> Bandwidth:
    """Measures how fast memory is read, for about `seconds` after setting up.

    On the host, `threads` threads (all available ones by default) each sum a slice
    of one buffer, as `kernels.reading` does. The buffer is at most `max_bytes` and
    5 % of the free memory, and is freed before returning; it stays in the process'
    peak until `reset_peak`. Each sample is one pass of all threads over the whole
    buffer, or as many as take 20 ms. A shared machine's rate moves by a factor of
    two within minutes: measure again beside what the figure is compared with.

    Calibration: 512 MiB a thread, against a loop of AVX-512 loads with prefetch, passes
    interleaved in random order; median of the ratios to that loop's pass of the same round.

      Zen 5, 2 virtual cores, 3 runs of 15 rounds    1 thread        2 threads
      C++, asks for two lines 4 KiB ahead            1.01 to 1.03    1.00 to 1.01   <- taken
      np.add.reduce, 64-bit                          0.88 to 0.91    0.91 to 0.99
      np.bitwise_or.reduce, 64-bit                   0.90 to 0.91    0.90 to 0.98
      np.max, int64 / uint8                          0.86 / 0.74     0.90 / 0.76
      the AVX-512 loop without prefetch              0.98 to 0.99    0.89 to 1.00
      Zen 4, 2 virtual cores, 2 runs of 30 rounds
      np.add.reduce, 64-bit                          1.03, 1.05      1.01, 1.01
      XLA: sum / max / or of int32                                   0.49 / 0.29 / 0.49
    """
    if not on_host(device):
        return _device_read_bandwidth(device, seconds, max_bytes)
    import numpy as np

    from ternax.kernels import reading

    one, method = reading.reader()
    threads = threads or threads_available()
    free = memory_available_bytes() or 0
    blocks = max(1, min(max_bytes, free // 20) // _BLOCK_BYTES // threads)
    words = np.empty((threads, blocks, _BLOCK_BYTES // 8), np.uint64)
    block = np.random.default_rng(0).integers(1 << 63, size=_BLOCK_BYTES // 8, dtype=np.uint64)

    def fill(thread):
        # By the thread that will read it, so that its pages lie near its processor.
        words[thread] = block

    def read(thread, rounds):
        flat = words[thread].reshape(-1)
        return [one(flat) for _ in range(rounds)]

    with contextlib.ExitStack() as stack:
        # One pool a thread, so that a slice is always read by the thread that filled it.
        pools = [
            stack.enter_context(concurrent.futures.ThreadPoolExecutor(1)) for _ in range(threads)
        ]

        def timed(work, *args):
            start = time.perf_counter()
            for future in [pool.submit(work, i, *args) for i, pool in enumerate(pools)]:
                future.result()
            return time.perf_counter() - start

        timed(fill)
        # Small or many slices: repeat them, so that handing out work does not show.
        rounds = max(1, math.ceil(0.02 / timed(read, 1)))
        samples: list[float] = []
        stop = time.perf_counter() + seconds
        while len(samples) < 3 or time.perf_counter() < stop:
            samples.append(rounds * words.nbytes / timed(read, rounds) / 1e9)
    method += f", {threads} threads, {words.nbytes / 2**20:.0f} MiB"
    cache_bytes = last_level_cache_bytes()
    if cache_bytes and words.nbytes < 4 * cache_bytes:
        method += f", partly from the {cache_bytes / 2**20:.0f} MiB cache: may be too high"
    return Bandwidth(tuple(samples), threads, words.nbytes, method)


def _device_read_bandwidth(device, seconds: float, max_bytes: int) -> Bandwidth:
    """The same on an accelerator: a max over uint32, repeated inside one program, and a copy.

    Each repetition xors the previous result into what it reads, so none can be
    hoisted out of the loop; the xor fuses into the reduction, which only reads.
    """
    import jax
    import jax.numpy as jnp

    free = memory_available_bytes(device)
    count = (max_bytes if free is None else min(max_bytes, free // 20)) // 4

    @jax.jit
    def read(words, rounds):
        return jax.lax.fori_loop(0, rounds, lambda _, last: jnp.max(words ^ last), jnp.uint32(0))

    @functools.partial(jax.jit, donate_argnums=0)
    def copy(words, rounds):
        return jax.lax.fori_loop(0, rounds, lambda _, last: last + jnp.uint32(1), words)

    def sampled(work, rounds):
        start = time.perf_counter()
        result = jax.block_until_ready(work(words, rounds))
        return result, rounds * words_bytes / (time.perf_counter() - start) / 1e9

    with jax.default_device(device):
        words = jax.jit(lambda: jax.lax.iota(jnp.uint32, count) * jnp.uint32(2654435761))()
        words_bytes = words.nbytes
        sampled(read, 1)  # compiles
        _, rate = sampled(read, 10)
        # One pass takes under a millisecond: 20 ms hide the launch and the loop's own cost.
        rounds = max(1, math.ceil(0.02 * rate * 1e9 / words_bytes))
        reads: list[float] = []
        stop = time.perf_counter() + seconds
        while len(reads) < 3 or time.perf_counter() < stop:
            reads.append(sampled(read, rounds)[1])
        words, _ = sampled(copy, 1)
        copies: list[float] = []
        for _ in range(5):
            words, rate = sampled(copy, rounds)
            copies.append(2 * rate)
    words.delete()
    return Bandwidth(
        tuple(reads),
        0,
        words_bytes,
        f"XLA max of uint32, {words_bytes / 2**20:.0f} MiB",
        tuple(copies),
    )


class EnergyMeter:
    """Energy from `__enter__` to `__exit__` (or to now): see `sources` for what is counted.

    with energy_meter() as meter:
        ...
    meter.joules        # float, or None where the machine does not tell
    """

    def __init__(self, counters):
        self._counters = counters  # (name, read -> joules, range in joules or None)
        self._start = self._stop = None

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self._counters)

    def __enter__(self):
        self._start, self._stop = self._values(), None
        return self

    def __exit__(self, kind, error, traceback):
        self._stop = self._values()

    def _values(self):
        try:
            return [read() for _, read, _ in self._counters]
        except Exception:  # a counter that vanishes or is forbidden: no figure at all
            return None

    @property
    def joules(self) -> float | None:
        stop = self._stop if self._stop is not None else self._values()
        if not self._counters or self._start is None or stop is None:
            return None
        total = 0.0
        for (_, _, span), before, after in zip(self._counters, self._start, stop, strict=True):
            # RAPL counts modulo its range.
            total += after - before if after >= before or not span else after - before + span
        return total


def energy_meter() -> EnergyMeter:
    """A meter over every processor package (RAPL) and visible NVIDIA GPU (NVML) that answers."""
    return EnergyMeter([*_rapl_counters(), *_nvml_counters()])


def _rapl_counters():
    counters = []
    for directory in sorted(_POWERCAP.glob("*:*")):
        # "intel-rapl:0" is a package, "intel-rapl:0:1" a part of it already counted there.
        if directory.name.count(":") != 1 or "mmio" in directory.name:
            continue
        path = directory / "energy_uj"
        if read_number(path) is None or not read_text(directory / "name").startswith("package"):
            continue
        span = read_number(directory / "max_energy_range_uj")
        counters.append(
            (
                f"rapl:{read_text(directory / 'name').strip()}",
                lambda path=path: int(path.read_text()) / 1e6,
                span and span / 1e6,
            )
        )
    return counters


def nvml_handles() -> list[tuple[str, Any]]:
    """(name, NVML's handle) of each visible NVIDIA GPU; none without its module or driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            names = [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
        else:
            names = [name.strip() for name in visible.split(",") if name.strip()]
        by_index, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
        return [(name, by_index(int(name)) if name.isdigit() else by_uuid(name)) for name in names]
    except Exception:
        return []


def _nvml_counters():
    try:
        import pynvml

        handles = nvml_handles()
        for _, handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # older GPUs refuse here
    except Exception:  # energy is then not reported
        return []
    return [
        (
            f"nvml:{name}",
            lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            None,
        )
        for name, handle in handles
    ]
