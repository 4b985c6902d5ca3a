"""`QuantLinear` trains and studies, `PackedLinear` runs; `pack_model` turns one into the other."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.kernels import target
from ternax.kernels.across import ternary_matmul_across
from ternax.kernels.backends import choose
from ternax.kernels.packing import FORMATS, Packed
from ternax.kernels.ternary_matmul import (
    ternary_matmul,
    ternary_matmul_transposed,
    validate,
)
from ternax.nn.norm import RMSNorm, rms_norm
from ternax.quant import make_scheme
from ternax.quant.inputs import INPUTS

COMPUTE = ("f32", "bf16")
ACTIVATIONS = {"silu": jax.nn.silu, "relu2": lambda x: jnp.square(jax.nn.relu(x))}


def enter(
    x: jax.Array,
    gate: str | None,
    norm: jax.Array | None,
    eps: float,
    across: str | None = None,
) -> jax.Array:
    """What a projection's input goes through first: a gate, then RMSNorm with weight `norm`.

    x: float [..., K]; with a gate [..., 2 K], of which comes act(first half) * second half.
    across: the mesh axis that K is split over, inside `shard_map`.
    """
    x = x.astype(jnp.float32)
    if gate is not None:
        first, second = jnp.split(x, 2, axis=-1)
        x = ACTIVATIONS[gate](first) * second
    return x if norm is None else rms_norm(x, norm, eps, across)


class PackedStack(nnx.Variable):
    """A leaf of a packed weight. In a stack of layers it stays whole: kernels take the
    stack and a layer index, since slicing a layer out would copy it."""


class QuantLinear(nnx.Module):
    """y = quantized(x) fake_quant(W): float latent weights under a scheme.

    Attributes:
      kernel: f32 [K, N].
      scheme: the Scheme instance of this weight.
      inputs: a key of `quant.inputs.INPUTS`.
      compute: a key of COMPUTE: what the factors of the product are held in.
    """

    def __init__(
        self, in_features: int, out_features: int, *, scheme: str, inputs: str, rngs: nnx.Rngs
    ):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * in_features**-0.5)
        self.scheme = make_scheme(scheme, shape, rngs=rngs)
        self.inputs = inputs
        self.compute = "f32"

    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array | None = None,
        *,
        gate: str | None = None,
        norm: RMSNorm | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """residual + quantized(norm(gate(x))) W, as for PackedLinear: f32 [..., N].

        `layer` is unused: the weight comes as one layer's.
        """
        del layer
        y = side_by_side([self], x, gate=gate, norm=norm)
        return y if residual is None else residual + y

    def read(self, x: jax.Array, *, gate: str | None, norm: RMSNorm | None) -> jax.Array:
        """What the product multiplies: quantized(norm(gate(x))), f32 [..., K]."""
        return INPUTS[self.inputs].fake_quant(enter(x, gate, *weight_of(norm)))


def side_by_side(
    linears: Sequence[QuantLinear],
    x: jax.Array,
    *,
    gate: str | None = None,
    norm: RMSNorm | None = None,
) -> jax.Array:
    """The outputs of linears that share an input, side by side: f32 [..., sum of N].

    The input is normed and quantized once, and one product reads it once.
    """
    first = linears[0]
    x = first.read(x, gate=gate, norm=norm)
    weights = [linear.scheme.fake_quant(linear.kernel[...]) for linear in linears]
    w = weights[0] if len(weights) == 1 else jnp.concatenate(weights, axis=1)
    return x @ w if first.compute == "f32" else bf16_product(x, w)


@jax.custom_vjp
def bf16_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x W with bf16 factors and f32 sums. x: f32 [..., K]; w: f32 [K, N] -> f32 [..., N].

    Rows of x and columns of W are scaled by their largest value first. Int8 digits of a
    token and trits then become small integers, which bf16 holds exactly: the product of a
    quantized input with a ternary weight is as exact as in f32. Gradients are rounded.
    """
    return _bf16_forward(x, w)[0]


def _bf16_forward(x, w):
    digits, row = _scaled(x, -1, 127.0)
    codes, column = _scaled(w, 0, 1.0)
    y = jnp.matmul(digits, codes, preferred_element_type=jnp.float32)
    return y * row * column, (digits, row, codes, column)


def _bf16_backward(saved, g):
    digits, row, codes, column = saved
    dx = jnp.matmul((g * column).astype(jnp.bfloat16), codes.T, preferred_element_type=jnp.float32)
    # Row scales go into g, where they are summed over; digits stay what they were.
    g = (g * row).astype(jnp.bfloat16).reshape(-1, g.shape[-1])
    dw = jnp.matmul(digits.reshape(-1, digits.shape[-1]).T, g, preferred_element_type=jnp.float32)
    return dx, dw


bf16_product.defvjp(_bf16_forward, _bf16_backward)


def _scaled(x, axis, most):
    """(bf16 x / scale, f32 scale): the largest |x| along the axis becomes `most`."""
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / most
    return (x / jnp.where(scale > 0, scale, 1)).astype(jnp.bfloat16), scale


