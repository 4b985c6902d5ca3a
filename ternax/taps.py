"""What each projection of a packed model multiplies, on real tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax.models import Decoder
from ternax.nn.linear import PackedStack, enter, weight_of
from ternax.nn.rope import rope_table
from ternax.quant.inputs import INPUTS


class _Tap(nnx.Module):
    """A projection that notes what it reads."""

    def __init__(self, inner):
        self.inner = inner
        self.seen = nnx.data(None)

    def __call__(self, x, layer=None, *, gate=None, norm=None, residual=None):
        read = enter(x, gate, *weight_of(norm)) if gate or norm else x
        self.seen = INPUTS[self.inner.inputs].fake_quant(read)
        return self.inner(x, layer, gate=gate, norm=norm, residual=residual)


def projection_inputs(model: Decoder, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of every projection in a full causal pass, quantized as the model does it.

    Args:
      model: packed.
      tokens: int32 [B, T].

    Returns:
      "layers.0.attn.q" -> f32 [B T, K]; parts that are fused share one array.
    """
    graph, *states = nnx.split(model.layers, PackedStack, ...)
    whole, sliced = states
    x = _embedded(*nnx.split(model.embedding), jnp.asarray(tokens))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    found = {}
    for layer in range(model.config.num_layers):
        leaves = jax.tree.map(lambda leaf, layer=layer: leaf[layer], sliced)
        x, seen = _block(model.config, graph, whole, leaves, x, positions, jnp.int32(layer))
        for name, (inputs, parts) in seen.items():
            flat = np.asarray(inputs).reshape(-1, inputs.shape[-1])
            for part in parts:
                found[f"layers.{layer}.{name.partition('.')[0]}.{part}"] = flat
    return found


@functools.partial(jax.jit, static_argnums=0)
def _embedded(graph, leaves, tokens):
    return nnx.merge(graph, leaves).embed(tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tapped(config, graph, whole, leaves, x, positions, layer):
    block = nnx.merge(graph, whole, leaves)
    taps = {}
    for branch, names in (("attn", ("qkv", "o")), ("mlp", ("gate_up", "down"))):
        module = getattr(block, branch)
        for name in names:
            taps[f"{branch}.{name}"] = _Tap(getattr(module, name))
            setattr(module, name, taps[f"{branch}.{name}"])
    start = jnp.zeros((x.shape[0],), jnp.int32)
    x, _ = block(x, layer, rope_table(config, positions), start, None)
    return x, {name: tap.seen for name, tap in taps.items()}


def _block(config, graph, whole, leaves, x, positions, layer):
    """One layer: (its output, {"attn.qkv": (inputs, names of parts)})."""
    x, seen = _tapped(config, graph, whole, leaves, x, positions, layer)
    block = nnx.merge(graph, whole, leaves)
    found = {}
    for name, inputs in seen.items():
        branch, _, node = name.partition(".")
        linear = getattr(getattr(block, branch), node)
        found[name] = inputs, [part for part, _ in linear.parts]
    return x, found
