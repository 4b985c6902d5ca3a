"""The contract of `Scheme`, held to every scheme there is, at every granularity it has.

SCHEMES are found by themselves; so is the scheme of docs/new_scheme.md. One of your own:

    python -m pytest tests/quant/conformance_test.py --scheme=my_scheme:MyScheme
"""

import dataclasses
import functools
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ternax.errors import NumericCheckFailed, UsageError
from ternax.kernels import packing
from ternax.kernels.packing import FLOAT_FORMATS, FORMATS
from ternax.kernels.ternary_matmul import ternary_matmul
from ternax.quant import SCHEMES, Scheme, make_scheme, parse_scheme
from ternax.quant.scheme import check_finite
from ternax.quantized import CODEBOOKS, check
from tests.quant import guide

SHAPE = (48, 6)  # (K, N): three groups of 16
GUIDE = "guide_scheme:MyScheme"


@functools.cache
def load_guide_scheme() -> str:
    """Makes the guide's file importable, under a name no reader's file has."""
    module = types.ModuleType("guide_scheme")
    exec(guide.SCHEME_FILE, module.__dict__)
    sys.modules["guide_scheme"] = module
    return GUIDE


def variants(spec: str) -> list[str]:
    """`spec` in every granularity, or dtype, that its class has."""
    found, options = parse_scheme(spec)
    legal = inspect.signature(found.__init__).parameters
    if "granularity" in legal and "granularity" not in options:
        return [f"{spec},granularity={kind}" for kind in ("tensor", "row", "group,group_size=16")]
    if "dtype" in legal and "dtype" not in options:
        return [f"{spec},dtype={kind}" for kind in FLOAT_FORMATS]
    return [spec]


def pytest_generate_tests(metafunc):
    if "spec" in metafunc.fixturenames:
        specs = [*SCHEMES, load_guide_scheme(), *metafunc.config.getoption("--scheme")]
        metafunc.parametrize("spec", [each for spec in specs for each in variants(spec)])


def make(spec, shape=SHAPE) -> Scheme:
    return make_scheme(spec, shape, rngs=nnx.Rngs(0))


def gaussian(shape=SHAPE, seed=0):
    # A mean far from zero: what treats signs or zero points wrongly shows.
    return jnp.asarray(np.random.default_rng(seed).normal(0.01, 0.02, shape), jnp.float32)


def exact(x, codes):
    """int64 sum over planes of x @ codes: the integer core, by numpy."""
    return x.astype(np.int64) @ np.asarray(codes, np.int64).sum(0)


def activations(rows, k_size):
    rng = np.random.default_rng(1)
    x = rng.integers(-128, 128, (rows, k_size)).astype(np.int8)
    return x, rng.uniform(0.5, 1, (rows, 1)).astype(np.float32)


def same(found, expected):
    """Equal codes, equal scales up to the order in which a mean was summed."""
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-6)
    assert (found.zero is None) == (expected.zero is None) and found.format == expected.format
    if found.zero is not None:
        np.testing.assert_allclose(found.zero, expected.zero, rtol=1e-6)


# --- Codes -------------------------------------------------------------------------------


def test_codes_and_scales_are_within_the_format(spec):
    w = gaussian()
    quantized = make(spec).quantize(w)
    check(quantized)
    assert quantized.shape == SHAPE and quantized.scale.dtype == jnp.float32
    dense = quantized.dequantize()
    assert dense.shape == SHAPE and dense.dtype == jnp.float32
    # It stands for w, not for something else.
    assert jnp.sum(dense * w) > 0.5 * jnp.linalg.norm(dense) * jnp.linalg.norm(w) > 0


def test_codes_have_the_sign_of_their_weights(spec):
    scheme, w = make(spec), gaussian()
    quantized = scheme.quantize(w)
    if quantized.format not in FORMATS:
        signs = jnp.sign(quantized.dequantize())
    else:
        signs = jnp.sign(quantized.codes.astype(jnp.int32).sum(0))
    agree = np.asarray((signs == 0) | (signs == jnp.sign(w)))
    if scheme.codes_follow_sign:
        assert agree.all()
    else:  # binary codes follow the weight's deviation from the mean; the claim is not for show
        assert not agree.all()


