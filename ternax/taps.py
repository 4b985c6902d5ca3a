"""What each projection of a packed model multiplies, on real tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from ternax.models import Decoder
from ternax.nn.linear import PackedStack, enter, weight_of
from ternax.nn.rope import rope_table
from ternax.quant.inputs import INPUTS
from ternax.sharding import MATRICES, Layout, fetch, spread

_PROJECTIONS = (("attn", "qkv"), ("attn", "o"), ("mlp", "gate_up"), ("mlp", "down"))


class _Tap(nnx.Module):
    """A projection that notes what it reads."""

    def __init__(self, inner):
        self.inner = inner
        self.seen = nnx.data(None)

    def __call__(self, x, layer=None, *, gate=None, norm=None, residual=None):
        across = getattr(self.inner, "across", None)
        read = enter(x, gate, *weight_of(norm), across) if gate or norm else x
        self.seen = INPUTS[self.inner.inputs].fake_quant(read, across)
        return self.inner(x, layer, gate=gate, norm=norm, residual=residual)


def projection_inputs(model: Decoder, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of every projection in a full causal pass, quantized as the model does it.

    Args:
      model: packed.
      tokens: int32 [B, T].

    Returns:
      "layers.0.attn.q" -> f32 [B T, K]; parts that are fused share one array.
    """
    layout = model.layout
    graph, *states = nnx.split(model.layers, PackedStack, ...)
    whole, sliced = states
    x = _embedded(layout, *nnx.split(model), jnp.asarray(tokens))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    found = {}
    for layer in range(model.config.num_layers):
        leaves = jax.tree.map(lambda leaf, layer=layer: leaf[layer], sliced)
        place = (x, positions, jnp.int32(layer))
        x, seen = _tapped(layout, model.config, graph, whole, leaves, *place)
        for (branch, name), inputs in seen.items():
            flat = fetch(inputs).reshape(-1, inputs.shape[-1])
            for part, _ in getattr(getattr(model.layers, branch), name).parts:
                found[f"layers.{layer}.{branch}.{part}"] = flat
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embedded(layout: Layout | None, graph, leaves, tokens):
    def body(leaves, tokens):
        return nnx.merge(graph, leaves).embedding.embed(tokens)

    arguments = () if layout is None else (layout.specs(leaves), P())
    return spread(layout, body, arguments, P())(leaves, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _tapped(layout: Layout | None, config, graph, whole, leaves, x, positions, layer):
    """One layer: (its output, {("attn", "qkv"): inputs})."""

    def body(whole, leaves, x, positions, layer):
        block = nnx.merge(graph, whole, leaves)
        taps = {}
        for branch, name in _PROJECTIONS:
            module = getattr(block, branch)
            taps[branch, name] = _Tap(getattr(module, name))
            setattr(module, name, taps[branch, name])
        start = jnp.zeros((x.shape[0],), jnp.int32)
        x, _ = block(x, layer, rope_table(config, positions), start, None)
        return x, {place: tap.seen for place, tap in taps.items()}

    arguments: tuple[Any, ...] = ()
    results: Any = P()
    if layout is not None:
        arguments = (layout.specs(whole), layout.specs(leaves), P(), P(), P())
        inputs = {
            place: layout.partition([None, None, MATRICES[place[1]][0]]) for place in _PROJECTIONS
        }
        results = (P(), inputs)
    return spread(layout, body, arguments, results)(whole, leaves, x, positions, layer)
