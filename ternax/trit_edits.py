"""Trits of a packed model by name: read, written, moved about. Controls of noise studies need it.

Each returns another model, and leaves the ones given as they are.
"""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax import targets
from ternax.errors import UsageError
from ternax.kernels.packing import float_to_bits, pack, unpack
from ternax.models import Decoder

# Compiled whole: operation by operation, each shape takes a dozen programs.
pack_codes = jax.jit(pack, static_argnums=1)
unpack_codes = jax.jit(unpack, static_argnums=(1, 2))


def trits(model: Decoder, select: str = targets.EVERYTHING) -> dict[str, np.ndarray]:
    """ "layers.0.attn.q" -> int8 [K, N], of the selected projections in one plane of trits."""
    found = {}
    for target in targets.selected(model, select):
        if target.node.format != "trit2" or target.node.packed.num_planes > 1:
            continue
        data = target.stored()
        for layer, name in zip(target.layers, target.names(), strict=True):
            rows = data[layer, 0, target.first : target.first + target.width]
            found[name] = np.asarray(unpack_codes(rows, "trit2", target.columns))
    return found


def relocated(clean: Decoder, noisy: Decoder, key: jax.Array) -> Decoder:
    """The noisy model's changes at other places: as many trits of each value become each other one.

    Raises:
      UsageError: a noise that left the trits' grid, or made what is no trit.
    """
    before, after = trits(clean), trits(noisy)
    if before.keys() != after.keys() or any((w > 1).any() for w in after.values()):
        raise UsageError(
            "changes can be moved where trits stay trits, found a noise that left them"
        )
    moved = {}
    for name, old in before.items():
        new, random = after[name].copy(), _random(key, name)
        for value in (-1, 0, 1):
            where = old == value
            new[where] = random.permutation(after[name][where])
        moved[name] = new
    return _with(noisy, lambda name: moved[name])


def shuffled(model: Decoder, key: jax.Array, select: str = targets.EVERYTHING) -> Decoder:
    """Every selected matrix with its own trits in random order."""
    found = {
        name: _random(key, name).permuted(w, axis=None) for name, w in trits(model, select).items()
    }
    return _with(model, found.get)


def protected(clean: Decoder, noisy: Decoder, rows: dict[str, np.ndarray]) -> Decoder:
    """The noisy model with some outputs' weights as they were. rows: name -> bool [N]."""
    model = _apart(noisy)
    mine = {target.name: target for target in targets.targets(model)}
    for target in targets.selected(clean, targets.EVERYTHING):
        node, now = target.node, mine[target.name].node
        for layer, name in zip(target.layers, target.names(), strict=True):
            kept = target.first + np.flatnonzero(rows.get(name, np.zeros(0, bool)))
            if not kept.size:
                continue
            data = node.packed.data[layer, :, kept]
            if now.format != node.format:
                data = _floats(node, layer, data, kept)
            now.data.set_value(now.data.get_value().at[layer, :, kept].set(data))
    return model


def _floats(node, layer: int, data, rows: np.ndarray):
    """Stored f32 [rows, planes, K] of packed rows of a matrix with one scale an output."""
    scale = node.packed.scale[layer, 0, 0]
    scale = scale[rows] if scale.shape[0] > 1 else jnp.broadcast_to(scale, rows.shape)
    codes = unpack_codes(data[:, 0], node.format, node.shape[0]).T.astype(jnp.float32)
    return float_to_bits((codes * scale[:, None])[:, None], "f32")


def _with(model: Decoder, codes_of: Callable[[str], np.ndarray | None]) -> Decoder:
    """A copy whose matrices hold `codes_of(name)`, int8 [K, N]; None leaves one as it is."""
    model = _apart(model)
    for target in targets.targets(model):
        data = None
        for layer, name in zip(target.layers, target.names(), strict=True):
            codes = codes_of(name) if "*" in target.name else None
            if codes is not None:
                data = np.array(target.node.packed.data) if data is None else data
                rows = slice(target.first, target.first + target.width)
                data[layer, 0, rows] = np.asarray(pack_codes(codes, "trit2"))
        if data is not None:
            target.node.data.set_value(jnp.asarray(data))
    return model


def _apart(model: Decoder) -> Decoder:
    """A copy, since a GPU's kernels reorder bytes in place. UsageError where devices share them."""
    if model.layout is not None and model.layout.across:
        raise UsageError(
            f"trits are moved in whole matrices, found a model split over {model.layout}: load it "
            "without a mesh, or over data"
        )
    graph, leaves = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(jnp.copy, leaves))


def _random(key: jax.Array, name: str) -> np.random.Generator:
    words = [int(word) for word in jax.random.key_data(key).reshape(-1)]
    return np.random.default_rng([*words, zlib.crc32(name.encode())])
