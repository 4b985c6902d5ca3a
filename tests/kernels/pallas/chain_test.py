"""The chain kernel, interpreted, against the same steps by themselves: integers in numpy, floats
by the formulas of norms, gates and quantizers as models have them.

The interpreter runs one block, whose barrier stands for the grid's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import target
from ternax.kernels.packing import Packed, pack_numpy
from ternax.kernels.pallas import backend, tiles
from ternax.nn.linear import ACTIVATIONS
from ternax.nn.norm import rms_norm
from ternax.quant.inputs import INPUTS

if jax.__version_info__ < backend.MIN_JAX:
    pytest.skip("this jax has no interpreter of Mosaic GPU", allow_module_level=True)

from ternax.kernels.pallas import chain, chain_self_test
from ternax.kernels.pallas.chain import Link, Weights
from ternax.kernels.pallas.chain_plan import Plan

LAYERS = 2


class Projection:
    """A link's weights, as the kernel reads them and as numpy does."""

    def __init__(self, link: Link, rng, layer: int):
        k, n = link.shape
        values = rng.integers(-1, 2, (LAYERS, 1, k, n)).astype(np.int8)
        packed = Packed(jnp.asarray(pack_numpy(values, "trit2")), jnp.ones(()), shape=link.shape)
        scale = rng.uniform(0.5, 2, (LAYERS, n)).astype(np.float32) / np.sqrt(k)
        norm = rng.uniform(0.5, 2, (LAYERS, k)).astype(np.float32) if link.normed else None
        self.weights = Weights(
            tiles.repack(packed).data,
            jnp.asarray(scale),
            None if norm is None else jnp.asarray(norm),
            jnp.int32(layer),
            jnp.int32(layer),
        )
        self.values, self.scale = values[layer, 0], jnp.asarray(scale[layer])
        self.norm = None if norm is None else jnp.asarray(norm[layer])


def in_steps(links, projections, stream, given):
    """(last product, stream)."""
    product = None
    for link, projection in zip(links, projections, strict=True):
        if link.enter == "input":
            value = given
        elif link.enter == "stream":
            value = stream
        elif link.enter == "residual":
            value = stream = stream + product
        else:
            first, second = jnp.split(product, 2, axis=-1)
            value = ACTIVATIONS[link.enter](first) * second
        if link.normed:
            value = rms_norm(value, projection.norm, link.eps)
        codes, x_scale = INPUTS["int8"](value)
        exact = np.asarray(codes).astype(np.int64) @ projection.values.astype(np.int64)
        product = exact.astype(np.float32) * (x_scale * projection.scale)
    return product, stream


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def run(links, weights, stream, given, rows, consumers):
    config = {"blocks": 1, "stages": 4, "ahead": 3, "consumers": consumers, "alone": 1}
    return chain.run(links, weights, stream, given, rows, config, interpret=True)


LLAMA = (
    Link((96, 64), "input", False, 0.0),
    Link((64, 320), "residual", True, 1e-5),
    Link((160, 64), "silu", False, 0.0),
    Link((64, 128), "residual", True, 1e-5),
)
BITNET = (
    Link((64, 64), "input", True, 1e-5),
    Link((64, 1088), "residual", True, 1e-5),
    Link((544, 64), "relu2", True, 1e-5),  # more than one tile along K
)
FIRST = (Link((64, 160), "stream", True, 1e-6),)
# Rows of whole tiles, an odd number of them; a block enters them alone.
WHOLE = (
    Link((512, 1536), "input", False, 0.0),
    Link((1536, 320), "residual", True, 1e-5),
    Link((160, 1536), "silu", False, 0.0),
    Link((1536, 640), "residual", True, 1e-5),
)
WHOLE_FIRST = (Link((512, 640), "stream", True, 1e-6),)
WHOLE_SUM = (Link((1024, 512), "input", True, 1e-5), Link((512, 512), "residual", True, 1e-5))


def stream_columns(links):
    return next(
        k if link.enter in ("stream", "residual") else n
        for link in reversed(links)
        for k, n in [link.shape]
    )


@pytest.mark.parametrize(
    "links, rows, consumers",
    [
        *((LLAMA, 1, 2), (BITNET, 3, 2), (FIRST, 9, 2), (BITNET[1:2], 16, 2)),
        *((WHOLE, 1, 2), (WHOLE_FIRST, 1, 2), (WHOLE_SUM, 1, 2), (WHOLE_SUM, 2, 2)),
    ],
)
def test_a_chain_is_its_steps(links, rows, consumers):
    if links[0].enter == "residual":  # alone it reads the stream
        links = (links[0]._replace(enter="stream"),)
    rng = np.random.default_rng(rows)
    projections = [Projection(link, rng, layer=1) for link in links]
    padded, columns = chain.padded_rows(rows), stream_columns(links)
    assert (rows == 1 and columns % 512 == 0) == chain.enters_alone(links, rows, columns)
    stream = jnp.asarray(rng.normal(size=(padded, columns)).astype(np.float32))
    given = None
    if links[0].enter == "input":
        given = jnp.asarray(rng.normal(size=(padded, links[0].shape[0])).astype(np.float32))
    weights = tuple(projection.weights for projection in projections)
    # Nothing else may be in flight: the interpreter calls back into jax from its own threads.
    ready = jax.block_until_ready((weights, stream, given))
    found, found_stream = jax.block_until_ready(run(links, *ready, rows, consumers))
    product, expected_stream = in_steps(links, projections, stream, given)
    if links[-1].shape[1] == columns:
        assert found is None
        expected_stream = expected_stream + product
    else:
        # Roots and sums differ in the last bit, so an activation may take the next code: one
        # code of one activation moves a product by its scale, the rest is f32's rounding.
        np.testing.assert_allclose(found[:rows], product[:rows], rtol=0, atol=0.03)
    np.testing.assert_allclose(found_stream[:rows], expected_stream[:rows], rtol=0, atol=0.03)


