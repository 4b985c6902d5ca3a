"""How a model lies on a mesh: one table of rules, and what follows from it for every tensor.

A dimension has a logical name, "heads"; RULES says along which axis of the mesh it is split.
Inside `shard_map` each device runs the same model, only narrower: a packed matrix is a packed
matrix of fewer rows or columns. So fused parts interleave, q0 k0 v0 q1 k1 v1, and every split
keeps whole blocks of 16 codes and whole groups of scales.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ternax import mesh as meshes
from ternax.config import ModelConfig
from ternax.errors import UsageError
from ternax.kernels.packing import BLOCK
from ternax.table import binary

AnyMesh = Mesh | AbstractMesh

# Logical dimension -> axes of the mesh it is split along. Packed models have no fsdp.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "width": ("fsdp",),
    "slots": ("sequence",),
}
# Matrix -> what its inputs (K) and its outputs (N) count.
MATRICES = {
    "q": ("width", "heads"),
    "k": ("width", "kv_heads"),
    "v": ("width", "kv_heads"),
    "qkv": ("width", "heads"),
    "o": ("heads", "width"),
    "gate": ("width", "ffn"),
    "up": ("width", "ffn"),
    "gate_up": ("width", "ffn"),
    "down": ("ffn", "width"),
    "embedding": ("width", "vocab"),
    "head": ("width", "vocab"),
}
# Those whose inputs are split: partial sums of all devices are added.
SUMMED = ("o", "down")
# Norm -> what its weights count; the key is the end of its name.
NORMS = {
    "attn.sub_norm": "heads",
    "mlp.sub_norm": "ffn",
    "attn_norm": "width",
    "mlp_norm": "width",
    "norm": "width",
}
# The cache's k and v; scales lack the last.
CACHE = ("layers", "batch", "kv_heads", "slots", "head")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a mesh. Make it with `layout_of`, which checks that they go together.

    Attributes:
      mesh: with every axis of `mesh.AXES`; an AbstractMesh serves plans alone.
      config: the whole model.
    """

    mesh: AnyMesh
    config: ModelConfig

    def __str__(self) -> str:
        return meshes.describe(self.mesh.shape)

    @property
    def tensor(self) -> int:
        """Devices that share each matrix."""
        return self.mesh.shape["tensor"]

    @property
    def batch(self) -> int:
        """Parts that a batch is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in RULES["batch"])

    @property
    def across(self) -> str | None:
        """The axis that partial sums are added along; None where nothing is split."""
        return "tensor" if self.tensor > 1 else None

    @property
    def sequence(self) -> int:
        """Stretches that the KV cache's slots are cut into."""
        return self.mesh.shape["sequence"]

    @property
    def slots_across(self) -> str | None:
        """The axis that attention's parts are put together along; None where slots are whole."""
        return "sequence" if self.sequence > 1 else None

    def local_context(self, context: int) -> int:
        """Tokens of `context` that a device has slots for."""
        return math.ceil(context / self.sequence)

    @property
    def vocab_across(self) -> str | None:
        """`across` where tables are split too: a vocabulary that does not divide stays whole."""
        return self.across if self.config.vocab_size % self.tensor == 0 else None

    @property
    def kv_copies(self) -> int:
        """Devices that hold the same kv heads: above 1 where there are more devices than heads."""
        return max(1, self.tensor // self.config.num_kv_heads)

    @property
    def kv_heads(self) -> int:
        """Of all devices together, copies counted."""
        return self.config.num_kv_heads * self.kv_copies

    @property
    def local_config(self) -> ModelConfig:
        """The narrower model that each device runs."""
        config, n = self.config, self.tensor
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // n,
            num_kv_heads=self.kv_heads // n,
            intermediate_size=config.intermediate_size // n,
            vocab_size=config.vocab_size // (n if self.vocab_across else 1),
        )

    def spec(self, name: str, shape: tuple[int, ...]) -> P:
        """How a variable is split, "layers.attn.qkv.data". shape: on one device, or whole."""
        names = dimensions(name, shape)
        if not self.vocab_across:
            names = [None if dimension == "vocab" else dimension for dimension in names]
        return self.partition(names)

    def partition(self, names) -> P:
        """Logical names of dimensions, None for those that stay whole -> PartitionSpec."""
        axes = [
            tuple(axis for axis in RULES.get(name, ()) if self.mesh.shape[axis] > 1)
            for name in names
        ]
        return P(*(used[0] if len(used) == 1 else used or None for used in axes))

    def specs(self, tree):
        """The tree with the PartitionSpec of each leaf, by name."""
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        return jax.tree.unflatten(
            structure, [self.spec(leaf_name(path), leaf.shape) for path, leaf in paths]
        )

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def whole(self, shape: tuple[int, ...], spec: P) -> tuple[int, ...]:
        """The shape of all devices together, of one device's `shape`."""
        return tuple(
            n * self._ways(axes) for n, axes in zip(shape, _padded(spec, shape), strict=True)
        )

    def _ways(self, axes) -> int:
        axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def first_row(self, part: str, rows: int, device):
        """The row of the whole matrix `part` that a device's `rows` rows begin at.

        device: its index along `tensor`, an int or traced.
        """
        names = MATRICES.get(part, (None, None))
        if self.across is None or part in SUMMED or names[1] == "vocab" and not self.vocab_across:
            return 0
        copies = self.kv_copies if names[1] == "kv_heads" else 1
        return device // copies * rows

    def put(self, value, names) -> jax.Array:
        """A host array that every process has, split by its dimensions' logical names."""
        value = np.asarray(value)
        sharding = self.sharding(self.partition(names))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    def full(self, shape, value, dtype, spec: P) -> jax.Array:
        """An array of equal values, made where it stays. shape: of all devices together."""
        make = jax.jit(lambda: jnp.full(shape, value, dtype), out_shardings=self.sharding(spec))
        return make()


