"""QuantLinear computes what the papers say; PackedLinear computes the same from packed bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ternax.edit import fuse
from ternax.nn.linear import ACTIVATIONS, PackedLinear, QuantLinear, bf16_product
from ternax.nn.norm import RMSNorm

K, N = 72, 40
X = np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32) * 3


def linear(inputs: str, seed: int = 0, n: int = N) -> QuantLinear:
    return QuantLinear(K, n, scheme="absmean", inputs=inputs, rngs=nnx.Rngs(seed))


def packed(layer: QuantLinear, name: str = "w"):
    return jax.jit(lambda w: layer.scheme.quantize(w).pack(name))(layer.kernel[...])


def apply(module, *args):
    """module(*args), compiled once instead of operation by operation."""
    return jax.jit(lambda *args: module(*args))(*args)


def bitnet(x: np.ndarray, w: np.ndarray, inputs: str) -> np.ndarray:
    """y of BitNet b1.58 in float64: absmean trits, int8 activations per token."""
    scale = np.abs(w).mean()
    trits = np.clip(np.round(w / scale), -1, 1)
    if inputs == "int8":
        step = np.abs(x).max(-1, keepdims=True) / 127
        x = np.round(x / step) * step
    return x.astype(np.float64) @ (trits * np.float64(scale))


@pytest.mark.parametrize("inputs", ["int8", "none"])
def test_both_linears_equal_numpy(inputs):
    layer = linear(inputs)
    right = bitnet(X, np.asarray(layer.kernel[...]), inputs)
    np.testing.assert_allclose(apply(layer, X), right, atol=2e-5)
    found = apply(PackedLinear(packed(layer), inputs=inputs), X)
    np.testing.assert_allclose(found, right, atol=2e-5)


def test_fused_parts_stand_side_by_side():
    layers = [linear("int8", seed, n) for seed, n in ((1, 40), (2, 24), (3, 24))]
    joint = PackedLinear(
        fuse([packed(layer, name) for layer, name in zip(layers, "qkv", strict=True)]),
        inputs="int8",
    )
    assert joint.parts == (("q", 40), ("k", 24), ("v", 24))
    alone = [apply(PackedLinear(packed(layer), inputs="int8"), X) for layer in layers]
    assert np.array_equal(apply(joint, X), np.concatenate(alone, axis=-1))


def test_parts_stored_differently_are_not_fused():
    other = QuantLinear(K, N, scheme="int8", inputs="int8", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot fuse .* stored differently"):
        fuse([packed(linear("int8")), packed(other)])


def test_a_stack_takes_the_layer_index():
    one, two = packed(linear("int8", 1)), packed(linear("int8", 2))
    stack = PackedLinear(jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two), inputs="int8")
    for index, alone in enumerate((one, two)):
        right = apply(PackedLinear(alone, inputs="int8"), X)
        assert np.array_equal(apply(stack, X, jnp.int32(index)), right)
    with pytest.raises(ValueError, match="needs the layer's index"):
        stack(X)


@pytest.mark.parametrize("inputs", ["int8", "none"])
def test_gradients(inputs):
    """Straight through both quantizers: dx = dy W^T from either linear, dW = x^T dy."""
    layer = linear(inputs)
    dy = np.random.default_rng(1).standard_normal((2, 3, N)).astype(np.float32)

    def gradients(module):
        graph, state, rest = nnx.split(module, nnx.Param, ...)
        loss = lambda x, state: jnp.vdot(nnx.merge(graph, state, rest)(x), dy)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(X, state)

    dx, dw = gradients(layer)
    dx_packed, _ = gradients(PackedLinear(packed(layer), inputs=inputs))
    weight = np.asarray(layer.scheme.quantize(layer.kernel[...]).dequantize())
    np.testing.assert_allclose(dx, dy @ weight.T, atol=1e-5)
    np.testing.assert_allclose(dx_packed, dy @ weight.T, atol=1e-5)
    xq = np.asarray(X)
    if inputs == "int8":
        step = np.abs(X).max(-1, keepdims=True) / 127
        xq = np.round(X / step) * step
    np.testing.assert_allclose(dw["kernel"][...], np.einsum("btk,btn->kn", xq, dy), atol=1e-4)


def surrounded(module, x, weight, residual, gate):
    """module with everything round it; weight f32 [K]: RMSNorm's, or None."""
    norm = None
    if weight is not None:
        norm = RMSNorm(K, eps=1e-5)
        norm.weight[...] = weight
    return module(x, gate=gate, norm=norm, residual=residual)


