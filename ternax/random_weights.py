"""Packed models with random weights, made in place: never as floats, never copied.

Codes come from a counter hash of (key, row, word), so every layout, order and mesh
holds the same model, at several GB/s; threefry would need minutes for 70b.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from ternax.config import ModelConfig, first_layers
from ternax.counter_hash import lane_draw, mix
from ternax.edit import as_part, pack_model
from ternax.errors import UsageError
from ternax.kernels.memory import zeros
from ternax.kernels.packing import (
    BLOCK,
    FLOAT_FORMATS,
    float_to_bits,
    pack_numpy,
    real_bits,
)
from ternax.models import MODELS, Decoder
from ternax.models.decoder import table_std
from ternax.nn.linear import PackedLinear
from ternax.nn.norm import RMSNorm
from ternax.nn.table import PackedTable
from ternax.sharding import SUMMED, Layout, leaf_name, spread

# P(trit != 0): a | (b & (c | d)) of four fair bits. Absmean of a Gaussian gives 0.691.
TRIT_DENSITY = 11 / 16

# Root mean square of one random code: uniform over -127 .. 127, over -7 .. 7, trits, and
# (1 by construction) the float formats.
_CODE_RMS = {
    "trit2": math.sqrt(TRIT_DENSITY),
    "int4": math.sqrt(sum(v * v for v in range(-7, 8)) / 15),
    "int8": math.sqrt(sum(v * v for v in range(-127, 128)) / 255),
    "bf16": 1.0,
    "f32": 1.0,
}
# Bytes of codes made at a time, so that temporaries stay in cache.
_CHUNK_BYTES = 1 << 22
_EVEN = 0x55555555


def abstract_model(config: ModelConfig, *, packed: bool = True, **packing) -> Decoder:
    """The model as shapes and dtypes, without memory. packing: as for `pack_model`."""

    def build():
        model = MODELS[config.family](config, rngs=nnx.Rngs(0))
        return pack_model(model, **packing) if packed else model

    return nnx.eval_shape(build)


def abstract_part(layout: Layout, **packing) -> tuple[Decoder, dict[str, PartitionSpec]]:
    """One device's part of a packed model, abstract, and how each variable is split, by name.

    Raises:
      UsageError: a scheme whose groups of scales a split would cut.
    """
    whole = abstract_model(layout.config, **packing)
    try:
        part = abstract_model(layout.local_config, **packing)
    except UsageError as error:
        raise UsageError(f"mesh {layout}: {error}") from error
    # By the whole's shapes: of a part one cannot tell one group from a split in groups.
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(whole))[0]
    specs = {leaf_name(path): layout.spec(leaf_name(path), leaf.shape) for path, leaf in leaves}
    return as_part(part, whole, layout), specs


def random_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    layout: Layout | None = None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
    **packing,
) -> Decoder:
    """A packed model of random codes; peak memory is the model plus one chunk.

    Args:
      seed: of the root key. Codes of a projection depend on it, the projection's
        per-layer name and the position in the matrix alone.
      layout: makes each device's part on that device; the same model as without.
      progress: called as (name, bytes) when a leaf is done.
      packing: as for `pack_model`.

    Scales keep the root mean square of activations: 1 / sqrt(K) over the codes' own.
    """
    root = jax.random.key(seed)
    if layout is None:
        place: Place = Place()
        model = abstract_model(config, **packing)
    else:
        model, specs = abstract_part(layout, **packing)
        place = SplitPlace(layout, specs)
    _fill_layers(model, root, place, progress)
    for name in ("embedding",) if config.tie_embeddings else ("embedding", "head"):
        table = getattr(model, name)
        _fill(table, root, [name], place, name, gain=table_std(config, name))
        progress(name, table.packed.nbytes)
    return model


def random_layer(config: ModelConfig, layer: int, *, seed: int = 0, **packing) -> Decoder:
    """One layer of `random_model(config)`, as a model of one layer, whose tables have no memory.

    A model that memory has no room for is gone through layer by layer.
    """
    model = abstract_model(first_layers(config, 1), **packing)
    model.first_layer = layer
    _fill_layers(model, jax.random.key(seed), Place())
    return model


def random_table(config: ModelConfig, name: str, *, seed: int = 0, **packing) -> PackedTable:
    """The table of `random_model(config)` called "embedding" or "head", alone."""
    table = getattr(abstract_model(first_layers(config, 1), **packing), name)
    _fill(table, jax.random.key(seed), [name], Place(), name, gain=table_std(config, name))
    return table


def _fill_layers(model: Decoder, root, place: "Place", progress=lambda name, nbytes: None) -> None:
    """Gives norms and projections of an abstract packed model their leaves."""
    for path, node in nnx.iter_modules(model):
        if isinstance(node, RMSNorm):
            name = ".".join(map(str, (*path, "weight")))
            node.weight.set_value(place.full(name, node.weight.shape, 1.0))
    for prefix, linear in (("attn", "qkv"), ("attn", "o"), ("mlp", "gate_up"), ("mlp", "down")):
        node = getattr(getattr(model.layers, prefix), linear)
        names = [f"layers.*.{prefix}.{part}" for part, _ in node.parts]
        gain = place.columns(linear, node.shape[0]) ** -0.5
        layers = range(model.first_layer, model.first_layer + model.config.num_layers)
        where = f"layers.{prefix}.{linear}"
        _fill(node, root, names, place, where, gain=gain, layers=layers)
        progress(f"{prefix}.{linear}", node.packed.nbytes)


class Place:
    """Where a model's variables are made: whole, on the default device."""

    def full(self, name: str, shape, value: float) -> jax.Array:
        return jnp.full(shape, value, jnp.float32)

    def columns(self, matrix: str, columns: int) -> int:
        """K of the whole matrix, of the K here."""
        return columns

    def data(self, name: str, keys, static: "Static") -> jax.Array:
        return _random_data(keys, static)