def layout_for(mesh: str | AnyMesh | None, config: ModelConfig) -> Layout | None:
    """How a packed model lies on a mesh; None on one device. UsageError where it cannot."""
    if mesh is None:
        return None
    placed: AnyMesh = meshes.make_mesh(meshes.parse(mesh)) if isinstance(mesh, str) else mesh
    if placed.shape["fsdp"] > 1:
        raise UsageError(
            f"mesh {meshes.describe(placed.shape)}: fsdp gathers weights at each use, which is "
            "for training; take data or tensor"
        )
    return layout_of(placed, config) if placed.size > 1 else None


def layout_of(mesh: AnyMesh, config: ModelConfig) -> Layout:
    """The Layout, checked. UsageError where the model cannot be split so, with what can."""
    n = mesh.shape["tensor"]
    reason = why_not(config, n)
    if reason:
        legal = [str(m) for m in range(1, 65) if why_not(config, m) is None]
        raise UsageError(
            f"mesh {meshes.describe(mesh.shape)}: {config.name} does not split in {n}: {reason}; "
            f"tensor can be {', '.join(legal)}"
        )
    return Layout(mesh, config)


def why_not(config: ModelConfig, n: int) -> str | None:
    """None where every matrix splits over `n` devices; else the first reason."""
    heads, groups = config.num_heads, config.num_kv_heads
    if heads % n:
        return f"{heads} heads"
    if groups % n and n % groups:
        return f"{groups} kv heads, which would be cut"
    for what, size in (("ffn", config.intermediate_size), ("heads", heads * config.head_dim)):
        if n > 1 and (size % n or size // n % BLOCK):
            return f"{what} of {size}, not into whole blocks of {BLOCK} codes"
    return None


def check_batch(layout: Layout | None, batch: int) -> None:
    """UsageError unless the batch divides over the mesh."""
    if layout is not None and batch % layout.batch:
        raise UsageError(
            f"mesh {layout} cuts a batch in {layout.batch}, found a batch of {batch}: expected a "
            "multiple, or less of data"
        )


def leaf_name(path) -> str:
    """ "layers.attn.qkv.data" of a path of `tree_flatten_with_path`."""
    words = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    return ".".join(word for word in words if word not in ("value", ""))


def dimensions(name: str, shape: tuple[int, ...]) -> list[str | None]:
    """The logical name of each dimension of a variable; None for one that is never split."""
    *modules, field = name.split(".")
    if modules == ["cache"]:
        return list(CACHE[: len(shape)])
    matrix = next((word for word in reversed(modules) if word in MATRICES), None)
    found: list[str | None] = [None] * len(shape)
    if matrix is not None:
        k, n = MATRICES[matrix]
        pairs = {
            "data": (n, k),
            "kernel": (k, n),
            "weight": (n, k),
            "scale": (k, n),
            "zero": (k, n),
        }.get(field)
        if pairs and len(shape) >= 2:
            # One scale for all of K, or of N, stands on every device.
            found[-2:] = [
                p if size > 1 else None for p, size in zip(pairs, shape[-2:], strict=True)
            ]
    elif field == "weight":
        found[-1] = next(NORMS[end] for end in NORMS if ".".join(modules).endswith(end))
    return found


def _padded(spec: P, shape) -> tuple:
    return (*spec, *[None] * (len(shape) - len(spec)))


def spread(layout: Layout | None, body: Callable, arguments, results) -> Callable:
    """`body` on every device of the layout at once, each with its part; without one, as it is.

    arguments, results: PartitionSpecs of what goes in and comes out, in trees.
    """
    if layout is None:
        return body
    # What is not split is equal on all devices by construction, which kernels hide from jax.
    return jax.shard_map(
        body, mesh=layout.mesh, in_specs=arguments, out_specs=results, check_vma=False
    )


@functools.partial(jax.jit, static_argnums=1)
def _gathered(value, sharding):
    return jax.lax.with_sharding_constraint(value, sharding)


def fetch(value: jax.Array) -> np.ndarray:
    """The whole array on this host, whatever process holds its parts."""
    if not value.is_fully_addressable and not value.is_fully_replicated:
        assert isinstance(value.sharding, NamedSharding)  # what is split is split over a mesh
        value = _gathered(value, NamedSharding(value.sharding.mesh, P()))
    return np.asarray(value)


def lines(layout: Layout, tree, specs: Mapping[str, P]) -> Iterator[str]:
    """What each variable of a model becomes on a device, as a table.

    Args:
      tree: of one device's shapes and dtypes.
      specs: how each is split, by name.
    """
    rows = [("tensor", "whole", "on a device", "split over", "a device's")]
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = leaf_name(path)
        spec = specs[name]
        split = [
            f"{dimension}: {axes}"
            for dimension, axes in zip(
                dimensions(name, leaf.shape), _padded(spec, leaf.shape), strict=True
            )
            if axes
        ]
        nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
        whole = "x".join(map(str, layout.whole(leaf.shape, spec)))
        mine = "x".join(map(str, leaf.shape))
        rows.append((name, whole, mine, ", ".join(split) or "nothing", binary(nbytes)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        yield "  ".join(
            cell.rjust(width) if i == 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