def test_packing_loses_nothing(spec):
    quantized = make(spec).quantize(gaussian())
    if quantized.format in CODEBOOKS:
        with pytest.raises(UsageError, match=f"{quantized.format} cannot be packed: no kernel"):
            quantized.pack("w")
        assert 4 < quantized.bits_per_weight < 8
        return
    packed = quantized.pack("w")
    assert packed.shape == SHAPE and packed.parts == (("w", SHAPE[1]),)
    if quantized.format in FLOAT_FORMATS:
        np.testing.assert_array_equal(np.swapaxes(packed.data, -1, -2), quantized.codes)
        return
    codes = packing.unpack_numpy(np.asarray(packed.data), quantized.format, SHAPE[0])
    np.testing.assert_array_equal(codes, quantized.codes)
    assert not packing.has_invalid_codes(packed.data, quantized.format)
    planes = quantized.codes.shape[0]
    bits = FORMATS[quantized.format].bits * planes
    assert bits < quantized.bits_per_weight < bits + 4 * planes


# --- The packed product ------------------------------------------------------------------


def test_packed_product_is_the_integer_product_of_the_codes(spec):
    quantized = make(spec).quantize(gaussian())
    if quantized.format not in FORMATS:
        pytest.skip("floats and codebooks have no integer core")
    x, _ = activations(3, SHAPE[0])
    expected = exact(x, quantized.codes)
    packed = quantized.pack()
    if packed.num_planes * packed.groups == 1 and packed.zero is None:
        found = ternary_matmul(x, packed, out_dtype=jnp.int32)
        np.testing.assert_array_equal(found, expected)
    # Scales of 1: groups and planes add up in f32, exactly, as every sum is below 2^24.
    assert np.abs(expected).max() < 2**24
    bare = dataclasses.replace(packed, scale=jnp.ones_like(packed.scale), zero=None)
    found = ternary_matmul(x, bare, x_scale=jnp.ones((3, 1)), out_dtype=jnp.float32)
    np.testing.assert_array_equal(found, expected)


def test_packed_product_is_the_one_of_fake_quant(spec):
    scheme, w = make(spec), gaussian()
    perturb_params(scheme)
    dense = np.asarray(scheme.fake_quant(w), np.float64)
    quantized = scheme.quantize(w)
    if quantized.format in CODEBOOKS:
        pytest.skip("no kernel multiplies it")
    packed = quantized.pack()
    x, x_scale = activations(3, SHAPE[0])
    size = np.abs(x * x_scale) @ np.abs(dense)
    found = ternary_matmul(x, packed, x_scale=x_scale, out_dtype=jnp.float32)
    assert (np.abs(found - (x * x_scale) @ dense) <= 2e-6 * size + 1e-7).all()
    found = ternary_matmul(x * x_scale, packed, out_dtype=jnp.float32)
    assert (np.abs(found - (x * x_scale) @ dense) <= 1e-5 * size.max()).all()


def perturb_params(scheme):
    """Moves the scheme's own Params off their start, as training would."""
    for i, (_, param) in enumerate(nnx.iter_graph(scheme)):
        if isinstance(param, nnx.Param):
            noise = np.random.default_rng(i).normal(0, 0.1, param.shape)
            param.set_value(param.get_value() + noise.astype(np.float32))


# --- What a scheme may claim -------------------------------------------------------------


def test_codes_are_idempotent(spec):
    scheme = make(spec)
    if not scheme.codes_idempotent:
        pytest.skip("not claimed")
    first = scheme.quantize(gaussian())
    again = scheme.quantize(first.dequantize())
    np.testing.assert_array_equal(again.codes, first.codes)


def test_scales_are_equivariant(spec):
    scheme, w = make(spec), gaussian()
    if not scheme.scale_equivariant:
        pytest.skip("not claimed")
    first = scheme.quantize(w)
    for factor in (0.25, 8.0):  # powers of two, so that nothing rounds
        scaled = scheme.quantize(factor * w)
        np.testing.assert_array_equal(scaled.dequantize(), factor * first.dequantize())
        if first.format in FORMATS:
            np.testing.assert_array_equal(scaled.codes, first.codes)
            np.testing.assert_array_equal(scaled.scale, factor * first.scale)


# --- Odd weights -------------------------------------------------------------------------


def shapes_of(spec):
    """The whole matrix, one row and one column; groups need 16 rows."""
    return [SHAPE, (16 if "group" in spec or "int4" in spec else 1, 6), (48, 1)]


