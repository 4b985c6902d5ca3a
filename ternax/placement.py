"""Where the arrays of a training run lie on a mesh: split by `sharding.RULES` wherever they divide.

Nothing is split by hand here: XLA's partitioner gathers a weight where it is used (fsdp), adds
partial sums (tensor) and gradients (data).
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ternax import mesh as meshes
from ternax.config import ModelConfig
from ternax.errors import UsageError
from ternax.models import MODELS, Decoder
from ternax.sharding import RULES, dimensions, fetch, leaf_name


class Placement:
    """The arrays of a run on a mesh with every axis of `mesh.AXES`.

    Attributes:
      mesh: the mesh.
      rows: of tokens int32 [parts, rows, T], whose rows are split.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.rows = NamedSharding(mesh, P(None, self._axes("batch")))

    def __str__(self) -> str:
        return meshes.describe(self.mesh.shape)

    def _axes(self, dimension: str | None) -> tuple[str, ...]:
        return tuple(a for a in RULES.get(dimension or "", ()) if self.mesh.shape[a] > 1)

    def check_batch(self, rows: int) -> None:
        """UsageError unless the rows of one part of a batch divide over the mesh."""
        ways = math.prod(self.mesh.shape[axis] for axis in RULES["batch"])
        if rows % ways:
            raise UsageError(
                f"mesh {self} cuts a batch in {ways}, found {rows} sequences at once: expected a "
                "multiple in --batch over --accumulate"
            )

    def of(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Of one variable, gradient or moment, by the end of its name; whole where it is uneven."""
        axes = []
        for dimension, size in zip(dimensions(name, shape), shape, strict=True):
            found = self._axes(dimension)
            ways = math.prod(self.mesh.shape[axis] for axis in found)
            axes.append(found if found and size % ways == 0 else None)
        return NamedSharding(self.mesh, P(*axes))

    def tree(self, tree) -> Any:
        """The NamedSharding of each leaf."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self.of(leaf_name(path), leaf.shape), tree
        )

    def abstract(self, tree) -> Any:
        """The tree as shapes and dtypes where they lie."""
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            tree,
            self.tree(tree),
        )

    def put(self, tree) -> Any:
        """The tree's arrays where they belong; those of one host must be equal on all."""
        return jax.tree.map(_put, tree, self.tree(tree))

    def put_rows(self, tokens: np.ndarray) -> jax.Array:
        return _put(tokens, self.rows)

    def gathered(self, tree) -> Any:
        """The tree's arrays whole, on this process's first device."""
        if self.mesh.size == 1:
            return tree
        return jax.tree.map(lambda leaf: jax.device_put(fetch(leaf), jax.local_devices()[0]), tree)

    def model(self, config: ModelConfig, seed: int) -> Decoder:
        """A float model of random weights, each drawn where it stays."""

        def make():
            return MODELS[config.family](config, rngs=nnx.Rngs(seed))

        graph, state = nnx.split(nnx.eval_shape(make))
        drawn = jax.jit(lambda: nnx.state(make()), out_shardings=self.tree(state))()
        return nnx.merge(graph, drawn)


def over_data(rows: int) -> Placement:
    """The largest mesh of data alone that `rows` sequences divide over, of this process's view."""
    devices = math.gcd(jax.device_count(), rows)
    sizes = dict.fromkeys(meshes.AXES, 1) | {"data": devices}
    return Placement(meshes.make_mesh(sizes, jax.devices()[:devices]))


def _put(leaf, where: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding == where:
        return leaf
    if where.is_fully_addressable:
        return jax.device_put(leaf, where)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])
