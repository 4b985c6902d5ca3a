"""Whole matrices of a split model: what its devices hold, in the order of one device."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from ternax.models import Decoder
from ternax.nn.linear import PackedLinear
from ternax.nn.read_noise import NoisyLinear, check_storable
from ternax.nn.table import PackedTable
from ternax.random_weights import abstract_model
from ternax.row_order import Rows, rows_in
from ternax.sharding import SUMMED, Layout, fetch


def rows_of(layout: Layout, name: str, node: PackedLinear | PackedTable | NoisyLinear) -> Rows:
    """Of one device's `node`, called "qkv" or "head"."""
    if isinstance(node, PackedTable):
        return rows_in(layout, ((name, node.shape[1]),), split=node.across is not None)
    return rows_in(layout, node.parts, split=name not in SUMMED)


def columns_of(layout: Layout, name: str, columns: int) -> int:
    """K of the whole matrix, of one device's."""
    return columns * (layout.tensor if name in SUMMED else 1)


def put_rows(value: np.ndarray, rows: Rows, like: jax.Array, axis: int) -> jax.Array:
    """A whole matrix from the host as its devices hold it: split as `like`, rows along `axis`."""
    held = np.take(value, rows.source, axis=axis) if value.shape[axis] > 1 else value
    return jax.make_array_from_callback(held.shape, like.sharding, lambda index: held[index])


def whole_leaf(value: jax.Array, rows: Rows, axis: int) -> Any:
    """A variable of all devices as a numpy array on this host, its rows, along `axis`, those of
    one device."""
    held = fetch(value)
    return np.take(held, rows.order, axis=axis) if held.shape[axis] > 1 else held


def whole_model(model: Decoder) -> Decoder:
    """A model on a mesh as it would be on one device, its leaves numpy arrays on this host.

    All processes of a run have to ask together. A model that is on no mesh is returned.
    """
    layout = model.layout
    if layout is None:
        return model
    check_storable(model)
    head = model.embedding if model.config.tie_embeddings else model.head
    assert isinstance(model.embedding, PackedTable) and isinstance(head, PackedTable)
    whole = abstract_model(
        layout.config,
        embed_dtype=model.embedding.format,
        head_dtype=head.format,
        backend=model.layers.attn.backend,
    )
    nodes: dict[tuple, Any] = dict(nnx.iter_modules(model))
    places: dict[tuple, Any] = dict(nnx.iter_modules(whole))
    for path, place in places.items():
        node = nodes[path]
        if isinstance(node, PackedLinear | PackedTable):
            rows = rows_of(layout, str(path[-1]), node)
            place.data.set_value(whole_leaf(node.data.get_value(), rows, -2))
            place.scale.set_value(whole_leaf(node.scale.get_value(), rows, -1))
            zero = getattr(node, "zero", None)
            if zero is not None:
                place.zero.set_value(whole_leaf(zero.get_value(), rows, -1))
            elif isinstance(node, PackedLinear):
                place.zero = None
            place.format, place.backend = node.format, node.backend
        elif hasattr(node, "weight"):
            place.weight.set_value(fetch(node.weight.get_value()))
    return whole
