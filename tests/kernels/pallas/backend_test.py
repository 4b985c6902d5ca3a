"""Which calls the GPU backend takes, on GPUs that are not here, and what it says of the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import packing, target
from ternax.kernels.backends import BACKENDS, BackendError, choose
from ternax.kernels.packing import Packed
from ternax.kernels.pallas import tiles
from ternax.kernels.ternary_matmul import ternary_matmul, ternary_matmul_transposed

H200 = target.Target("gpu", "NVIDIA H200", "9.0", 132, present=False)
OLD = jax.__version_info__ < (0, 11, 2)


def weight(k_size=32, n=3, groups=1, format="trit2", planes=1) -> Packed:
    values = np.random.default_rng(0).integers(-1, 2, (planes, k_size, n)).astype(np.int8)
    data = jnp.asarray(packing.pack_numpy(values, format))
    return Packed(data, jnp.ones((planes, groups, 1)), None, format, shape=(k_size, n))


def test_it_names_the_platform():
    assert BACKENDS["mosaic"].why_not("cpu", None, None) == "it runs on gpu, this is cpu"


@pytest.mark.skipif(not OLD, reason="this jax is new enough")
def test_it_names_the_jax_it_needs():
    reason = BACKENDS["mosaic"].why_not("gpu", None, None)
    assert reason == f"it needs jax 0.11.2 or later (Python 3.12), found {jax.__version__}"


@pytest.mark.skipif(OLD, reason="this jax is too old, which is said first")
@pytest.mark.parametrize(
    "changes, w, reason",
    [
        ({}, None, None),
        ({}, tiles.repack(weight()), None),
        (
            dict(kind="NVIDIA L40S", compute_capability="8.9"),
            None,
            "it needs compute capability 9.0 (H100, H200), NVIDIA L40S has 8.9",
        ),
        ({}, weight(format="int8"), None),
        ({}, weight(), f"it reads trit2 in the layout {tiles.LAYOUT!r}, found 'canonical'"),
        (
            {},
            dataclasses.replace(weight(format="int8"), layout="other"),
            "it reads int8 in the layout 'canonical', found 'other'",
        ),
        ({}, weight(groups=2), "it takes one scale group along K, found 2"),
        ({}, weight(groups=2, format="int8"), "it takes one scale group along K, found 2"),
        ({}, weight(planes=2, format="int8"), "it takes one plane of int8, found 2"),
        ({}, weight(format="int4"), "it multiplies trit2 and int8, found int4"),
        (
            {},
            dataclasses.replace(weight(), shape=(1 << 19, 3)),
            "its accumulators hold K up to 524287, found 524288",
        ),
        (
            {},
            dataclasses.replace(weight(format="int8"), shape=(1 << 17, 3)),
            "its accumulators hold K up to 131071, found 131072",
        ),
    ],
)
def test_it_says_what_it_cannot_do(changes, w, reason):
    with target.compiling_for(dataclasses.replace(H200, **changes)):
        assert BACKENDS["mosaic"].why_not("gpu", None, w) == reason


@pytest.mark.skipif(OLD, reason="this jax is too old for the kernels")
def test_tiles_and_tables_choose_it_and_canonical_trits_the_reference():
    with target.compiling_for(H200):
        assert choose("gpu", w=tiles.repack(weight())).name == "mosaic"
        assert choose("gpu", w=weight(format="int8")).name == "mosaic"
        assert choose("gpu", w=weight()).name == "reference"
        assert BACKENDS["mosaic"].heuristic(None, None)["blocks"] == 132
        assert BACKENDS["mosaic"].heuristic(None, weight(format="int8"))["slices"] == 1
    assert target.current().platform == "cpu"


@pytest.mark.skipif(OLD, reason="this jax is too old for the kernels")
def test_a_table_times_a_whole_text_is_left_to_the_reference():
    w, text = weight(format="int8"), jnp.ones((257, 32))
    with target.compiling_for(H200):
        assert choose("gpu", text[:256], w).name == "mosaic"
        assert choose("gpu", text, w).name == "reference"
        with pytest.raises(BackendError, match="up to 256 rows of x, found 257"):
            choose("gpu", text, w, "mosaic")
        assert choose("gpu", text, tiles.repack(weight())).name == "mosaic"


def test_nothing_else_reads_tiles():
    x, w = jnp.ones((1, 32)), tiles.repack(weight())
    with pytest.raises(BackendError, match="cpu: it reads the canonical layout.*reference: it"):
        ternary_matmul(x, w)
    with pytest.raises(ValueError, match=r"must end in \(1, 16384\) for W 32x3"):
        ternary_matmul(x, dataclasses.replace(w, data=weight().data))


def test_the_gradient_of_tiles_is_that_of_the_canonical_bytes():
    g, w = jnp.ones((2, 3)), weight()
    np.testing.assert_array_equal(
        ternary_matmul_transposed(g, tiles.repack(w)), ternary_matmul_transposed(g, w)
    )
    stack = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), w)
    np.testing.assert_array_equal(
        ternary_matmul_transposed(g, tiles.repack(stack), layer=1), ternary_matmul_transposed(g, w)
    )