class SplitPlace(Place):
    """Each device's part on that device, drawn there."""

    def __init__(self, layout: Layout, specs: dict[str, PartitionSpec]):
        self._layout, self._specs = layout, specs

    def full(self, name: str, shape, value: float) -> jax.Array:
        spec = self._specs[name]
        return self._layout.full(self._layout.whole(shape, spec), value, jnp.float32, spec)

    def columns(self, matrix: str, columns: int) -> int:
        return columns * (self._layout.tensor if matrix in SUMMED else 1)

    def data(self, name: str, keys, static: "Static") -> jax.Array:
        return _split_data(self._layout, self._specs[name], static, keys)


def tensor_key(root: jax.Array, name: str) -> jax.Array:
    """The key of a tensor: "layers.*.mlp.up", whose layers fold in their index, or "head"."""
    return jax.random.fold_in(root, zlib.crc32(name.encode()))


def _fill(
    node: PackedLinear | PackedTable,
    root,
    names,
    place: Place,
    where: str,
    *,
    gain: float,
    layers: range | None = None,
):
    """Gives an abstract packed module, called `where`, its random leaves."""
    packed = node.packed
    keys = jnp.stack(
        [_plane_keys(tensor_key(root, name), packed.num_planes, layers) for name in names]
    )
    static = Static(
        shape=packed.data.shape if layers else (1, *packed.data.shape),
        k_size=packed.shape[0],
        parts=tuple(
            (name.rpartition(".")[2], width)
            for name, (_, width) in zip(names, packed.parts, strict=True)
        ),
        format=packed.format,
        gain=gain,
        squeeze=not layers,
    )
    node.data.set_value(place.data(f"{where}.data", keys, static).block_until_ready())
    scale = gain / (_CODE_RMS[packed.format] * math.sqrt(packed.num_planes))
    if packed.format in FLOAT_FORMATS:
        scale = 1.0  # the gain is in the values
    node.scale.set_value(place.full(f"{where}.scale", packed.scale.shape, scale))
    if isinstance(node, PackedLinear) and node.zero is not None:
        node.zero.set_value(place.full(f"{where}.zero", packed.scale.shape, 0.0))


def _plane_keys(key, planes: int, layers: range | None):
    """uint32 [L, P, 2]: one pair of words for each plane of each layer."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    per_layer = fold(key, jnp.asarray(layers)) if layers else key[None]
    per_plane = jax.vmap(lambda k: fold(k, jnp.arange(planes)))(per_layer)
    return jax.random.key_data(per_plane)


class Static(NamedTuple):
    """What the data of one variable is.

    Attributes:
      shape: [L, P, N, row].
      k_size: codes of a row, without padding.
      parts: (matrix, width) of each along N.
      format, gain: of a `Packed`; the root mean square of its values.
      squeeze: L is 1 and left out of the result.
    """

    shape: tuple[int, ...]
    k_size: int
    parts: tuple[tuple[str, int], ...]
    format: str
    gain: float
    squeeze: bool


@functools.partial(jax.jit, static_argnums=1)
def _random_data(keys, static: Static):
    """keys: uint32 [parts, L, P, 2] -> data, each part from its own keys."""
    return _draw(keys, static, [0] * len(static.parts), 0, static.shape[-1])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _split_data(layout: Layout, spec: PartitionSpec, static: Static, keys):
    """The same with each device's part on it; static is of a part."""
    summed = static.parts[0][0] in SUMMED
    row = static.shape[-1]

    def body(keys):
        device = lax.axis_index("tensor")
        rows = [layout.first_row(part, width, device) for part, width in static.parts]
        first = device * row if summed else 0
        return _draw(keys, static, rows, first, row * (layout.tensor if summed else 1))

    return spread(layout, body, PartitionSpec(), spec)(keys)


