"""A saved model of floats, packed as it is read: one tensor at a time, into its place.

Neither the floats nor the packed model ever stand beside each other whole, and what a tensor
becomes depends on no mesh.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax.checkpoint.leaves import Leaf, leaves
from ternax.checkpoint.stacks import Stacks
from ternax.edit import pack_rows
from ternax.models import Decoder
from ternax.quant import make_scheme

# Rows of a table that are packed at a time.
_ROWS = 2048


def pack_into(
    stacks: Stacks,
    packed: Decoder,
    tensors: Iterator[tuple[str, dict[str, np.ndarray]]],
    *,
    embed_dtype: str,
    head_dtype: str,
    scheme_is_stored: bool,
    progress: Callable[[str, int], None],
) -> Decoder:
    """The packed model of float tensors.

    Args:
      stacks: of `packed`, an abstract packed model.
      tensors: (name, field -> array) of each module: "layers.3.mlp.up" with its kernel f32 [K, N]
        and what its scheme owns, "head" with its weight f32 [V, D], and the norms.
      scheme_is_stored: what schemes own is among the fields; else it is made anew.
      progress: called as (name, bytes read) when a tensor is there.
    """
    places: dict[str, dict[str, Leaf]] = {}
    for leaf in leaves(packed):
        module, _, field = leaf.name.rpartition(".")
        places.setdefault(module, {})[field] = leaf
    tables = {"embedding": embed_dtype, "head": head_dtype}
    for name, fields in tensors:
        place = places[name]
        if name in tables:
            _put_table(stacks, place, fields["weight"], tables[name])
        elif "kernel" in fields:
            found = _pack(packed.config.scheme, fields, scheme_is_stored)
            values = {"codes": found.data, "scale": found.scale, "zero": found.zero}
            for field, leaf in place.items():
                _put(stacks, leaf, np.asarray(values[field]))
        else:
            for field, leaf in place.items():
                _put(stacks, leaf, fields[field])
        progress(name, sum(array.nbytes for array in fields.values()))
    return stacks.model()


def _put(stacks: Stacks, leaf: Leaf, value: np.ndarray) -> None:
    with stacks.open(leaf) as place:
        place[...] = value


def _put_table(stacks: Stacks, place: dict[str, Leaf], rows: np.ndarray, dtype: str) -> None:
    for first in range(0, len(rows), _ROWS):
        packed = _pack_rows(rows[first : first + _ROWS], dtype)
        count = packed.data.shape[-2]
        _put(stacks, place["codes"].stretch(1, first, count), np.asarray(packed.data))
        _put(stacks, place["scale"].stretch(2, first, count), np.asarray(packed.scale))


def _pack(spec: str, fields: dict[str, np.ndarray], scheme_is_stored: bool):
    kernel = fields["kernel"]
    graph, state = nnx.split(make_scheme(spec, kernel.shape, rngs=nnx.Rngs(0)))
    if scheme_is_stored:
        for path, variable in nnx.to_flat_state(state):
            variable.set_value(jnp.asarray(fields[".".join(map(str, ("scheme", *path)))]))
    return _pack_kernel(graph, state, kernel)


@functools.partial(jax.jit, static_argnums=0)
def _pack_kernel(graph, state, kernel):
    return nnx.merge(graph, state).quantize(kernel).pack()


_pack_rows = jax.jit(pack_rows, static_argnums=1)
