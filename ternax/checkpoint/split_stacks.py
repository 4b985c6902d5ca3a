"""A model's variables on a mesh while its leaves come in: each device gets its part of each."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from ternax.checkpoint.leaves import Leaf, leaves
from ternax.checkpoint.stacks import Stacks, put_in_place
from ternax.kernels.memory import zeros
from ternax.models import Decoder
from ternax.nn.table import PackedTable
from ternax.random_weights import abstract_part
from ternax.sharding import MATRICES, Layout


class SplitStacks(Stacks):
    """As `Stacks` of a whole model, but the variables lie as `layout` says.

    A process holds the parts of its own devices, and one leaf at a time whole.
    """

    def __init__(self, whole: Decoder, layout: Layout, **packing):
        part, self._specs = abstract_part(layout, **packing)
        assert isinstance(layout.mesh, Mesh)  # a plan's mesh has no devices to load to
        self._layout, self._mesh = layout, layout.mesh
        self._graph, self._state = nnx.split(part)
        self._leaves = {leaf.name: leaf for leaf in leaves(whole)}
        self._parts = {leaf.name: leaf for leaf in leaves(part)}
        axis = self._mesh.axis_names.index("tensor")
        self._devices = {
            device: place[axis]
            for place, device in np.ndenumerate(self._mesh.devices)
            if device.process_index == jax.process_index()
        }
        self._arrays: dict[tuple, dict] = {}
        for path, variable in nnx.to_flat_state(self._state):
            value = variable.get_value()
            self._arrays[path] = {}
            for device in self._devices:
                with jax.default_device(device):
                    made = zeros(value.shape, value.dtype)
                self._arrays[path][device] = jax.device_put(made, device)

    @contextlib.contextmanager
    def open(self, leaf: Leaf) -> Iterator[np.ndarray]:
        """The leaf, or a stretch of it, to be written all over within the block."""
        array = np.empty(leaf.shape, leaf.dtype)
        yield array
        whole, part = self._leaves[leaf.name], self._parts[leaf.name]
        stacks = self._arrays[leaf.path]
        for device, index in self._devices.items():
            found = _overlap(leaf, whole, part, self._first_of(leaf.name, index))
            if found is None:
                continue
            source, start = found
            value = array[source]
            if leaf.layer is not None:
                value, start = value[None], (leaf.layer, *start)
            # At once: what waits for its turn would be held, leaf by leaf.
            stacks[device] = put_in_place(stacks[device], value, start).block_until_ready()

    def _first_of(self, name: str, index: int) -> int:
        """Which of the different parts of a leaf a device has: kv heads may have copies."""
        matrix = name.split(".")[-2]
        of_kv = MATRICES.get(matrix, ("", ""))[1] == "kv_heads"
        return index // (self._layout.kv_copies if of_kv else 1)

    def model(self) -> Decoder:
        """The model. What was opened must not be written to any more."""
        for path, variable in nnx.to_flat_state(self._state):
            spec: PartitionSpec = self._specs[".".join(map(str, path))]
            shape = self._layout.whole(variable.get_value().shape, spec)
            arrays = list(self._arrays.pop(path).values())
            sharding = self._layout.sharding(spec)
            variable.set_value(jax.make_array_from_single_device_arrays(shape, sharding, arrays))
        return nnx.merge(self._graph, self._state)


def split_model(model: Decoder, layout: Layout) -> Decoder:
    """A packed model that is whole, matrix by matrix onto the mesh; the whole one stays."""
    head = model.embedding if model.config.tie_embeddings else model.head
    assert isinstance(model.embedding, PackedTable) and isinstance(head, PackedTable)
    stacks = SplitStacks(
        model,
        layout,
        embed_dtype=model.embedding.format,
        head_dtype=head.format,
        backend=model.embedding.backend,
    )
    values = {
        path: np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    for leaf in leaves(model):
        with stacks.open(leaf) as place:
            place[...] = leaf.of(values[leaf.path])
    return stacks.model()


def _overlap(opened: Leaf, whole: Leaf, part: Leaf, first: int):
    """What of `opened`, a stretch of `whole`, lies in a device's part, the `first`-th of its size.

    Returns:
      (slices of opened, where they begin in the device's variable), or None.
    """
    source, start = [], []
    axes = zip(
        opened.start, opened.shape, whole.start, whole.shape, part.start, part.shape, strict=True
    )
    for at, count, origin, extent, mine, size in axes:
        begin = at - origin  # within the leaf
        low = first * size if size != extent else 0
        left, right = max(begin, low), min(begin + count, low + size)
        if left >= right:
            return None
        source.append(slice(left - begin, right - begin))
        start.append(mine + left - low)
    return tuple(source), tuple(start)
