"""`QuantLinear` trains and studies, `PackedLinear` runs; `pack_model` turns one into the other."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.kernels.packing import Packed
from ternax.kernels.ternary_matmul import ternary_matmul, ternary_matmul_transposed
from ternax.quant import make_scheme
from ternax.quant.inputs import INPUTS


class PackedStack(nnx.Variable):
    """A leaf of a packed weight. In a stack of layers it stays whole: kernels take the
    stack and a layer index, since slicing a layer out would copy it."""


class QuantLinear(nnx.Module):
    """y = quantized(x) fake_quant(W): float latent weights under a scheme.

    Attributes:
      kernel: f32 [K, N].
      scheme: the Scheme instance of this weight.
      inputs: a key of `quant.inputs.INPUTS`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, scheme: str, inputs: str, rngs: nnx.Rngs
    ):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * in_features**-0.5)
        self.scheme = make_scheme(scheme, shape, rngs=rngs)
        self.inputs = inputs

    def __call__(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """x: [..., K] -> f32 [..., N]. `layer` is unused: the weight comes as one layer's."""
        del layer
        x = INPUTS[self.inputs].fake_quant(x.astype(jnp.float32))
        return x @ self.scheme.fake_quant(self.kernel[...])


class PackedLinear(nnx.Module):
    """y = x W from packed weights, one matrix or several fused along N.

    Attributes:
      data, scale, zero: the leaves of a `kernels.packing.Packed`.
      parts: (name, width) of each fused matrix; with several, a call returns a tuple.
      backend: a name in `kernels.backends.BACKENDS`, or None to choose by platform.
    """

    def __init__(self, packed: Packed, *, inputs: str, backend: str | None = None):
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
        self, x: jax.Array, layer: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, ...]:
        """x: [..., K] -> f32 [..., N], or one array a part. `layer`: int32 [] in a stack."""
        packed = self.packed
        if packed.data.ndim == 4 and layer is None:
            raise ValueError("a stacked PackedLinear needs the layer's index")
        y = packed_matmul(
            (self.inputs, self.backend), x, packed, layer if packed.data.ndim == 4 else None
        )
        if len(self.parts) == 1:
            return y
        ends = [sum(width for _, width in self.parts[: i + 1]) for i in range(len(self.parts) - 1)]
        return tuple(jnp.split(y, ends, axis=-1))


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