@pytest.mark.parametrize("value", [0.0, -0.3, 1e20])
def test_constant_weights_are_answered(spec, value):
    for shape in shapes_of(spec)[:2]:
        scheme = make(spec, shape)
        # Not even on the way: what an integer makes of NaN differs between machines.
        with jax.debug_nans(True):
            quantized = scheme.quantize(jnp.full(shape, value, jnp.float32))
        check(quantized)
        dense = np.asarray(quantized.dequantize())
        assert np.isfinite(dense).all()
        if value == 0:
            assert np.abs(dense).max() < 1e-4
        elif scheme.codes_follow_sign:
            np.testing.assert_allclose(dense, value, rtol=1e-2)


def test_single_rows_and_columns_are_answered(spec):
    for shape in shapes_of(spec)[1:]:
        w = gaussian(shape)
        quantized = make(spec, shape).quantize(w)
        check(quantized)
        if quantized.format in CODEBOOKS:
            continue
        x, x_scale = activations(2, shape[0])
        found = ternary_matmul(x, quantized.pack(), x_scale=x_scale, out_dtype=jnp.float32)
        expected = (x * x_scale) @ np.asarray(quantized.dequantize(), np.float64)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    w = gaussian().at[3, 2].set(bad)
    with pytest.raises(NumericCheckFailed, match="layers.3.mlp.up: .* 1 of 288 NaN or infinite"):
        check_finite(w, "layers.3.mlp.up")
    check_finite(gaussian(), "layers.3.mlp.up")


# --- Training ----------------------------------------------------------------------------


def test_fake_quant_is_the_dequantized_weight(spec):
    scheme, w = make(spec), gaussian()
    np.testing.assert_array_equal(scheme.fake_quant(w), scheme.quantize(w).dequantize())


def test_gradients_are_finite_and_not_zero(spec):
    scheme, w = make(spec), gaussian()
    weight = jnp.asarray(np.random.default_rng(2).normal(size=SHAPE), jnp.float32)

    def loss(scheme, w):
        return jnp.sum(weight * scheme.fake_quant(w))

    of_scheme, of_w = nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1))(scheme, w)
    for gradient in [of_w, *jax.tree.leaves(of_scheme)]:
        assert jnp.isfinite(gradient).all() and (gradient != 0).any()
    if type(scheme).fake_quant is Scheme.fake_quant:
        np.testing.assert_array_equal(of_w, weight)


# --- Transformations ---------------------------------------------------------------------


def test_transformed_calls_are_eager_ones(spec):
    # One program for all of them, since compiling is what this costs.
    scheme = make(spec)
    layers = jnp.stack([gaussian(seed=seed) for seed in range(3)])

    @jax.jit
    def transformed(layers):
        w = layers[0]
        mapped = jax.vmap(scheme.quantize)(layers), jax.lax.map(scheme.quantize, layers)
        return scheme.quantize(w), scheme.fake_quant(w), mapped

    jitted, dense, mapped = transformed(layers)
    same(jitted, scheme.quantize(layers[0]))
    np.testing.assert_allclose(dense, scheme.fake_quant(layers[0]), rtol=1e-6, atol=1e-8)
    for stacked in mapped:
        for i, w in enumerate(layers):
            same(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), scheme.quantize(w))


def test_shapes_are_known_without_values(spec):
    # `pack_model` runs on abstract models, to plan memory before anything exists.
    scheme, w = make(spec), gaussian()
    packs = scheme.quantize(w).format not in CODEBOOKS

    def stored(w):
        quantized = scheme.quantize(w)
        return quantized.pack("w") if packs else quantized

    abstract, real = jax.eval_shape(stored, w), stored(w)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(
        lambda a: (a.shape, a.dtype), real
    )
    if packs:
        assert abstract.nbytes == real.nbytes
    else:
        assert abstract.bits_per_weight == real.bits_per_weight


def test_the_suite_finds_granularities_and_dtypes():
    groups = "group,group_size=16"
    for name in ("absmean", "twn", "optimal", "sign", "ls", "gptq", "ptqtp", "int8", "int4"):
        expected = [f"{name},granularity={kind}" for kind in ("tensor", "row", groups)]
        assert variants(name) == expected
    assert variants("none") == ["none,dtype=bf16", "none,dtype=f32"]
    assert variants("twn,granularity=row") == ["twn,granularity=row"]
    assert variants(load_guide_scheme()) == [GUIDE]