@pytest.mark.parametrize("gate", [None, "silu", "relu2"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("inputs", ["int8", "none"])
def test_what_stands_round_a_projection(gate, normed, inputs):
    """Gate, norm and residual: QuantLinear, every backend, and a float64 composition agree."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((2, 3, 2 * K if gate else K)).astype(np.float32) * 3
    weight = rng.uniform(0.5, 2, K).astype(np.float32) if normed else None
    residual = rng.standard_normal((2, 3, N)).astype(np.float32)
    layer = linear(inputs)
    h = x.astype(np.float64)
    if gate:
        first, second = np.split(h, 2, axis=-1)
        act = first / (1 + np.exp(-first)) if gate == "silu" else np.maximum(first, 0) ** 2
        h = act * second
    if normed:
        h = weight * h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5)
    right = residual + bitnet(h, np.asarray(layer.kernel[...]), inputs)
    # A value on the edge between two int8 codes may round either way: one step of one of K
    # inputs, times the weight's scale.
    edge = np.abs(h).max() / 127 * np.abs(np.asarray(layer.kernel[...])).mean()
    modules = [layer]
    for backend in (None, "reference"):
        modules.append(PackedLinear(packed(layer), inputs=inputs, backend=backend))
    for module in modules:
        run = jax.jit(lambda x, w, r, module=module: surrounded(module, x, w, r, gate))
        found = run(x, weight, residual)
        np.testing.assert_allclose(found, right, atol=(edge if inputs == "int8" else 0) + 1e-4)
        assert np.median(np.abs(found - right)) < 1e-5 * max(1, np.abs(right).max())


def test_gradients_of_a_surrounded_projection_are_those_of_its_parts():
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2, 3, 2 * K)).astype(np.float32)
    weight = rng.uniform(0.5, 2, K).astype(np.float32)
    residual, dy = rng.standard_normal((2, 2, 3, N)).astype(np.float32)
    weights = packed(linear("int8"))

    def gradients(backend):
        module = PackedLinear(weights, inputs="int8", backend=backend)
        loss = lambda *args: jnp.vdot(surrounded(module, *args, "silu"), dy)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weight, residual)

    for found, right in zip(gradients(None), gradients("reference"), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)
    np.testing.assert_allclose(gradients(None)[2], dy)


def test_activations():
    x = jnp.array([-2.0, -0.5, 0.0, 0.5, 3.0])
    np.testing.assert_allclose(ACTIVATIONS["relu2"](x), [0, 0, 0, 0.25, 9])
    np.testing.assert_allclose(ACTIVATIONS["silu"](x), x / (1 + np.exp(-x)), atol=1e-6)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_projection_refuses_shapes_and_keeps_nan(backend):
    """On the path of one call too: nothing is read past its end, nothing wrong turns right."""
    module = PackedLinear(packed(linear("int8")), inputs="int8", backend=backend)
    for columns in (K - 1, K + 1, 2 * K):
        with pytest.raises(ValueError, match=f"x has {columns} columns"):
            module(np.zeros((2, columns), np.float32))
    x = np.random.default_rng(0).standard_normal((2, 2 * K)).astype(np.float32)
    row = np.arange(N, dtype=np.float32)
    plain = module(x, gate="relu2")
    np.testing.assert_allclose(module(x, gate="relu2", residual=row), plain + row, atol=1e-5)
    for gate in ("relu2", "silu"):
        for at in (0, K - 1, K, 2 * K - 1):
            wrong = x.copy()
            wrong[0, at] = np.nan
            y = np.asarray(module(wrong, gate=gate))
            assert np.isnan(y[0]).all() and np.isfinite(y[1]).all(), (gate, at)
    wrong = x[:, :K].copy()
    wrong[1, 3] = np.nan
    assert np.isnan(np.asarray(module(wrong))[1]).all()


def test_a_bf16_product_of_digits_and_trits_is_exact():
    rng = np.random.default_rng(0)
    digits = rng.integers(-127, 128, (5, 3, 96))
    digits[..., 0] = 127  # as absmax quantization leaves every token
    trits = rng.integers(-1, 2, (96, 40))
    sizes = rng.uniform(0.01, 3, (5, 3, 1)).astype(np.float32)
    x = jnp.asarray(digits * sizes, jnp.float32)
    w = jnp.asarray(trits * 0.37, jnp.float32)
    wanted = (digits @ trits) * (sizes.astype(np.float64) * np.float64(np.float32(0.37)))
    np.testing.assert_allclose(bf16_product(x, w), wanted, rtol=1e-6, atol=1e-6)


def test_a_bf16_products_gradients_are_those_of_the_product():
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (7, 48)), jax.random.normal(keys[1], (48, 20))
    g = jax.random.normal(keys[2], (7, 20))
    wanted = jax.vjp(jnp.matmul, x, w)[1](g)
    for found, exact in zip(jax.vjp(bf16_product, x, w)[1](g), wanted, strict=True):
        assert float(jnp.abs(found - exact).max()) < 0.02 * float(jnp.abs(exact).max())
    assert np.isfinite(jax.vjp(bf16_product, x * 0, w)[1](g)[0]).all()
