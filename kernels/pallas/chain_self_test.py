"""Chains against the same steps in numpy, on the GPU that is to run them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import target
from ..packing import Packed, pack_numpy
from . import chain, tiles
from .chain import Link, Weights


class Case(NamedTuple):
    """One chain. alone: as in its settings."""

    links: tuple[Link, ...]
    rows: int
    alone: int


# A layer from one attention to the next, an odd number of tiles in a row; the step before the
# first; and one that ends in the stream, with several blocks to a row of tiles.
LAYER = (
    Link((1024, 1536), "input", True, 1e-5),
    Link((1536, 4096), "residual", True, 1e-5),
    Link((2048, 1536), "silu", True, 1e-5),
    Link((1536, 640), "residual", True, 1e-5),
)
FIRST = (Link((1536, 640), "stream", True, 1e-5),)
SUM = (
    Link((1024, 512), "input", False, 0.0),
    Link((512, 4096), "residual", True, 1e-5),
    Link((2048, 512), "relu2", False, 0.0),
)
CASES = (Case(LAYER, 1, 1), Case(FIRST, 1, 1), Case(LAYER, 1, 0), Case(SUM, 9, 0))
# Of the largest value. Roots and sums differ in their last bits, so a few activations take the
# next code; a tile that is missing is off by some tenths.
TOLERANCE = 0.02


def self_test(cases: Sequence[Case] = CASES, interpret: bool = False) -> str | None:
    """None where all chains are right; else one line on what differs."""
    for case in cases:
        try:
            error = _error(case, interpret)
        except Exception as raised:  # whatever compiler or driver say
            line = str(raised).partition("\n")[0]
            return f"its self-test raised {type(raised).__name__}: {line}"
        if not error <= TOLERANCE:
            return f"its self-test failed: {case.rows} rows differ from their steps by {error:.2g}"
    return None


def _error(case: Case, interpret: bool) -> float:
    """The largest difference of the stream and of the last product, each over its largest value."""
    links, rows, _ = case
    random = np.random.default_rng(rows)
    width = next((link.shape[0] for link in links if link.enter in ("stream", "residual")), None)
    width, padded = width or links[-1].shape[1], chain.padded_rows(rows)
    stream = random.normal(size=(padded, width)).astype(np.float32)
    given = random.normal(size=(padded, links[0].shape[0])).astype(np.float32)
    product: Any
    value: Any
    weights, product, after = [], np.zeros(()), stream.astype(np.float64)
    for link in links:
        k, n = link.shape
        values = random.integers(-1, 2, (2, 1, k, n)).astype(np.int8)
        scale = (random.uniform(0.5, 2, (2, n)) / np.sqrt(k)).astype(np.float32)
        norm = random.uniform(0.5, 2, (2, k)).astype(np.float32) if link.normed else None
        codes = jnp.asarray(pack_numpy(values, "trit2"))
        data = tiles.repack(Packed(codes, jnp.ones(()), shape=link.shape)).data
        one, leaf = jnp.int32(1), None if norm is None else jnp.asarray(norm)
        weights.append(Weights(data, jnp.asarray(scale), leaf, one, one))
        if link.enter in ("input", "stream"):
            value = given if link.enter == "input" else after
        elif link.enter == "residual":
            value = after = after + product
        else:
            gate, up = np.split(product, 2, axis=-1)
            gated = gate / (1 + np.exp(-gate)) if link.enter == "silu" else np.maximum(gate, 0) ** 2
            value = gated * up
        if norm is not None:
            value = norm[1] * value / np.sqrt((value**2).mean(-1, keepdims=True) + link.eps)
        step = np.maximum(np.abs(value).max(-1, keepdims=True), 1e-5) / 127
        digits = np.rint(value / step)
        product = digits @ values[1, 0].astype(np.float64) * (step * scale[1])
    if product.shape[1] == width:
        after, product = after + product, None
    found = _found(case, weights, stream, given, interpret)
    pairs = zip(found, (product, after), strict=True)
    return max(_off(a, b, rows) for a, b in pairs if b is not None)


def _found(case: Case, weights, stream, given, interpret: bool):
    """(last product or None, stream), as the kernel has them."""
    links, rows, alone = case
    settings = chain.heuristic(1 if interpret else target.current().core_count)
    settings = {**settings, "alone": alone}
    given = given if links[0].enter == "input" else None
    run = jax.jit(
        lambda weights, stream, given: chain.run(
            links, weights, stream, given, rows, settings, interpret
        )
    )
    # Nothing else may be in flight where kernels are interpreted.
    ready = jax.block_until_ready(jax.tree.map(jnp.asarray, (weights, stream, given)))
    return jax.block_until_ready(run(*ready))


def _off(found, expected, rows: int) -> float:
    difference = np.abs(np.asarray(found)[:rows] - expected[:rows]).max()
    return float(difference / np.abs(expected[:rows]).max())
