"""The leaves of a model as they are stored: a layer and a matrix each, under its own name.

In memory a variable holds all layers, and in a packed model also what is fused along N.
On disk `layers.*.attn.qkv.data` [L, P, N, row] becomes "layers.3.attn.k.codes"
[P, N of k, row], so that nobody who reads a file meets the stack or the fusion.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ternax.models import Decoder
from ternax.nn.linear import PackedLinear
from ternax.nn.table import PackedTable


class Leaf(NamedTuple):
    """One stored leaf and its place in a variable.

    Attributes:
      name: "layers.3.attn.k.codes".
      path: of the variable in the model's state.
      layer: index along the variable's first axis; None outside the stack.
      start: where it begins in what is left of the variable.
      shape, dtype: of the leaf.
      format: of codes, a key of `kernels.packing.FORMATS` or FLOAT_FORMATS; None of others.
    """

    name: str
    path: tuple[Any, ...]
    layer: int | None
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    format: str | None

    def of(self, variable: np.ndarray) -> np.ndarray:
        """This leaf of a whole variable: a view."""
        rest = variable if self.layer is None else variable[self.layer]
        return rest[tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))]

    def stretch(self, axis: int, first: int, count: int) -> "Leaf":
        """`count` entries of this leaf along `axis`; all of it where one stands for all."""
        if self.shape[axis] == 1:
            return self
        start, shape = list(self.start), list(self.shape)
        start[axis], shape[axis] = start[axis] + first, count
        return self._replace(start=tuple(start), shape=tuple(shape))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def leaves(model: Decoder) -> list[Leaf]:
    """All leaves of a model, abstract or not: first the tables and norms, then layer by layer."""
    packed = {
        path: node
        for path, node in nnx.iter_modules(model)
        if isinstance(node, PackedLinear | PackedTable)
    }
    found: list[Leaf] = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        shape, dtype = tuple(value.shape), value.dtype.name
        stacked = path[0] == "layers"
        layers = range(shape[0]) if stacked else [None]
        shape = shape[1:] if stacked else shape
        node, field, format = packed.get(path[:-1]), path[-1], None
        if node is not None and field == "data":
            field, format = "codes", node.format
        for part, start, extent in _parts(node, path, field, shape):
            for layer in layers:
                words = [*path[:-2], part, field] if part else [*path[:-1], field]
                if stacked:
                    words.insert(1, layer)
                name = ".".join(map(str, words))
                found.append(Leaf(name, path, layer, start, extent, dtype, format))
    return sorted(found, key=lambda leaf: (-1 if leaf.layer is None else leaf.layer, leaf.name))


def _parts(node, path, field, shape):
    """(part's name or "", start, shape) of each matrix in a variable; only linears are fused."""
    whole = (0,) * len(shape)
    if not isinstance(node, PackedLinear):
        return [("", whole, shape)]
    axis = len(shape) - (2 if field == "codes" else 1)
    if shape[axis] == 1 and len(node.parts) == 1:  # one scale for all of N
        return [(node.parts[0][0], whole, shape)]
    found, first = [], 0
    for part, width in node.parts:
        start, extent = list(whole), list(shape)
        start[axis], extent[axis] = first, width
        found.append((part, tuple(start), tuple(extent)))
        first += width
    return found
