"""`perturb`: noise on chosen weights of a model, by name, in place, without unpacking them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax.counter_hash import below
from ternax.errors import DoesNotFit, UsageError
from ternax.gather import put_rows, whole_leaf
from ternax.kernels.packing import FORMATS, Packed, float_to_bits, unpack
from ternax.measure import memory_available_bytes
from ternax.models import Decoder
from ternax.nn.read_noise import NoisyCache, NoisyLinear
from ternax.noise.model import NoiseModel, apply
from ternax.noise.reads import ReadNoise
from ternax.noise.words import (
    ROWS,
    Matrix,
    draws,
    key_words,
)
from ternax.random_weights import tensor_key
from ternax.striking import strike, strike_split
from ternax.table import binary
from ternax.targets import EVERYTHING, Target, check_domain, selected, there


def perturb(
    model: Decoder,
    noise: NoiseModel,
    key: jax.Array,
    *,
    select: str = EVERYTHING,
    layers: range | None = None,
    rows: float = 1.0,
    copy: bool = False,
) -> tuple[Decoder, dict[str, int]]:
    """The model under a noise, and how many values changed in each selected matrix.

    A matrix is struck with the key fold_in(fold_in(key, crc32("layers.*.mlp.up")), layer), so the
    outcome depends on no order, batch, mesh or selection. At strength 0 nothing is touched.

    Args:
      model: packed. Its packed leaves are donated: it is the model returned, and what was
        clean is gone.
      noise: of NOISES or your own. On trits and packed bits, chunks are struck in place, with no
        second copy. On scales and norms, the few floats are replaced. On analog weights,
        the stacks that hold a selected matrix become f32, 16 times the bytes of trits. At read
        time, the projections are wrapped; every row is read, and nothing is counted.
      key: of `jax.random.key`.
      select: a regular expression that has to match a whole name, "layers.3.mlp.up"; on trits and
        packed bits also "embedding" and "head". On norms their own names, "layers.3.mlp_norm",
        "layers.3.attn.sub_norm" and "norm".
      layers: of the layers that match, only these.
      rows: share of the outputs of each matrix that can be struck, drawn by the key.
      copy: leaves the model given as it was, and returns another.

    Raises:
      UsageError: a model that is not packed, a pattern that selects nothing, a noise on what
        the model does not have.
      DoesNotFit: f32 weights larger than the memory that is free.
    """
    if isinstance(rows, bool) or not 0 <= rows <= 1:
        raise UsageError(f"perturb: rows must lie in [0, 1], found {rows!r}")
    if noise.parts() != (noise,):
        return _strike_parts(_copied(model) if copy else model, noise, key, select, layers, rows)
    chosen = selected(model, select, layers, noise.domain)
    check_domain(noise, chosen, rows)
    if copy:
        model = _copied(model)
        chosen = selected(model, select, layers, noise.domain)
    counts = {name: 0 for target in chosen for name in target.names()}
    if noise.strength == 0 or rows == 0:
        return model, counts
    if noise.domain == "cache":
        _wrap_cache(model, noise, key, chosen)
        return model, counts
    if isinstance(noise, ReadNoise):
        _wrap(model, noise, key, chosen)
        return model, counts
    if noise.domain == "weights":
        for node in {id(target.node): target.node for target in chosen}.values():
            mine = [target for target in chosen if target.node is node]
            counts |= _strike_weights(mine, noise, key, rows)
        return model, counts
    strikes = {"scale": _strike_scales, "norms": _strike_norms}
    strike = strikes.get(noise.domain, _strike_words)
    for target in chosen:
        counts |= dict(zip(target.names(), strike(target, noise, key, rows), strict=True))
    return model, counts


def _copied(model: Decoder) -> Decoder:
    graph, leaves = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(jnp.copy, leaves))


def _strike_parts(model, noise: NoiseModel, key, select, layers, rows):
    """Each of its parts, with a key of its own, on what there is of it."""
    counts: dict[str, int] = {}
    found_parts = [(part, there(model, part, select, layers)) for part in noise.parts()]
    for part, chosen in found_parts:  # before the first is struck
        if chosen:
            check_domain(part, chosen, rows)
            _check_cache(model, part)
    for number, (part, chosen) in enumerate(found_parts):
        if not chosen:
            continue
        names = "|".join(re.escape(name) for target in chosen for name in target.names())
        model, found = perturb(
            model, part, jax.random.fold_in(key, number), select=names, rows=rows
        )
        for name, count in found.items():
            counts[name] = counts.get(name, 0) + count
    if not counts:
        selected(model, select, layers)  # says what there is
    return model, counts


def _layer_keys(key, target: Target) -> jax.Array:
    """Keys [S] of the selected layers; a table has one."""
    named = tensor_key(key, target.name)
    if "*" not in target.name:
        return named[None]
    return jax.vmap(jax.random.fold_in, (None, 0))(named, jnp.asarray(target.numbers()))


# --- Trits and packed bits -------------------------------------------------------------------


def _strike_words(target: Target, noise, key, rows: float) -> list[int]:
    node = target.node
    keys = jax.vmap(key_words)(_layer_keys(key, target))
    data = node.data.get_value()
    stack = data.ndim == 4
    data = data if stack else data[None]
    settings = (
        keys,
        jnp.asarray(target.layers, jnp.int32),
        jnp.float32(noise.strength),
        jnp.float32(rows),
        jnp.int32(target.first),
    )
    static = dict(
        noise=noise.with_strength(0.0),
        matrix=Matrix(node.format, target.columns),
        width=target.width,
    )
    if target.rows is None:
        data, counts = strike(data, *settings, **static)
    else:
        placed = target.rows.order, target.rows.source
        data, counts = strike_split(data, *settings, *placed, sharding=data.sharding, **static)
    node.data.set_value(data if stack else data[0])
    if getattr(noise, "policy", "") == "raw" and node.format == "trit2":
        node.backend = "reference"  # the one that reads code 3
    return [int(count) for count in counts]


# --- Scales and analog weights -----------------------------------------------------------------


def _strike_scales(target: Target, noise, key, rows: float) -> list[int]:
    node, counts = target.node, []
    held = node.scale.get_value()
    stack = held.ndim == 4
    scales = np.array(held if target.rows is None else whole_leaf(held, target.rows, -1))
    scales = scales if stack else scales[None]
    part = slice(target.first, target.first + target.width)
    for layer, own in zip(target.layers, _layer_keys(key, target), strict=True):
        mine = scales[layer][..., part] if scales.shape[-1] > 1 else scales[layer]
        # What is spread over rows where matrices are fused is stored once.
        spread = bool((mine == mine[..., :1]).all())
        value = jnp.asarray(mine[..., :1] if spread else mine)
        noisy, count = noise(own, value)
        if rows < 1:
            number = jnp.arange(value.shape[-1], dtype=jnp.uint32)
            exposed = below(draws(key_words(own), number, 0, ROWS), rows)
            noisy = jnp.where(exposed, noisy, value)
            count = jnp.sum(noisy != value)
        mine[...] = np.asarray(noisy)
        counts.append(int(count))
    scales = scales if stack else scales[0]
    split = target.rows
    value = jnp.asarray(scales) if split is None else put_rows(scales, split, held, -1)
    node.scale.set_value(value)
    return counts


def _strike_norms(target: Target, noise, key, rows: float) -> list[int]:
    del rows  # all of them, as `check_domain` has it
    weight, counts = np.array(target.node.weight.get_value()), []
    stack = weight if weight.ndim == 2 else weight[None]
    for layer, own in zip(target.layers, _layer_keys(key, target), strict=True):
        noisy, count = noise(own, jnp.asarray(stack[layer]))
        stack[layer] = np.asarray(noisy)
        counts.append(int(count))
    target.node.weight.set_value(jnp.asarray(weight))
    return counts


def _strike_weights(chosen: list[Target], noise, key, rows: float) -> dict[str, int]:
    """Turns the projection of `chosen`, targets of one node, into f32 weights under noise."""
    linear, counts = chosen[0].node, {}
    packed, rows_there = _whole(chosen[0]), chosen[0].rows
    layers, (k_size, n) = packed.data.shape[0], packed.shape
    need, free = 4 * layers * k_size * n, memory_available_bytes()
    if free is not None and need > free:
        raise DoesNotFit(
            f"analog noise: {chosen[0].name} and what is fused with it become f32, "
            f"{binary(need)}; available {binary(free)}; select fewer, or take fewer layers"
        )
    floats = np.empty((layers, 1, n, k_size), np.float32)
    for layer in range(layers):
        if rows_there is None:
            units, gain, shift = _units(packed, jnp.int32(layer))
        else:
            one = jax.tree.map(lambda leaf, at=layer: leaf[at : at + 1], packed)
            units, gain, shift = _units(one, jnp.int32(0))
        for target in chosen:
            if layer not in target.layers:
                continue
            part = slice(target.first, target.first + target.width)
            number = target.first_layer + layer
            own = jax.random.fold_in(tensor_key(key, target.name), number)
            noisy, count = apply(noise.with_strength(0.0), own, units[..., part], noise.strength)
            if rows < 1:
                row = jnp.arange(target.width, dtype=jnp.uint32)
                exposed = below(draws(key_words(own), row, 0, ROWS), rows)
                noisy = jnp.where(exposed, noisy, units[..., part])
                count = jnp.sum(noisy != units[..., part])
            units = units.at[..., part].set(noisy)
            counts[target.name.replace("*", str(number))] = int(count)
        floats[layer, 0] = np.asarray((units * gain + shift).sum(axis=0).T)
    data = linear.data.get_value()
    if rows_there is None:
        linear.data.set_value(float_to_bits(jnp.asarray(floats), "f32"))
    else:
        linear.data.set_value(put_rows(floats, rows_there, data, -2))
    linear.scale.set_value(jnp.ones((layers, 1, 1, 1), jnp.float32))
    linear.zero, linear.format = None, "f32"
    return counts


def _whole(target: Target) -> Packed:
    """The node of a target; on this host where it is split over devices."""
    packed, rows = target.node.packed, target.rows
    if rows is None:
        return packed
    return Packed(
        target.stored(),
        whole_leaf(packed.scale, rows, -1),
        None if packed.zero is None else whole_leaf(packed.zero, rows, -1),
        packed.format,
        packed.layout,
        (target.columns, len(rows.order)),
        rows.parts,
    )


@jax.jit
def _units(packed: Packed, layer):
    """(weights f32 [P, K, N] in units of the largest code, and what they are times and plus)."""
    fmt, (k_size, n) = FORMATS[packed.format], packed.shape
    units = unpack(packed.data[layer], packed.format, k_size).astype(jnp.float32) / fmt.high

    def spread(leaf):
        wide = jnp.repeat(leaf[layer], k_size // packed.groups, axis=1)
        return jnp.broadcast_to(wide, (*wide.shape[:2], n))

    gain = spread(packed.scale)
    shift = jnp.zeros_like(gain) if packed.zero is None else spread(packed.zero) * gain
    return units, gain * fmt.high, shift


# --- The cache ---------------------------------------------------------------------------------


def _check_cache(model: Decoder, noise: NoiseModel) -> None:
    if noise.domain == "cache" and model.layers.attn.memory is not None:
        raise UsageError("perturb: the cache is under a noise already")


def _wrap_cache(model: Decoder, noise, key, chosen: list[Target]) -> None:
    """What attention stores is read through the noise, in the layers chosen."""
    _check_cache(model, noise)
    attn, count = model.layers.attn, model.config.num_layers
    words, strength = np.zeros((count, 2), np.uint32), np.zeros(count, np.float32)
    for target in chosen:
        strength[list(target.layers)] = noise.strength
        words[list(target.layers)] = jax.vmap(key_words)(_layer_keys(key, target))
    attn.memory = nnx.data(NoisyCache(noise, jnp.asarray(words), jnp.asarray(strength)))


# --- Reads -----------------------------------------------------------------------------------


def _wrap(model: Decoder, noise: ReadNoise, key, chosen: list[Target]) -> None:
    """Puts a NoisyLinear round each projection that is selected."""
    for branch, linears in (("attn", ("qkv", "o")), ("mlp", ("gate_up", "down"))):
        for name in linears:
            module = getattr(model.layers, branch)
            linear = getattr(module, name)
            mine = [target for target in chosen if target.node is linear]
            if not mine:
                continue
            if isinstance(linear, NoisyLinear):
                raise UsageError(f"perturb: {mine[0].name} is under a noise at read time already")
            count = model.config.num_layers
            strength = np.zeros(count, np.float32)
            strength[list(mine[0].layers)] = noise.strength
            named = tensor_key(key, f"layers.*.{branch}.{name}")
            numbers = model.first_layer + jnp.arange(count)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(named, numbers)
            words = jax.vmap(key_words)(keys)
            split = model.layout if mine[0].rows is not None else None
            noisy = NoisyLinear(linear, noise, words, jnp.asarray(strength), split)
            setattr(module, name, noisy)
