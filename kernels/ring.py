"""What one product costs on an accelerator: many of them in one program, over a ring of weights.

A program goes `repeats` times over all layers of a ring that is larger than any cache. It is
run once and then several times in a row; the difference, over the products that it holds,
has neither the start of a program in it nor the wait for its end:

    program | program program program program |       (time of 4 - time of 1) / (3 * products)

Layers stand in the program one by one, as constants, so no index is computed between products
and one CUDA graph can hold them all.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Larger than any GPU's L2, 60 MB of an H200.
RING_BYTES = 512 << 20
# A program takes about this long where memory is read at this rate and a product takes so much
# besides.
_PROGRAM_S, _RATE, _LAUNCH_S = 3e-3, 4e12, 2e-6
# Programs in a row, beside a single one.
_ROW = 4
# Never a product of small integers, but the compiler cannot know.
_NEVER = 1 << 30


def layers_of(nbytes: int, ring_bytes: int = RING_BYTES) -> int:
    """Layers of `nbytes` each that make a ring of at least `ring_bytes`."""
    return max(2, math.ceil(ring_bytes / nbytes))


def repeats_of(layers: int, nbytes: int) -> int:
    """How often a program goes over its ring."""
    return max(1, math.ceil(_PROGRAM_S / (layers * (nbytes / _RATE + _LAUNCH_S))))


class Timed(Protocol):
    """Something that can be run again and again. calls: products, or passes, of one run."""

    calls: int

    def run(self, times: int) -> None:
        """So often in a row, then waits for the end."""


def sample_s(timed: Timed) -> float:
    """Seconds of one call, without what a program costs besides. Not warmed up here."""
    start = time.perf_counter()
    timed.run(1)
    middle = time.perf_counter()
    timed.run(_ROW)
    rest = time.perf_counter() - middle - (middle - start)
    return rest / ((_ROW - 1) * timed.calls)


def median_s(samples: Sequence[float]) -> float:
    """Seconds of a call among several samples.

    Raises ValueError where the median is no time at all: then the machine did so much else that
    what a program costs besides hid what its calls take.
    """
    found = statistics.median(samples)
    if found <= 0:
        raise ValueError(
            f"{len(samples)} samples have a median of {1e6 * found:.3g} us a call, which is no "
            "time: the machine is too busy for a program this short"
        )
    return found


@dataclasses.dataclass
class Program:
    """A program, `(carry, weights) -> carry`, and what it runs on.

    Attributes:
      function: traced once; its carry is donated.
      carry: what goes from run to run.
      weights: what is read.
      calls: products in it.
    """

    function: Callable[[Any, Any], Any]
    carry: Any
    weights: Any
    calls: int
    _lowered: jax.stages.Lowered | None = None
    _compiled: jax.stages.Compiled | None = None

    def lower(self) -> "Program":
        """Traces and lowers, which holds Python's lock."""
        self._lowered = jax.jit(self.function, donate_argnums=0).lower(self.carry, self.weights)
        return self

    def compile(self) -> "Program":
        """What is lowered already, in a thread of its own if need be. Raises as the compiler."""
        if self._lowered is None:
            self.lower()
        assert self._lowered is not None
        self._compiled = self._lowered.compile()
        return self

    def run(self, times: int) -> None:
        assert self._compiled is not None
        for _ in range(times):
            self.carry = self._compiled(self.carry, self.weights)
        jax.block_until_ready(self.carry)


def program(body, carry, weights, repeats: int, calls: int) -> Program:
    """`repeats` times `body(carry, weights) -> carry`, which holds calls / repeats of a call."""

    def loop(carry, weights):
        return lax.fori_loop(0, repeats, lambda _, carry: body(carry, weights), carry)

    return Program(loop, carry, weights, calls)


def _touched(x, y):
    """x again, but after y: what x is for the next round nothing can foresee."""
    hit = (y.reshape(-1)[0] == _NEVER).astype(x.dtype)
    return x ^ hit if jnp.issubdtype(x.dtype, jnp.integer) else x + hit


def products(
    product: Callable[..., jax.Array], x: jax.Array, weights: Any, layers: int, repeats: int
) -> Program:
    """A program of `product(x, weights, layer) -> y`, each with an output of its own."""
    one = jax.jit(product)

    def body(carry, weights):
        x, _ = carry
        ys = tuple(one(x, weights, jnp.int32(layer)) for layer in range(layers))
        return _touched(x, ys[-1]), ys

    like = jax.eval_shape(one, x, weights, jnp.int32(0))
    carry = jnp.array(x), tuple(jnp.zeros(like.shape, like.dtype) for _ in range(layers))
    return program(body, carry, weights, repeats, layers * repeats)


def matrices(
    product: Callable[..., jax.Array], x: jax.Array, weights: tuple[jax.Array, ...], repeats: int
) -> Program:
    """A program of `product(x, matrix) -> y` for each of several matrices, none of them sliced."""
    one = jax.jit(product)

    def body(carry, weights):
        x, _ = carry
        ys = tuple(one(x, matrix) for matrix in weights)
        return _touched(x, ys[-1]), ys

    like = jax.eval_shape(one, x, weights[0])
    carry = jnp.array(x), tuple(jnp.zeros(like.shape, like.dtype) for _ in weights)
    return program(body, carry, weights, repeats, len(weights) * repeats)


def additions(
    add: Callable[..., None], x: jax.Array, out: jax.Array, weights: Any, layers: int, repeats: int
) -> Program:
    """A program of `add(x, weights, layer, out)`, kernels that all add to one Ref: no more."""
    one = jax.jit(add)

    def body(carry, weights):
        x, out = carry
        ref = jax.new_ref(out)
        for layer in range(layers):
            one(x, weights, jnp.int32(layer), ref)
        out = jax.freeze(ref)
        return _touched(x, out), out

    return program(body, (jnp.array(x), jnp.array(out)), weights, repeats, layers * repeats)


def random_bits(shape: tuple[int, ...], dtype, seed: int = 0) -> jax.Array:
    """Integers of all values, or floats of magnitude 0.5 to 2 (bf16), compiled once a shape."""
    return _random_bits(tuple(shape), jnp.dtype(dtype), jnp.uint32(seed * 0x9E3779B9 % 2**32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_bits(shape, dtype, seed):
    size = dtype.itemsize
    words = lax.iota(jnp.uint32, math.ceil(math.prod(shape) * size / 4)) + seed
    words *= jnp.uint32(2654435761)
    words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
    words ^= words >> 15
    if dtype == jnp.bfloat16:  # any sign and mantissa, two exponents
        words = (words & jnp.uint32(0x80FF80FF)) | jnp.uint32(0x3F003F00)
    if size == 4:
        return lax.bitcast_convert_type(words, dtype).reshape(shape)
    parts = lax.bitcast_convert_type(words, jnp.uint16 if size == 2 else jnp.uint8)
    parts = parts.reshape(-1)[: math.prod(shape)].reshape(shape)
    return lax.bitcast_convert_type(parts, dtype)


def host_rows(rows: int, k_size: int, seed: int = 0) -> np.ndarray:
    """int8 [rows, K], -127 to 127: activations."""
    random = np.random.default_rng(seed)
    return random.integers(-127, 128, (rows, k_size)).astype(np.int8)
