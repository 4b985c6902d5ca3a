"""Step `bandwidth`: the best rate at which memory is only read, and that of a copy."""

import functools
import math
import statistics
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from ternax.gpu import torch_peer
from ternax.gpu.made import Step
from ternax.kernels import ring, target
from ternax.kernels.pallas import reading

_GIB = 1 << 30
SIZES, TINY = (_GIB, 4 * _GIB, 16 * _GIB), (1 << 20, 4 << 20)
_ROUNDS = 7
# A program reads so much, in several passes where the buffer is smaller.
_PROGRAM_BYTES = 16 * _GIB


def run(step: Step) -> None:
    """A Record a way and size; samples are GB/s, of bytes read or, in a copy, read and written."""
    why = torch_peer.why_not()
    if why:
        step.say(f"bandwidth: without torch: {why}")
    for size in TINY if step.rehearse else SIZES:
        passes = 1 if step.rehearse else max(1, _PROGRAM_BYTES // size)
        for name, way, make in ways(size, passes, torch=not why):
            if step.left_s < 0:
                step.say(f"bandwidth: no time left at {size >> 20} MiB")
                return
            try:
                timed = make()
                timed.run(1)
                taken = [ring.sample_s(timed) for _ in range(_ROUNDS)]
                del timed  # its memory, before the next is made
                ring.median_s(taken)
            except Exception as error:  # memory that is not there
                step.say(f"bandwidth: {name}, {size >> 20} MiB: {str(error).splitlines()[0][:150]}")
                continue
            factor = 1 if way == "read" else 2
            rates = [factor * size / seconds / 1e9 for seconds in taken if seconds > 0]
            key = "read_bandwidth_gb_per_s" if way == "read" else "copy_bandwidth_gb_per_s"
            step.keep(
                "device",
                {key: statistics.median(rates)},
                f"{way} {size >> 20} MiB, {name}, in one program of {passes} passes",
                samples=rates,
                unit="GB/s",
                backend=name.partition(" ")[0],
            )


def ways(
    size: int, passes: int, torch: bool
) -> Iterator[tuple[str, str, Callable[[], ring.Timed]]]:
    """(name, "read" or "copy", what makes it)."""
    if reading.why_not() is None:
        yield "TMA", "read", functools.partial(_streaming, size, passes)
    for name, make in XLA.items():
        way = "copy" if name == "copy" else "read"
        yield f"XLA {name}", way, functools.partial(make, size, passes)
    for name in torch_peer.STREAMS if torch else ():
        way = "copy" if name == "copy" else "read"
        yield f"torch {name}", way, functools.partial(torch_peer.stream, name, size, passes)


def _reading(reduce: Callable, size: int, passes: int) -> ring.Timed:
    """Each pass xors what the last one found into what it reads, so none can be left out."""
    words = ring.random_bits((size // 4,), jnp.uint32)

    def body(last, words):
        return reduce(words ^ last)

    return ring.program(body, jnp.uint32(0), words, passes, passes).compile()


def _streaming(size: int, passes: int) -> ring.Timed:
    """By the copy engine into shared memory, as our kernels read weights."""
    blocks = target.current().core_count
    tiles = size // math.prod(reading.TILE)
    data = ring.random_bits((tiles, *reading.TILE), jnp.uint8)
    one = jax.jit(functools.partial(reading.read, blocks=blocks))

    def body(after, data):
        return one(data, after)

    after = jnp.zeros((blocks, *reading.TILE), jnp.uint8)
    return ring.program(body, after, data, passes, passes).compile()


def _copying(size: int, passes: int) -> ring.Timed:
    """From one buffer to another, with a number added that changes from pass to pass."""
    words = ring.random_bits((size // 4,), jnp.uint32)

    def body(carry, words):
        last, _ = carry
        return last + jnp.uint32(1), words + last

    return ring.program(body, (jnp.uint32(0), jnp.array(words)), words, passes, passes).compile()


def _or(words):
    return lax.reduce(words, jnp.uint32(0), lax.bitwise_or, (0,))


XLA: dict[str, Callable[[int, int], ring.Timed]] = {
    "max": functools.partial(_reading, jnp.max),
    "sum": functools.partial(_reading, functools.partial(jnp.sum, dtype=jnp.uint32)),
    "or": functools.partial(_reading, _or),
    "copy": _copying,
}
