"""Packed words struck by a noise where they lie, a chunk of rows at a time.

Of a split model one layer's matrix is made whole on every device, struck there by the same
program, and each device keeps its part: the strikes are those of one device by construction,
for every noise.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ternax.counter_hash import below
from ternax.noise.words import (
    ROWS,
    Matrix,
    WordNoise,
    concluded,
    differing,
    draws,
    measure,
)

_CHUNK_BYTES = 1 << 20


@functools.partial(
    jax.jit, static_argnames=("noise", "matrix", "width", "sharding"), donate_argnames="data"
)
def strike_split(
    data,
    keys,
    layers,
    strength,
    rows,
    first,
    order,
    source,
    *,
    noise: WordNoise,
    matrix: Matrix,
    width: int,
    sharding: NamedSharding,
):
    """`strike` of data [L, P, rows of all devices, row], which lies as `sharding` says.

    order, source: of `row_order.Rows`; matrix: the whole one.
    """
    replicated = NamedSharding(sharding.mesh, P())
    part = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))

    def one(i, carry):
        data, counts = carry
        held = lax.dynamic_index_in_dim(data, layers[i], 0, keepdims=False)
        whole = lax.with_sharding_constraint(held, replicated)[:, order]
        key = lax.dynamic_slice_in_dim(keys, i, 1)
        struck, count = _strike(
            whole[None], key, jnp.zeros(1, jnp.int32), strength, rows, first, noise, matrix, width
        )
        held = lax.with_sharding_constraint(struck[0][:, source], part)
        data = lax.dynamic_update_index_in_dim(data, held, layers[i], 0)
        return lax.with_sharding_constraint(data, sharding), counts.at[i].set(count[0])

    counts = jnp.zeros(len(layers), jnp.int32)
    return lax.fori_loop(0, len(layers), one, (data, counts))


@functools.partial(jax.jit, static_argnames=("noise", "matrix", "width"), donate_argnames="data")
def strike(
    data, keys, layers, strength, rows, first, *, noise: WordNoise, matrix: Matrix, width: int
):
    """data [L, P, N, row], its rows first .. first + width struck in `layers` -> (data, counts)."""
    return _strike(data, keys, layers, strength, rows, first, noise, matrix, width)


def _strike(
    data, keys, layers, strength, rows, first, noise: WordNoise, matrix: Matrix, width: int
):
    planes, step = data.shape[1], _chunk_rows(width, matrix.row_bytes)
    chunks = width // step

    def cut(data, i, c):
        at = (layers[i], c // chunks, first + c % chunks * step, 0)
        part = lax.dynamic_slice(data, at, (1, 1, step, data.shape[-1]))
        return at, matrix.to_words(part.reshape(step, -1))

    def one(i, carry):
        data, counts = carry
        known = None
        if noise.statistic is not None:
            count = planes * width * matrix.k_size
            known = _of_matrix(
                noise.statistic, matrix, lambda c: cut(data, i, c)[1], planes * chunks, count
            )

        def chunk(c, carry):
            data, count = carry
            at, old = cut(data, i, c)
            number = (c * step + jnp.arange(step)).astype(jnp.uint32)[:, None]
            new = noise.struck(keys[i], old, number, matrix, strength, known)
            new = jnp.where(below(draws(keys[i], number, 0, ROWS), rows), new, old)
            part = matrix.from_words(new)[None, None]
            count += differing(old, new, matrix.lane_bits)
            return lax.dynamic_update_slice(data, part, at), count

        data, count = lax.fori_loop(0, planes * chunks, chunk, (data, jnp.int32(0)))
        return data, counts.at[i].set(count)

    counts = jnp.zeros(len(layers), jnp.int32)
    return lax.fori_loop(0, len(layers), one, (data, counts))


def _of_matrix(statistic: str, matrix: Matrix, chunk, chunks: int, count: int):
    """The statistic of one matrix of `count` values, from its chunks; None where it has none."""
    first = measure(statistic, chunk(0), matrix)
    if first is None:
        return None

    def add(c, found):
        more = measure(statistic, chunk(c), matrix)
        return found + more if statistic == "density" else jnp.maximum(found, more)

    return concluded(statistic, lax.fori_loop(1, chunks, add, first), count)


def _chunk_rows(width: int, row_bytes: int) -> int:
    """The most rows within a chunk that divide `width`: none is struck twice."""
    most = max(1, min(width, _CHUNK_BYTES // row_bytes))
    return next(rows for rows in range(most, 0, -1) if width % rows == 0)