@pytest.mark.parametrize(
    "size, workers, expected",
    [(8192, 264, (32, 256)), (28672, 264, (128, 224)), (64, 2, (32, 2)), (96, 2, (96, 1))],
)
def test_chunks(size, workers, expected):
    assert chain.chunks(size, workers) == expected


def test_what_no_chain_takes_is_one_line():
    assert chain.why_not(LLAMA, 1, 132) is None
    assert chain.why_not([Link((64, 48), "stream", False, 0.0)], 1, 132) == (
        "a chain takes sizes that are multiples of 32, found 48"
    )
    late = [Link((512, 512), "input", False, 0.0)] * 2
    assert chain.why_not(late, 1, 132) == "a chain reads its input, or the stream as it was, first"
    prime = 32 * 269  # parts of 32 for 269 warpgroups, or one of all
    assert chain.why_not([Link((prime, 64), "stream", False, 0.0)], 1, 132) == (
        "8608 columns have no equal parts of 256 or fewer for all blocks"
    )


@pytest.mark.parametrize("blocks", [132, 114, 7])
def test_blocks_share_every_tile_once(blocks):
    """The interpreter has one block; how many divide a product is counted here."""
    for rows in (1, 16):
        links = (Link((28672, 8192), "stream", False, 0.0), Link((6912, 2560), "silu", True, 1e-5))
        plan = Plan(links, (1, 1), rows, 8192, None, False, blocks, 8, 0, 2, 0)
        for i, (along_n, along_k) in enumerate(plan.grids):
            seen = np.zeros((along_n, along_k), int)
            for block in range(blocks):
                first_k, start, stop = (int(at) for at in plan.share(i, block))
                n, k = np.divmod(np.arange(start, stop), plan.held[i])
                np.add.at(seen, (n, first_k + k), 1)
            assert (seen == 1).all()


def test_the_self_test_passes_and_finds_what_is_wrong(monkeypatch):
    """Its cases at widths that the interpreter bears, of the same kinds."""
    first = (Link((512, 96), "stream", True, 1e-5),)
    cases = [
        chain_self_test.Case(WHOLE, 1, 1),
        chain_self_test.Case(first, 1, 1),
        chain_self_test.Case(LLAMA, 1, 0),
        chain_self_test.Case(BITNET, 9, 0),
    ]
    assert chain_self_test.self_test(cases, interpret=True) is None
    monkeypatch.setattr(chain_self_test, "TOLERANCE", 1e-12)
    assert chain_self_test.self_test(cases[1:2], interpret=True).startswith(
        "its self-test failed: 1 rows differ from their steps by "
    )


def test_its_cases_are_what_models_launch():
    """Rows entered alone and together, ends in q, k and v and in the stream, both gates."""
    for links, rows, alone in chain_self_test.CASES:
        columns = stream_columns(links)
        assert chain.why_not(links, rows, 132) is None
        assert not alone or chain.enters_alone(links, rows, columns)
    last = {
        (case.links[-1].shape[1] == stream_columns(case.links), case.rows)
        for case in chain_self_test.CASES
    }
    assert last == {(False, 1), (True, 9)}
    enters = {link.enter for case in chain_self_test.CASES for link in case.links}
    assert enters == {"input", "stream", "residual", "silu", "relu2"}


def test_a_chain_that_reads_no_stream_hands_it_on():
    links = (Link((512, 64), "input", False, 0.0),)
    stream = jnp.arange(4 * 512, dtype=jnp.float32).reshape(4, 512)
    projection = Projection(links[0], np.random.default_rng(0), layer=1)
    given = jnp.ones((4, 512))
    ready = jax.block_until_ready(((projection.weights,), stream, given))
    found, after = jax.block_until_ready(run(links, *ready, 1, 2))
    product, _ = in_steps(links, [projection], stream, given)
    np.testing.assert_allclose(found[:1], product[:1], rtol=1e-6)
    np.testing.assert_array_equal(after[:1], stream[:1])


def test_a_failed_self_test_is_said_aloud(monkeypatch):
    monkeypatch.setattr(chain_self_test, "self_test", lambda: "its self-test failed: 1 rows")
    monkeypatch.setattr(backend, "_unusable_chain", backend._unusable_chain.__wrapped__)
    here = target.Target("gpu", "NVIDIA H200", "9.0", 132)
    with target.compiling_for(here), pytest.warns(UserWarning, match="chains .* are not used: its"):
        assert backend.why_not_chain() == "its self-test failed: 1 rows"
