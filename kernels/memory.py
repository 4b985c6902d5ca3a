"""Zeros to be filled in place, on the largest pages the platform has."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np

from .cpu import backend as cpu

# Under this a buffer is a few pages of any size.
_LARGE_BYTES = 1 << 22


def zeros(shape: tuple[int, ...], dtype) -> jax.Array:
    """As jnp.zeros; on a CPU with its library, large ones on huge pages (2 MiB on x86).

    Weights are streamed once a step: with the 4 KiB pages that malloc gets, a step of 2b4t
    needs 200,000 entries of the page table. Only the first touch of memory decides which
    pages it lies on, so it is the library that clears it. Decoding 2b4t became 1.18 times as
    fast on a Zen 5 (results/README.md).
    """
    large = np.prod(shape) * jnp.dtype(dtype).itemsize >= _LARGE_BYTES
    if large and jax.default_backend() == "cpu" and cpu.why_not("cpu", None, None) is None:
        return cpu.zeros(shape, dtype)
    return jnp.zeros(shape, dtype)


def writable(array: jax.Array) -> np.ndarray | None:
    """The memory of a ready array that nobody else has: what is written there is in the array.

    None where this process cannot write to it, as on an accelerator. The view lives no longer
    than the array does.
    """
    devices = array.devices()
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return None
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.unsafe_buffer_pointer())
    return np.frombuffer(memoryview(memory), array.dtype).reshape(array.shape)
