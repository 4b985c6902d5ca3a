"""QuantLinear computes what the papers say; PackedLinear computes the same from packed bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ternax.edit import fuse
from ternax.nn.linear import PackedLinear, QuantLinear
from ternax.nn.mlp import ACTIVATIONS

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


def test_fused_parts_come_back_apart():
    layers = [linear("int8", seed, n) for seed, n in ((1, 40), (2, 24), (3, 24))]
    joint = PackedLinear(
        fuse([packed(layer, name) for layer, name in zip(layers, "qkv", strict=True)]),
        inputs="int8",
    )
    assert joint.parts == (("q", 40), ("k", 24), ("v", 24))
    for layer, y in zip(layers, apply(joint, X), strict=True):
        assert np.array_equal(y, apply(PackedLinear(packed(layer), inputs="int8"), X))


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


def test_activations():
    x = jnp.array([-2.0, -0.5, 0.0, 0.5, 3.0])
    np.testing.assert_allclose(ACTIVATIONS["relu2"](x), [0, 0, 0, 0.25, 9])
    np.testing.assert_allclose(ACTIVATIONS["silu"](x), x / (1 + np.exp(-x)), atol=1e-6)
