"""Chains against the same steps in numpy, on the GPU that is to run them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import target
from ..packing import Packed, pack_numpy
from . import chain, tiles
from .chain import Link, Weights

# Every way to enter but the stream's, several blocks to a row of tiles and several parts along K.
LINKS = (
    Link((1024, 512), "input", False, 0.0),
    Link((512, 4096), "residual", True, 1e-5),
    Link((2048, 512), "silu", False, 0.0),
)
ROWS = (1, 9)
# Of the largest value. Roots and sums differ in their last bits, so a few activations take the
# next code; a tile that is missing is off by some tenths.
TOLERANCE = 0.02


def self_test(links=LINKS, interpret: bool = False) -> str | None:
    """None where chains of one row and of several are right; else one line on what differs."""
    for rows in ROWS:
        try:
            error = _error(links, rows, interpret)
        except Exception as raised:  # whatever compiler or driver say
            line = str(raised).partition("\n")[0]
            return f"its self-test raised {type(raised).__name__}: {line}"
        if not error <= TOLERANCE:
            return f"its self-test failed: {rows} rows differ from their steps by {error:.2g}"
    return None


def _error(links, rows: int, interpret: bool) -> float:
    """The largest difference of the streams, over the largest value."""
    random = np.random.default_rng(rows)
    width, padded = links[0].shape[1], chain.padded_rows(rows)
    stream = random.normal(size=(padded, width)).astype(np.float32)
    given = random.normal(size=(padded, links[0].shape[0])).astype(np.float32)
    product: Any
    expected: Any
    value: Any
    weights, product, expected = [], np.zeros(()), stream
    for link in links:
        k, n = link.shape
        values = random.integers(-1, 2, (2, 1, k, n)).astype(np.int8)
        scale = (random.uniform(0.5, 2, (2, n)) / np.sqrt(k)).astype(np.float32)
        norm = random.uniform(0.5, 2, (2, k)).astype(np.float32) if link.normed else None
        codes = jnp.asarray(pack_numpy(values, "trit2"))
        data = tiles.repack(Packed(codes, jnp.ones(()), shape=link.shape)).data
        one, leaf = jnp.int32(1), None if norm is None else jnp.asarray(norm)
        weights.append(Weights(data, jnp.asarray(scale), leaf, one, one))
        if link.enter == "input":
            value = given
        elif link.enter == "residual":
            value = expected = expected + product
        else:
            gate, up = np.split(product, 2, axis=-1)
            value = gate / (1 + np.exp(-gate)) * up
        if norm is not None:
            value = norm[1] * value / np.sqrt((value**2).mean(-1, keepdims=True) + link.eps)
        step = np.maximum(np.abs(value).max(-1, keepdims=True), 1e-5) / 127
        digits = np.rint(value / step)
        product = digits @ values[1, 0].astype(np.float64) * (step * scale[1])
    expected = (expected + product)[:rows]
    settings = chain.heuristic(1 if interpret else target.current().core_count)
    run = jax.jit(
        lambda weights, stream, given: chain.run(
            links, weights, stream, given, rows, settings, interpret
        )
    )
    ready = jax.block_until_ready((weights, jnp.asarray(stream), jnp.asarray(given)))
    _, found = jax.block_until_ready(run(*ready))
    return float(np.abs(np.asarray(found)[:rows] - expected).max() / np.abs(expected).max())
