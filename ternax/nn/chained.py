"""Decode steps of a stack of blocks as chains: two or three launches a layer on a GPU.

A layer is its attention and one `kernels.pallas.chain` from there to the next layer's q, k, v.
What chains cannot take runs block by block, as models write it; both give the same numbers but
for the order of sums in norms.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ternax.kernels import target
from ternax.kernels.backends import BACKENDS
from ternax.kernels.pallas import backend, tiles
from ternax.nn.attention import attend_cached
from ternax.nn.cache import KVCache
from ternax.nn.linear import PackedLinear
from ternax.nn.norm import RMSNorm

# Layers in one turn of the loop over layers: as many are one CUDA graph.
UNROLL = 16


def why_not(block, rows: int) -> str | None:
    """None where a step of `rows` rows runs as chains on the target device; else one line."""
    if reason := BACKENDS["mosaic"].why_not(target.current().platform, None, None):
        return reason
    from ternax.kernels.pallas import chain

    if block.attn.memory is not None:
        return "chains read the cache as it is"
    for linear in _linears(block):
        if type(linear) is not PackedLinear or linear.across is not None:
            return "chains take packed projections of one device, without noise at read time"
        packed = linear.packed
        plain = packed.zero is None and packed.groups * packed.num_planes == 1
        if packed.layout != tiles.LAYOUT or linear.inputs != "int8" or not plain:
            return "chains take trits in one plane, one scale along K, and int8 inputs"
        if linear.backend not in (None, "mosaic"):
            return f"the backend is {linear.backend}"
    if block.attn.qkv.shape[1] == block.attn.qkv.shape[0]:
        return "a chain's last product, where it is as wide as the stream, is added to it"
    reason = chain.why_not(list(_whole(block).values()), rows, target.current().core_count)
    return reason or backend.why_not_chain()


def run(
    block, x: jax.Array, rope, cache: KVCache, attend: Callable = attend_cached
) -> tuple[jax.Array, KVCache]:
    """All layers of a stacked Block, for one token a row.

    x: f32 [B, 1, D]; rope: see `step_attention` -> (f32 [B, 1, D], the cache).
    """
    from ternax.kernels.pallas import chain

    rows, _, columns = x.shape
    layers = block.attn_norm.weight.shape[0]
    padded = chain.padded_rows(rows)
    stream = jnp.pad(x.reshape(rows, columns), ((0, padded - rows), (0, 0)))
    names, links = list(_whole(block)), _whole(block)
    stacks = {name: _stack(*pair) for name, pair in _pairs(block).items()}
    config = backend.chain_heuristic([link.shape for link in links.values()], rows)

    def weights(name, layer):
        data, scale, norm = stacks[name]
        return chain.Weights(data, scale, norm, layer, layer)

    def start(stream):
        link = links["qkv"]._replace(enter="stream")
        return chain.run([link], [weights("qkv", jnp.int32(0))], stream, None, rows, config)

    def attention(qkv, cache, layer):
        qkv = qkv[:rows].reshape(rows, 1, -1)
        out, cache = attend(qkv, rope, cache, layer, block.attn.backend)
        return out.reshape(rows, -1), cache

    def turn(carry, layer):
        qkv, stream, cache = carry
        out, cache = attention(qkv, cache, layer)
        # The last layer's chain ends in a q, k and v that nobody reads, so that all are one kernel.
        following = jnp.minimum(layer + 1, layers - 1)
        read = [weights(name, following if name == "qkv" else layer) for name in names]
        qkv, stream = chain.run([links[name] for name in names], read, stream, out, rows, config)
        return (qkv, stream, cache), None

    each = jnp.arange(layers, dtype=jnp.int32)
    (_, stream, cache), _ = lax.scan(turn, (*start(stream), cache), each, unroll=UNROLL)
    return stream[:rows].reshape(x.shape), cache


def _pairs(block) -> dict[str, tuple[PackedLinear, RMSNorm | None]]:
    """The projections of a chain from one attention to the next, and the norms before them."""
    attn, mlp = block.attn, block.mlp
    return {
        "o": (attn.o, attn.sub_norm),
        "gate_up": (mlp.gate_up, block.mlp_norm),
        "down": (mlp.down, mlp.sub_norm),
        "qkv": (attn.qkv, block.attn_norm),
    }


def _linears(block) -> list:
    attn, mlp = block.attn, block.mlp
    pairs = (attn, "qkv"), (attn, "o"), (mlp, "gate_up"), (mlp, "down")
    return [getattr(module, name, None) for module, name in pairs]


def _whole(block) -> dict:
    """The links of a layer's chain by name."""
    from ternax.kernels.pallas.chain import Link

    enters = {"o": "input", "gate_up": "residual", "down": block.mlp.activation, "qkv": "residual"}
    return {
        name: Link(linear.shape, enters[name], norm is not None, norm.eps if norm else 0.0)
        for name, (linear, norm) in _pairs(block).items()
    }


class _Stack(NamedTuple):
    data: jax.Array
    scale: jax.Array
    norm: jax.Array | None


def _stack(linear: PackedLinear, norm: RMSNorm | None) -> _Stack:
    packed = linear.packed
    scale = packed.scale.reshape(packed.scale.shape[0], -1)
    scale = jnp.broadcast_to(scale, (scale.shape[0], packed.shape[1]))
    return _Stack(packed.data, scale, None if norm is None else norm.weight.get_value())
