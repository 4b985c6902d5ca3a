"""The packed matmul against integers of numpy's own: every backend, to the bit.

The oracle never unpacks: it multiplies the values that were packed, in int64. Each test
that takes `backend` runs on every backend this machine has.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import backends, packing, reference
from ternax.kernels.backends import BACKENDS, Backend, BackendError, choose
from ternax.kernels.packing import BLOCK, FORMATS, Packed
from ternax.kernels.ternary_matmul import (
    DIGIT_LIMIT,
    NUM_DIGITS,
    largest_k,
    ternary_matmul,
    ternary_matmul_transposed,
    to_digits,
)
from ternax.nn.linear import PackedLinear
from tests import hlo

FORMAT_NAMES = sorted(FORMATS)


@pytest.fixture(params=sorted(name for name, b in BACKENDS.items() if b.repack is None))
def backend(request):
    """The name of a backend that runs on this platform and reads the canonical layout."""
    reason = BACKENDS[request.param].why_not(jax.default_backend(), None, None)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def random_values(rng, format, shape):
    return rng.integers(FORMATS[format].low, FORMATS[format].high + 1, shape).astype(np.int8)


def packed(values, format="trit2", scale=None, zero=None) -> Packed:
    """values: int8 [..., P, K, N]; scale and zero: [..., P, G, 1 or N], a scale of 1 if None."""
    shape = values.shape[-2:]
    scale = np.ones((*values.shape[:-2], 1, 1), np.float32) if scale is None else scale
    return Packed(
        jnp.asarray(packing.pack_numpy(values, format)),
        jnp.asarray(scale, jnp.float32),
        None if zero is None else jnp.asarray(zero, jnp.float32),
        format,
        shape=shape,
        parts=(("w", shape[1]),),
    )


def random_packed(rng, format, k_size, n, *, planes=1, groups=1, width=None, zero=False):
    """(values int8 [P, K, N], dense f64 [K, N], Packed) with random scales."""
    values = random_values(rng, format, (planes, k_size, n))
    leaf = (planes, groups, n if width is None else width)
    scale = rng.uniform(0.5, 2, leaf).astype(np.float32)
    shift = rng.normal(size=leaf).astype(np.float32) if zero else None
    spread = functools.partial(np.repeat, repeats=k_size // groups, axis=1)
    dense = values + (spread(shift).astype(np.float64) if zero else 0.0)
    dense = (dense * spread(scale)).sum(0)
    return values, dense, packed(values, format, scale, shift)


def random_int8(rng, shape):
    return rng.integers(-128, 128, shape).astype(np.int8)


def random_scale(rng, rows):
    return rng.uniform(0.01, 1, (rows, 1)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("out", "backend", "config"))
def matmul(x, w, x_scale=None, layer=None, *, out="float32", backend=None, config=None):
    """`ternary_matmul`, jitted; config as a tuple of items, since jit hashes it."""
    return ternary_matmul(
        x,
        w,
        x_scale=x_scale,
        layer=layer,
        out_dtype=jnp.dtype(out),
        backend=backend,
        config=config and dict(config),
    )


accumulate = functools.partial(matmul, out="int32")


def exact(x, values):
    """int64 x @ values, with no step that could round or wrap."""
    return x.astype(np.int64) @ values.astype(np.int64)


# --- The integer core --------------------------------------------------------------------


@hypothesis.given(
    st.sampled_from(FORMAT_NAMES),
    st.integers(1, 9),
    st.integers(1, 67),
    st.integers(1, 67),
    st.integers(0, 2**32 - 1),
)
@hypothesis.settings(
    max_examples=20, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_exact_over_ragged_shapes(backend, format, m, k_size, n, seed):
    rng = np.random.default_rng(seed)
    values, x = random_values(rng, format, (k_size, n)), random_int8(rng, (m, k_size))
    found = accumulate(x, packed(values[None], format), backend=backend)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, exact(x, values))


@pytest.mark.parametrize(
    "format, m, k_size, n",
    [
        ("trit2", 1, 1031, 517),
        ("trit2", 2, 4099, 131),
        ("int4", 5, 1283, 257),
        ("int8", 3, 769, 511),
    ],
)
def test_exact_over_larger_odd_shapes(backend, format, m, k_size, n):
    rng = np.random.default_rng(k_size)
    values, x = random_values(rng, format, (k_size, n)), random_int8(rng, (m, k_size))
    found = accumulate(x, packed(values[None], format), backend=backend)
    np.testing.assert_array_equal(found, exact(x, values))


@pytest.mark.parametrize("format, k_size", [("trit2", 8209), ("int4", 8209), ("int8", 65793)])
def test_exact_at_extremes(backend, format, k_size):
    # int8 at the largest K the op accepts: 65793 * 128 * 255 is just short of 2^31.
    fmt = FORMATS[format]
    rng = np.random.default_rng(0)
    values = random_values(rng, format, (k_size, 5))
    values[:, 0], values[:, 1], values[:, 2] = fmt.low, fmt.high, 0
    values[:, 3] = np.where(np.arange(k_size) % 2, fmt.low, fmt.high)
    x = random_int8(rng, (4, k_size))
    x[0], x[1], x[2] = 127, -128, np.where(np.arange(k_size) % 2, -128, 127)
    found = accumulate(x, packed(values[None], format), backend=backend)
    np.testing.assert_array_equal(found, exact(x, values))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_exact_in_a_stack(backend, format):
    rng = np.random.default_rng(1)
    stack, x = random_values(rng, format, (3, 1, 50, 21)), random_int8(rng, (2, 50))
    w = packed(stack, format)
    for layer in range(3):
        found = accumulate(x, w, layer=jnp.int32(layer), backend=backend)
        np.testing.assert_array_equal(found, exact(x, stack[layer, 0]))


def test_code_three_is_plus_two_in_the_reference():
    # Only noise on packed bits makes it; no other backend has to take it.
    w = Packed(jnp.full((1, 3, 4), 255, jnp.uint8), jnp.ones((1, 1, 1)), shape=(16, 3))
    x = np.arange(-8, 8, dtype=np.int8)[None]
    found = accumulate(x, w, backend="reference")
    np.testing.assert_array_equal(found, np.full((1, 3), 2 * x.sum()))


def test_leading_axes_and_single_vector(backend):
    rng = np.random.default_rng(2)
    values = random_values(rng, "trit2", (40, 7))
    w = packed(values[None])
    x = random_int8(rng, (2, 3, 40))
    np.testing.assert_array_equal(accumulate(x, w, backend=backend), exact(x, values))
    np.testing.assert_array_equal(accumulate(x[1, 2], w, backend=backend), exact(x[1, 2], values))


# --- What must not change a bit ----------------------------------------------------------

# Of 45 rows: a loop with a tail, with a tail of one, and the whole at once.
BLOCK_ROWS = (16, 44, 99)


@pytest.mark.parametrize("format, kind", [("trit2", "int8"), ("trit2", "float"), ("int8", "float")])
def test_block_rows_change_nothing(format, kind):
    rng = np.random.default_rng(3)
    _, _, w = random_packed(rng, format, 64, 45)
    args = (random_int8(rng, (3, 64)), w, random_scale(rng, 3))
    if kind == "float":
        args = (rng.normal(size=(3, 64)).astype(np.float32), w)
    expected = matmul(*args, backend="reference")
    for rows in BLOCK_ROWS if format == "trit2" else (44,):
        found = matmul(*args, backend="reference", config=(("block_rows", rows),))
        np.testing.assert_array_equal(found, expected, err_msg=f"block_rows={rows}")


@pytest.mark.parametrize(
    "n, options, batches",
    [
        (33, dict(width=1), (1, 5)),
        (1, dict(width=1), (1,)),
        (33, {}, (1,)),
        (33, dict(groups=4), (1,)),
        (33, dict(planes=2, width=1), (1,)),
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_its_batch(backend, n, options, batches):
    rng = np.random.default_rng(4)
    _, _, w = random_packed(rng, "trit2", 64, n, **options)
    cases = [(rng.normal(size=(24, 64)).astype(np.float32), None)]
    if len(batches) > 1:
        cases += [(random_int8(rng, (24, 64)), random_scale(rng, 24))]
    for rows, scale in cases:
        whole = matmul(rows, w, scale, backend=backend)
        for m in batches:
            cuts = [slice(i, i + m) for i in range(0, 20, m)]
            parts = [
                matmul(rows[cut], w, None if scale is None else scale[cut], backend=backend)
                for cut in cuts
            ]
            np.testing.assert_array_equal(np.concatenate(parts), whole[:20], err_msg=f"batch {m}")


@pytest.mark.parametrize("inputs", ["int8", "none"])
def test_a_packed_linear_does_not_depend_on_its_batch(inputs):
    # Quantizer and product compile into one program here, and may not be rearranged together.
    rng = np.random.default_rng(5)
    _, _, w = random_packed(rng, "trit2", 64, 33, width=1)
    linear = jax.jit(lambda x, w: PackedLinear(w, inputs=inputs)(x))
    x = rng.normal(size=(24, 64)).astype(np.float32)
    whole = linear(x, w)
    np.testing.assert_array_equal(
        np.concatenate([linear(x[i : i + 1], w) for i in range(24)]), whole
    )


def test_jit_is_eager(backend):
    rng = np.random.default_rng(6)
    eager = functools.partial(ternary_matmul, out_dtype=jnp.float32, backend=backend)
    floats = rng.normal(size=(3, 64)).astype(np.float32)
    _, _, w = random_packed(rng, "trit2", 64, 45)
    np.testing.assert_array_equal(eager(floats, w), matmul(floats, w, backend=backend))
    # With a zero, a rounding more or less: XLA joins a multiply and an add where it may.
    _, _, w = random_packed(rng, "trit2", 64, 45, groups=4, zero=True)
    x, x_scale = random_int8(rng, (3, 64)), random_scale(rng, 3)
    found, expected = eager(x, w, x_scale=x_scale), matmul(x, w, x_scale, backend=backend)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


# --- Scales, zeros, planes, and float activations ----------------------------------------

LEAVES = {
    "trit2": dict(groups=4, zero=True),
    "int4": dict(zero=True, width=1),
    "int8": dict(planes=3, groups=2, zero=True, width=1),
    "trit2 ": dict(planes=2),
}


@pytest.mark.parametrize("format", LEAVES)
def test_scales_and_zeros_against_float64(backend, format):
    rng = np.random.default_rng(7)
    _, dense, w = random_packed(rng, format.strip(), 128, 19, **LEAVES[format])
    x, x_scale = random_int8(rng, (3, 128)), random_scale(rng, 3)
    expected = (x * x_scale.astype(np.float64)) @ dense
    rounding = 2e-6 * (np.abs(x * x_scale) @ np.abs(dense))
    error = np.abs(matmul(x, w, x_scale, backend=backend) - expected)
    assert (error <= rounding).all(), (error / rounding).max()

    floats = rng.normal(size=(3, 128)).astype(np.float32)
    expected = floats.astype(np.float64) @ dense
    # Each activation is off by 2^-20.98 of its row's peak at most, see `to_digits`.
    rounding = 2e-6 * (np.abs(floats) @ np.abs(dense))
    digits = np.abs(floats).max(-1, keepdims=True) * 2.0**-20.98 * np.abs(dense).sum(0)
    error = np.abs(matmul(floats, w, backend=backend) - expected)
    assert (error <= rounding + digits).all(), (error / (rounding + digits)).max()


def test_groups_and_zero_of_one_layer_of_a_stack(backend):
    rng = np.random.default_rng(8)
    layers = [random_packed(rng, "int4", 64, 19, groups=2, zero=True) for _ in range(3)]
    w = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[w for _, _, w in layers])
    x, x_scale = random_int8(rng, (2, 64)), random_scale(rng, 2)
    for i, (_, dense, _) in enumerate(layers):
        found = matmul(x, w, x_scale, jnp.int32(i), backend=backend)
        np.testing.assert_allclose(found, (x * x_scale) @ dense, rtol=1e-4, atol=1e-2)


def test_out_dtype_rounds_once(backend):
    rng = np.random.default_rng(9)
    _, _, w = random_packed(rng, "trit2", 64, 45)
    x, x_scale = random_int8(rng, (3, 64)), random_scale(rng, 3)
    full = matmul(x, w, x_scale, backend=backend)
    for out in ("bfloat16", "float16"):
        found = matmul(x, w, x_scale, backend=backend, out=out)
        np.testing.assert_array_equal(found, full.astype(out))
    assert jax.eval_shape(ternary_matmul, x, w, x_scale=x_scale).dtype == jnp.bfloat16


@hypothesis.example(seed=9, exponent=-27)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(-35, 37))
def test_digits_are_within_their_bound(seed, exponent):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(8, 32)) * rng.choice([1, 1e-3], (8, 32))).astype(np.float32)
    x[0], x[1, 0], x[2, 1:] = 0, -5, x[2, 0]  # a row of zeros, a negative peak, one value
    x = x * np.float32(10.0**exponent)
    # Peaks about the places where the scale steps: powers of two, and 1.984 times them.
    edges = [127 / 64, np.nextafter(np.float32(127 / 64), 2), 1, np.nextafter(np.float32(2), 0)]
    x[4:, :1] = np.ldexp(np.float32(edges), np.frexp(np.abs(x[4:]).max(-1))[1])[:, None]
    digits, scale = map(np.asarray, jitted_digits(x))
    assert digits.dtype == np.int8 and digits.shape == (NUM_DIGITS, 8, 32)
    place = np.array([1, 128, 128**2], np.int64)
    v = np.einsum("dmk,d->mk", digits.astype(np.int64), place)
    assert np.abs(v).max() <= DIGIT_LIMIT
    # A row that is all below 1e-30 is scaled as if that were its maximum.
    peak = np.maximum(np.abs(x).max(-1, keepdims=True).astype(np.float64), 1e-30)
    assert (np.abs(v * scale.astype(np.float64) - x) <= peak * 2.0**-20.98).all()


jitted_digits = jax.jit(to_digits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_activations_are_taken_exactly(dtype):
    rng = np.random.default_rng(10)
    _, _, w = random_packed(rng, "trit2", 64, 45)
    x = jnp.asarray(rng.normal(size=(3, 64)), dtype)
    np.testing.assert_array_equal(matmul(x, w), matmul(x.astype(jnp.float32), w))


@pytest.mark.parametrize("format", sorted(packing.FLOAT_FORMATS))
@pytest.mark.parametrize("block_bytes", [1 << 20, 512])
def test_float_formats_multiply_what_they_store(format, block_bytes, monkeypatch):
    # 512 bytes a block: a loop with a tail.
    monkeypatch.setattr(reference, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(11)
    dense = rng.normal(size=(2, 1, 23, 50)).astype(np.float32)
    data = packing.float_to_bits(jnp.asarray(dense), format)
    w = Packed(data, jnp.ones((2, 1, 1, 1)), format=format, shape=(50, 23))
    stored = np.asarray(packing.bits_to_float(data), np.float64)
    x = rng.normal(size=(3, 50)).astype(np.float32)
    found = ternary_matmul(x, w, layer=1, out_dtype=jnp.float32)
    np.testing.assert_allclose(found, x @ stored[1, 0].T, rtol=1e-5, atol=1e-5)
    codes, x_scale = random_int8(rng, (3, 50)), random_scale(rng, 3)
    found = ternary_matmul(codes, w, layer=0, x_scale=x_scale, out_dtype=jnp.float32)
    np.testing.assert_allclose(found, (codes * x_scale) @ stored[0, 0].T, rtol=1e-5, atol=1e-3)


# --- Gradients ---------------------------------------------------------------------------


def gradient(loss, x):
    return jax.jit(jax.grad(loss))(x)


def close(found, expected):
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * size)


@pytest.mark.parametrize("block_bytes", [1 << 20, 64])
@pytest.mark.parametrize(
    "format, options",
    [("trit2", {}), ("int4", dict(groups=2, zero=True)), ("int8", dict(planes=2, width=1))],
)
def test_gradients_are_the_dense_ones(format, options, block_bytes, monkeypatch):
    # 64 bytes a block: a loop with a tail in the transposed product.
    monkeypatch.setattr(reference, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(12)
    k_size = 64 if options.get("groups") else 61
    _, dense, w = random_packed(rng, format, k_size, 19, **options)
    g = rng.normal(size=(2, 3, 19)).astype(np.float32)
    x = rng.normal(size=(2, 3, k_size)).astype(np.float32)
    dx = gradient(lambda x: jnp.sum(g * ternary_matmul(x, w, out_dtype=jnp.float32)), x)
    close(dx, g @ dense.T)
    close(jax.jit(ternary_matmul_transposed)(g, w), dx)

    codes, x_scale = random_int8(rng, (2, 3, k_size)), rng.uniform(0.1, 1, (2, 3, 1))
    loss = lambda s: jnp.sum(g * ternary_matmul(codes, w, x_scale=s, out_dtype=jnp.float32))  # noqa: E731
    d_scale = gradient(loss, x_scale.astype(np.float32))
    close(d_scale, np.sum(g * (codes.astype(np.float64) @ dense), -1, keepdims=True))


@pytest.mark.parametrize("format", sorted(packing.FLOAT_FORMATS))
def test_gradient_of_a_float_format(format):
    rng = np.random.default_rng(13)
    dense = rng.normal(size=(1, 23, 50)).astype(np.float32)
    data = packing.float_to_bits(jnp.asarray(dense), format)
    w = Packed(data, jnp.ones((1, 1, 1)), format=format, shape=(50, 23))
    g, x = rng.normal(size=(3, 23)).astype(np.float32), rng.normal(size=(3, 50)).astype(np.float32)
    dx = gradient(lambda x: jnp.sum(g * ternary_matmul(x, w, out_dtype=jnp.float32)), x)
    close(dx, g @ np.asarray(packing.bits_to_float(data), np.float64)[0])


@pytest.mark.parametrize("inputs", ["int8", "none"])
def test_packed_linear_is_straight_through(inputs):
    # Rounding the input has no gradient of its own: dx = dy W^T, as if it were not there.
    rng = np.random.default_rng(14)
    values = random_values(rng, "trit2", (2, 1, 40, 21))
    scale = rng.uniform(0.5, 2, (2, 1, 1, 21)).astype(np.float32)
    linear = PackedLinear(packed(values, "trit2", scale), inputs=inputs)
    g, x = rng.normal(size=(3, 21)).astype(np.float32), rng.normal(size=(3, 40)).astype(np.float32)
    for layer in range(2):
        dx = gradient(lambda x, layer=layer: jnp.sum(g * linear(x, jnp.int32(layer))), x)
        close(dx, g @ (values[layer, 0] * scale[layer, 0]).T)


# --- Choosing a backend ------------------------------------------------------------------


def fake(name, reason=None, run=None):
    return Backend(name, lambda platform, x, w: reason, run or reference.run, reference.heuristic)


@pytest.fixture
def table(monkeypatch):
    """Only the reference, on every platform; tests add to it."""
    monkeypatch.setattr(backends, "BACKENDS", {"reference": BACKENDS["reference"]})
    monkeypatch.setattr(backends, "ORDER", {"cpu": ("reference",)})
    return backends.BACKENDS


def test_an_unknown_backend_is_named_with_those_there_are(table):
    table["other"] = fake("other")
    with pytest.raises(
        BackendError, match="no backend is named 'nope'; there are: reference, other"
    ):
        choose("cpu", name="nope")
    w = packed(np.zeros((1, 16, 2), np.int8))
    with pytest.raises(BackendError, match="nope"):
        ternary_matmul(jnp.zeros((1, 16)), w, backend="nope")


def test_a_named_backend_runs_or_raises(table):
    table["broken"] = fake("broken", "it needs a unicorn")
    with pytest.raises(BackendError, match="'broken' cannot run here: it needs a unicorn"):
        choose("cpu", name="broken")
    backends.ORDER["cpu"] = ("broken", "reference")
    assert choose("cpu").name == "reference"


def test_every_reason_is_told_when_none_can_run(table):
    table["one"], table["two"] = fake("one", "no wheels"), fake("two", "no wings")
    backends.ORDER["cpu"] = ("one", "two")
    with pytest.raises(BackendError, match="one: no wheels; two: no wings"):
        choose("cpu")


def test_the_first_of_the_order_runs(monkeypatch):
    # The table itself, not a copy: a call must reach the backend that `choose` names.
    calls = []

    def run(*args):
        calls.append("fast")
        return reference.run(*args)

    monkeypatch.setitem(BACKENDS, "fast", fake("fast", run=run))
    monkeypatch.setitem(backends.ORDER, jax.default_backend(), ("fast", "reference"))
    x, w = jnp.ones((1, 16)), packed(np.ones((1, 16, 2), np.int8))
    jax.eval_shape(ternary_matmul, x, w)
    jax.eval_shape(functools.partial(ternary_matmul, backend="reference"), x, w)
    assert calls == ["fast"]


def test_unlisted_platforms_take_the_reference(table):
    assert choose("a chip of the future").name == "reference"


def test_a_private_layout_is_refused():
    w = Packed(jnp.zeros((1, 2, 4), jnp.uint8), jnp.ones((1, 1, 1)), layout="mine", shape=(16, 2))
    with pytest.raises(
        BackendError, match="reference: it reads the canonical layout, found 'mine'"
    ):
        ternary_matmul(jnp.zeros((1, 16)), w)


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_every_backend_says_why_not_without_a_call(name):
    for platform in ("cpu", "gpu", "tpu"):
        reason = BACKENDS[name].why_not(platform, None, None)
        assert reason is None or (reason and "\n" not in reason)


def test_the_order_names_backends():
    assert {name for order in backends.ORDER.values() for name in order} <= set(BACKENDS)
    assert all("reference" in order for order in backends.ORDER.values())


# --- Refusals ----------------------------------------------------------------------------

W = packed(np.ones((1, 32, 3), np.int8))
GROUPED = packed(np.ones((1, 32, 3), np.int8), scale=np.ones((1, 2, 3)))
STACK = packed(np.ones((2, 1, 32, 3), np.int8))
BF16 = Packed(
    jnp.zeros((2, 1, 3, 32), jnp.uint16), jnp.ones((2, 1, 1, 1)), format="bf16", shape=(32, 3)
)
X, X8, ONE = jnp.ones((2, 32)), jnp.ones((2, 32), jnp.int8), jnp.ones((2, 1))


def replaced(w, **changes):
    fields = dict(data=w.data, scale=w.scale, zero=w.zero, format=w.format, shape=w.shape)
    return Packed(**(fields | changes))


REFUSED = {
    "format": (
        BackendError,
        "must be one of trit2, int4, int8, bf16, f32, found 'trit9'",
        (X, replaced(W, format="trit9")),
        {},
    ),
    "columns": (ValueError, "x has 31 columns, W has K = 32 rows", (X[:, :31], W), {}),
    "data": (
        ValueError,
        r"must end in \(3, 8\) for W 32x3 in trit2, found \(1, 3, 4\)",
        (X, replaced(W, data=W.data[..., :4])),
        {},
    ),
    "stack without layer": (
        ValueError,
        r"a stack needs `layer`.*\(2, 1, 3, 8\), layer None",
        (X, STACK),
        {},
    ),
    "layer without stack": (
        ValueError,
        r"a stack needs `layer`.*\(1, 3, 8\), layer 0",
        (X, W),
        dict(layer=0),
    ),
    "planes of scale": (
        ValueError,
        r"scale must be \(1,\) \+ \(groups, 1 or 3\), found \(2, 1, 1\)",
        (X, replaced(W, scale=jnp.ones((2, 1, 1)))),
        {},
    ),
    "width of scale": (
        ValueError,
        "scale must be",
        (X, replaced(W, scale=jnp.ones((1, 1, 2)))),
        {},
    ),
    "unstacked scale": (
        ValueError,
        r"scale must be \(2, 1\)",
        (X, replaced(STACK, scale=W.scale)),
        dict(layer=0),
    ),
    "zero": (
        ValueError,
        r"zero must be shaped like scale \(1, 2, 3\), found \(1, 1, 3\)",
        (X, replaced(GROUPED, zero=jnp.ones((1, 1, 3)))),
        {},
    ),
    "groups": (
        ValueError,
        "4 groups must cut K = 32 into multiples of 16",
        (X, replaced(W, scale=jnp.ones((1, 4, 3)))),
        {},
    ),
    "no rows of W": (
        ValueError,
        "K must be at least 1",
        (X[:, :0], replaced(W, data=W.data[..., :0], shape=(0, 3))),
        {},
    ),
    "overflow": (
        ValueError,
        "K = 131072 could overflow the int32 accumulator in int8",
        (
            jnp.ones((1, 131072)),
            Packed(
                jnp.full((1, 1, 131072), 128, jnp.uint8),
                jnp.ones((1, 1, 1)),
                format="int8",
                shape=(131072, 1),
            ),
        ),
        {},
    ),
    "x dtype": (TypeError, "x must be int8 or float, found int32", (X8.astype(jnp.int32), W), {}),
    "x_scale of floats": (
        TypeError,
        "x_scale belongs to int8 activations",
        (X, W),
        dict(x_scale=ONE),
    ),
    "no x_scale": (
        ValueError,
        r"int8 x \(2, 32\) needs x_scale of shape \(2, 1\), found None",
        (X8, W),
        {},
    ),
    "shape of x_scale": (
        ValueError,
        r"needs x_scale of shape \(2, 1\), found \(2,\)",
        (X8, W),
        dict(x_scale=ONE[:, 0]),
    ),
    "int32 of floats": (ValueError, "int32 output needs int8 x", (X, W), dict(out_dtype=jnp.int32)),
    "int32 of groups": (
        ValueError,
        "int32 output needs int8 x",
        (X8, GROUPED),
        dict(out_dtype=jnp.int32),
    ),
    "int32 of a zero": (
        ValueError,
        "int32 output needs int8 x",
        (X8, replaced(W, zero=W.scale)),
        dict(out_dtype=jnp.int32),
    ),
    "int32 of planes": (
        ValueError,
        "int32 output needs int8 x",
        (X8, packed(np.ones((2, 32, 3), np.int8))),
        dict(out_dtype=jnp.int32),
    ),
    "int32 of bf16": (
        ValueError,
        "int32 output needs int8 x",
        (X8, BF16),
        dict(out_dtype=jnp.int32, layer=0),
    ),
    "bf16 stack without layer": (ValueError, "a stack needs `layer`", (X, BF16), {}),
    "bf16 without x_scale": (ValueError, "needs x_scale", (X8, BF16), dict(layer=0)),
    "bf16 data": (
        ValueError,
        r"must end in \(3, 32\)",
        (X, replaced(BF16, data=BF16.data[..., :8])),
        dict(layer=0),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, args, options = REFUSED[name]
    with pytest.raises(error, match=message):
        ternary_matmul(*args, **options)


@pytest.mark.parametrize("format, k_size", dict(trit2=2796202, int4=1118481, int8=65793).items())
def test_the_largest_k_is_one_below_the_refused(format, k_size):
    """No lane can overflow: codes as they are, and left at their bit position in 8 lanes."""
    fmt = FORMATS[format]
    code = 2**fmt.bits - 1
    in_place, lane = code << (8 - fmt.bits), k_size // (8 * fmt.planes)  # whole vectors
    assert 128 * code * k_size < 2**31
    assert format == "int8" or 128 * in_place * lane < 2**31
    assert largest_k(format) == k_size

    def shape(k_size):
        data = jax.ShapeDtypeStruct((1, 1, fmt.row_bytes(k_size)), jnp.uint8)
        w = Packed(data, jnp.ones((1, 1, 1)), format=format, shape=(k_size, 1))
        x = jax.ShapeDtypeStruct((1, k_size), jnp.float32)
        return jax.eval_shape(ternary_matmul, x, w).shape

    assert shape(k_size) == (1, 1)
    with pytest.raises(ValueError, match=f"in {format}, which holds K up to {k_size}\\b"):
        shape(k_size + 1)


# --- Nothing is copied -------------------------------------------------------------------

LAYERS, SIZE = 4, 4096


def program(format, x_dtype, *, batch=1, planes=1, groups=1, zero=False, function=ternary_matmul):
    """The compiled matmul of one layer of a stack, and the bytes of one block of it."""
    array = jax.ShapeDtypeStruct
    row, dtype = SIZE, packing.FLOAT_FORMATS.get(format)
    if format in FORMATS:
        row, dtype = FORMATS[format].row_bytes(SIZE), jnp.uint8
    scale = array((LAYERS, planes, groups, SIZE), jnp.float32)
    w = Packed(
        array((LAYERS, planes, SIZE, row), dtype),
        scale,
        scale if zero else None,
        format,
        shape=(SIZE, SIZE),
    )
    x, layer = array((batch, SIZE), x_dtype), array((), jnp.int32)
    if x_dtype == jnp.int8:
        call = lambda x, s, w, i: function(x, w, layer=i, x_scale=s)  # noqa: E731
        args = (x, array((batch, 1), jnp.float32), w, layer)
    else:
        call, args = lambda x, w, i: function(x, w, layer=i), (x, w, layer)
    rows = reference.heuristic(None, w)["block_rows"] if format in FORMATS else SIZE // 32
    return jax.jit(call).lower(*args).compile(), rows * row // groups


@pytest.mark.parametrize(
    "format, x_dtype, options",
    [
        ("trit2", jnp.int8, {}),
        ("trit2", jnp.float32, dict(batch=5)),
        ("trit2", jnp.int8, dict(planes=2, zero=True)),
        ("int4", jnp.int8, dict(groups=32)),
        ("int8", jnp.float32, {}),
        ("bf16", jnp.float32, {}),
    ],
    ids=str,
)
def test_no_weight_is_copied(backend, format, x_dtype, options):
    function = functools.partial(ternary_matmul, backend=backend, out_dtype=jnp.float32)
    compiled, block = program(format, x_dtype, function=function, **options)
    assert block >= 1 << 15 > BLOCK  # well above what activations take
    assert hlo.copies(compiled, block // 2) == []
    # Neither is a whole layer unpacked: that would be 16 MiB at least.
    assert hlo.temp_bytes(compiled) < SIZE * SIZE


@pytest.mark.parametrize("format", ["trit2", "bf16"])
def test_no_weight_is_copied_for_a_gradient(format):
    compiled, block = program(format, jnp.float32, function=ternary_matmul_transposed)
    assert hlo.copies(compiled, block // 2) == []