class PackedLinear(nnx.Module):
    """y = x W from packed weights, one matrix or several fused along N.

    Attributes:
      data, scale, zero: the leaves of a `kernels.packing.Packed`.
      parts: (name, width) of each fused matrix, whose outputs stand side by side.
      backend: a name in `kernels.backends.BACKENDS`, or None to choose by platform.
      across: the mesh axis that K is split over, inside `shard_map`; None: it is whole here.
      one_scale: of a split K: whether all of its parts have the same scales.
    """

    def __init__(self, packed: Packed, *, inputs: str, backend: str | None = None):
        self.across: str | None = None
        self.one_scale = True
        self.data = PackedStack(packed.data)
        self.scale = PackedStack(packed.scale)
        self.zero = None if packed.zero is None else PackedStack(packed.zero)
        self.format, self.layout, self.shape, self.parts = (
            packed.format,
            packed.layout,
            packed.shape,
            packed.parts,
        )
        self.inputs = inputs
        self.backend = backend

    @property
    def packed(self) -> Packed:
        """The weight as kernels read it; a whole stack where layers are stacked."""
        zero = None if self.zero is None else self.zero.get_value()
        return Packed(
            self.data.get_value(),
            self.scale.get_value(),
            zero,
            self.format,
            self.layout,
            self.shape,
            self.parts,
        )

    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array | None = None,
        *,
        gate: str | None = None,
        norm: RMSNorm | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """residual + quantized(norm(gate(x))) W.

        Args:
          x: float [..., K]; with a gate [..., 2 K].
          layer: int32 [] in a stack.
          gate: a key of ACTIVATIONS: its value of x's first half times the second half.
          norm: applied behind the gate.
          residual: f32 [..., N], added to the product.

        Returns:
          f32 [..., N]; of several fused matrices their outputs side by side.
        """
        packed = self.packed
        stacked = packed.data.ndim == 4
        if stacked and layer is None:
            raise ValueError("a stacked PackedLinear needs the layer's index")
        weight, eps = weight_of(norm)
        static = Static(self.inputs, self.backend, gate, eps)
        layer = layer if stacked else None
        if residual is not None:
            shape = (*x.shape[:-1], packed.shape[1])
            residual = jnp.broadcast_to(residual, shape).astype(jnp.float32)
        if self.across is not None:
            x = enter(x, gate, weight, eps, self.across)
            xq, x_scale = INPUTS[self.inputs](x, self.across)
            y = ternary_matmul_across(
                xq,
                packed,
                self.across,
                one_scale=self.one_scale,
                layer=layer,
                x_scale=x_scale,
                backend=self.backend,
            )
            return y if residual is None else residual + y
        project = _in_one_call(static, x, packed, layer)
        if project is not None:
            return _fused(project, static, x, weight, packed, residual, layer)
        return _composed(static, x, weight, packed, residual, layer)


def weight_of(norm: RMSNorm | None) -> tuple[jax.Array | None, float]:
    return (None, 0.0) if norm is None else (norm.weight[...], norm.eps)


class Static(NamedTuple):
    """What a projection is compiled for. inputs: a key of INPUTS; eps: of the norm."""

    inputs: str
    backend: str | None
    gate: str | None
    eps: float


def _in_one_call(static: Static, x, w: Packed, layer) -> Callable[..., jax.Array] | None:
    """`Backend.project` of the backend chosen, where it takes this projection; else None.

    Raises what `ternary_matmul` would raise of shapes that break its contract.
    """
    if (
        static.inputs != "int8"
        or w.format not in FORMATS
        or static.gate not in (None, *ACTIVATIONS)
    ):
        return None
    columns = x.shape[-1]
    if static.gate is not None:
        columns, odd = divmod(columns, 2)
        if odd:
            raise ValueError(f"a gated x needs two equal halves, found {x.shape[-1]} columns")
    rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), columns), jnp.int8)
    validate(rows, w, layer, jax.ShapeDtypeStruct((*rows.shape[:-1], 1), jnp.float32), jnp.float32)
    return choose(target.current().platform, rows, w, static.backend).project


def _composed(static: Static, x, norm, w: Packed, residual, layer):
    """The projection in separate steps, right on every backend."""
    if norm is not None or static.gate is not None:
        x = enter(x, static.gate, norm, static.eps)
    y = packed_matmul((static.inputs, static.backend), x, w, layer)
    return y if residual is None else residual + y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(project, static: Static, x, norm, w: Packed, residual, layer):
    """The projection in one call of the backend: `project`, from `_in_one_call`."""
    stacked = w if w.data.ndim == 4 else jax.tree.map(lambda leaf: leaf[None], w)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    shape = (*x.shape[:-1], w.shape[1])
    y = project(
        rows,
        None if norm is None else jnp.broadcast_to(norm, (w.shape[0],)).astype(jnp.float32),
        stacked,
        None if residual is None else residual.reshape(-1, shape[-1]),
        jnp.int32(0) if layer is None else layer,
        gate=static.gate,
        eps=static.eps,
    )
    return y.reshape(shape)


def _fused_forward(project, static, x, norm, w, residual, layer):
    y = _fused(project, static, x, norm, w, residual, layer)
    return y, (x, norm, w, residual, layer)


def _fused_backward(project, static, saved, g):
    x, norm, w, residual, layer = saved
    _, back = jax.vjp(lambda x, norm: _composed(static, x, norm, w, None, layer), x, norm)
    dx, d_norm = back(g)
    return dx, d_norm, None, None if residual is None else g.astype(residual.dtype), None


_fused.defvjp(_fused_forward, _fused_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def packed_matmul(static, x: jax.Array, w: Packed, layer) -> jax.Array:
    """Quantizes x [..., K] and multiplies: f32 [..., N]. static: (inputs, backend).

    Differentiable in x, straight through the quantization of x: dx = dy W^T.
    """
    inputs, backend = static
    xq, x_scale = INPUTS[inputs](x)
    return ternary_matmul(
        xq, w, layer=layer, x_scale=x_scale, out_dtype=jnp.float32, backend=backend
    )


def _forward(static, x, w, layer):
    return packed_matmul(static, x, w, layer), (w, layer, jnp.zeros((), x.dtype))


def _backward(static, saved, g):
    w, layer, like = saved
    dx = ternary_matmul_transposed(g, w, layer=layer).astype(like.dtype)
    return dx, None, None


packed_matmul.defvjp(_forward, _backward)