def _draw(keys, static: Static, first_rows, first_column, whole_row: int):
    """Data `static.shape`, each part from its row of the whole matrix on, from this entry of its
    rows on, which have `whole_row` entries."""
    shape, format, squeeze = static.shape, static.format, static.squeeze
    layers, planes, _, row = shape
    # In the shape it is returned in: XLA would copy a squeezed result, a whole head.
    data = zeros(shape[squeeze:], FLOAT_FORMATS.get(format, jnp.uint8))
    first = 0
    for part, (_, width) in enumerate(static.parts):
        rows = max(1, min(width, _CHUNK_BYTES // row))
        chunks = -(-width // rows)
        steps = layers * planes * chunks

        def start(i, width=width, rows=rows, chunks=chunks):
            # The last chunk is moved up to end with the part; what it covers twice is equal.
            return jnp.minimum(i % chunks * rows, width - rows)

        def draw(i, part=part, rows=rows, chunks=chunks, start=start):
            words = keys[part, i // (planes * chunks), i // chunks % planes]
            place = (first_rows[part] + start(i), first_column, whole_row)
            block = _random_rows(words, place, rows, row, format, static.gain)
            return _clear_padding(block, static.k_size, format)

        def store(data, block, i, first=first, rows=rows, chunks=chunks, start=start):
            if format not in FLOAT_FORMATS:
                block = lax.bitcast_convert_type(block, jnp.uint8).reshape(rows, row)
            at = (i // (planes * chunks), i // chunks % planes, first + start(i), 0)
            block = lax.expand_dims(block, range(data.ndim - 2))
            return lax.dynamic_update_slice(data, block, at[squeeze:])

        def body(i, carry, draw=draw, store=store):
            data, block = carry
            return store(data, block, i - 1), draw(i)

        # Storing one chunk behind keeps the drawing out of the store's fusion: alone, it
        # vectorizes and uses every core (2 GB/s against 1 on 2 cores).
        data, block = lax.fori_loop(1, steps, body, (data, draw(0)))
        data = store(data, block, steps - 1)
        first += width
    return data


def _random_rows(key, place, rows: int, row: int, format: str, gain: float):
    """`rows` rows of `row` entries of one matrix: uint32 words [rows, row bytes / 4] of codes,
    or the stored floats [rows, row].

    place: (first row, first entry of each row, entries of a whole row).
    """
    entries = 1 if format in FLOAT_FORMATS else 4  # of a word
    start, column, whole_row = place
    index = (start + jnp.arange(rows, dtype=jnp.uint32))[:, None].astype(jnp.uint32)
    index *= whole_row // entries
    index += jnp.uint32(column // entries) + jnp.arange(row // entries, dtype=jnp.uint32)
    base = mix(index + key[0])

    def draw(i):
        return lane_draw(base, key[1], i)

    if format in FLOAT_FORMATS:
        uniform = draw(0).astype(jnp.float32) * (2 / 2**32) - 1
        return float_to_bits(uniform * (gain * math.sqrt(3)), format)
    if format == "trit2":
        return _trit_word(draw(0), draw(1), draw(2))
    return _integer_word(draw(0), draw(1), 8 if format == "int8" else 4)


def _clear_padding(block, k_size: int, format: str):
    """Puts the code of 0 behind the K codes of each row: uint32 words [rows, row bytes / 4]."""
    if format in FLOAT_FORMATS or k_size % BLOCK == 0:
        return block
    real = real_bits(k_size, format)
    zeros = pack_numpy(np.zeros((k_size, 1), np.int8), format)[0]
    real, zeros = real.view(np.uint32), zeros.view(np.uint32)
    return (block & real) | (zeros & ~real)


def _trit_word(u, v, w):
    """16 codes from three words: non-zero with TRIT_DENSITY, signs fair, never code 3."""
    even = jnp.uint32(_EVEN)
    nonzero = (u & even) | ((u >> 1) & even & ((v | (v >> 1)) & even))
    positive = nonzero & w
    return (positive << 1) | (even & ~nonzero)


def _integer_word(u, v, bits: int):
    """4 or 8 codes a word, uniform but for the unused lowest code, which is drawn again, then 1."""
    lanes, ones = 32 // bits, 2**bits - 1

    def fixed(lane):
        first, second = (u >> (lane * bits)) & ones, (v >> (lane * bits)) & ones
        code = jnp.where(first == 0, jnp.maximum(second, 1), first)
        return code << (lane * bits)

    return functools.reduce(jnp.bitwise_or, [fixed(lane) for lane in range(lanes)])
