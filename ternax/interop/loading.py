"""`load`: another program's model, streamed matrix by matrix into the stacks it runs from.

Trits become canonical codes without being unpacked; floats are quantized as they come, and
tables a few rows at a time. So memory peaks at the packed model and one matrix.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax.checkpoint.leaves import Leaf, leaves
from ternax.config import first_layers, with_scheme
from ternax.convert import TensorError, error_of, losses
from ternax.edit import check_table_dtypes, pack_rows
from ternax.errors import BadModelFile, UsageError
from ternax.interop import lint
from ternax.interop.foreign import MATRICES, Foreign, ModelFileWarning, check
from ternax.kernels.memory import zeros
from ternax.kernels.packing import bits_to_float
from ternax.models import Decoder
from ternax.quant import make_scheme
from ternax.random_weights import abstract_model

# Rows of a table that are floats at a time.
_ROWS = 2048


def load(
    model: Foreign,
    *,
    scheme: str | None = None,
    inputs: str | None = None,
    packed: bool = True,
    layers: int | None = None,
    embed_dtype: str | None = None,
    head_dtype: str | None = None,
    backend: str | None = None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
    watch: Callable[[TensorError], None] | None = None,
) -> Decoder:
    """The model in memory.

    Args:
      scheme, inputs: what a file of floats is quantized with; None: as the file says.
      packed: False gives latent floats (f32), of a file of floats.
      layers: the first n layers alone.
      embed_dtype, head_dtype: how tables are packed; None is int8.
      backend: as for `pack_model`.
      progress: called as (name, bytes) when a matrix, a table or a norm is there.
      watch: called with what quantizing lost, matrix by matrix.

    Warns with `ModelFileWarning`, once, of what `lint` finds odd.

    Raises:
      BadModelFile: a tensor that cannot be, by the file's own name of it.
      UsageError: asked of trits what only floats can become.
    """
    check(model, model.path, scheme=scheme)
    if model.packed and not packed:
        raise UsageError(
            f"{model.path} holds trits, whose latent floats are gone: expected packed=True"
        )
    config = first_layers(with_scheme(model.config, scheme, inputs or model.config.inputs), layers)
    packing = {}
    if packed:
        embed = embed_dtype or "int8"
        head = embed if config.tie_embeddings and not head_dtype else head_dtype or "int8"
        check_table_dtypes(config, embed, head)
        packing = dict(embed_dtype=embed, head_dtype=head, backend=backend)
    skeleton = abstract_model(config, packed=packed, **packing)
    graph, state = nnx.split(skeleton)
    variables = dict(nnx.to_flat_state(state))
    values = {
        path: zeros(variable.get_value().shape, variable.get_value().dtype)
        for path, variable in variables.items()
    }
    odd: list[str] = []
    formats = {"embedding": packing.get("embed_dtype"), "head": packing.get("head_dtype")}
    for name, group in itertools.groupby(
        leaves(skeleton), lambda leaf: leaf.name.rpartition(".")[0]
    ):
        fields = {leaf.name.rpartition(".")[2]: leaf for leaf in group}
        if name in formats and packed:
            nbytes = _fill_table(model, name, formats[name], fields, values, odd)
        else:
            nbytes = _fill(model, config.scheme, name, fields, values, odd, watch)
        progress(name, nbytes)
    if odd:
        more = f"; and {len(odd) - 8} more" if len(odd) > 8 else ""
        warnings.warn(f"{model.path}: {'; '.join(odd[:8])}{more}", ModelFileWarning, stacklevel=2)
    for path, variable in variables.items():
        variable.set_value(values[path].block_until_ready())
    return nnx.merge(graph, state)


def _fill(model, scheme, name, fields: dict[str, Leaf], values, odd, watch) -> int:
    """Puts a matrix, a norm or a float table in its place; returns its bytes."""
    if name.partition(".")[2].partition(".")[2] not in MATRICES:  # norms, float tables
        found = _finite(model, name, model.floats(name))
        odd += lint.floats(model.where(name), found)
        arrays = {"weight": found}
    elif "kernel" in fields:
        found = _finite(model, name, model.floats(name))
        odd += lint.floats(model.where(name), found)
        arrays = {"kernel": found.T}
    elif model.packed:
        codes, scale = model.trits(name)
        if not np.isfinite(scale).all():
            raise BadModelFile(model.path, model.where(name), "its scale is not finite")
        odd += lint.trits(model.where(name), codes, scale)
        arrays = {"codes": codes[None], "scale": scale[None]}
    else:
        found = _finite(model, name, model.floats(name))
        odd += lint.floats(model.where(name), found)
        arrays = _quantized(scheme, name, found, watch)
    for field, leaf in fields.items():
        if field not in arrays:
            raise UsageError(
                f"scheme {scheme} owns {field}, which {model.path} does not hold: load it with "
                "scheme=none and convert it"
            )
        array = np.broadcast_to(
            np.asarray(arrays[field]).reshape(_like(arrays[field], leaf)), leaf.shape
        )
        values[leaf.path] = leaf.into(values[leaf.path], array)
    return sum(np.asarray(array).nbytes for array in arrays.values())


def _like(array, leaf: Leaf) -> tuple[int, ...]:
    """A norm comes as a row; all else has its leaf's axes."""
    return leaf.shape if np.asarray(array).size == np.prod(leaf.shape) else array.shape


def _quantized(scheme: str, name: str, rows: np.ndarray, watch) -> dict:
    """A float matrix [N, K] under `scheme`: its leaves by field."""
    start = time.perf_counter()
    n, k = rows.shape
    graph, state = nnx.split(make_scheme(scheme, (k, n), rngs=nnx.Rngs(0)))
    packed, numbers = _pack(graph, state, jnp.asarray(rows))
    numbers = jax.device_get(numbers)
    if watch is not None:
        seconds = time.perf_counter() - start
        watch(error_of(name, (k, n), numbers, 8 * packed.nbytes / (k * n), seconds))
    found = {"codes": packed.data, "scale": packed.scale}
    return found if packed.zero is None else found | {"zero": packed.zero}


@functools.partial(jax.jit, static_argnums=0)
def _pack(graph, state, rows):
    """(Packed, `convert.losses`) of W^T [N, K]."""
    weight = rows.T
    quantized = nnx.merge(graph, state).quantize(weight)
    return quantized.pack(), losses(weight, quantized)


def _fill_table(model, name, dtype, fields: dict[str, Leaf], values, odd) -> int:
    """Packs a table a few rows at a time; returns its bytes."""
    codes, scale = fields["codes"], fields["scale"]
    total, most = codes.shape[1], 0.0
    for first in range(0, total, _ROWS):
        count = min(_ROWS, total - first)
        packed, largest = _pack_rows(model.stored(name, first, count), dtype)
        if not np.isfinite(largest):
            _finite(model, name, model.floats(name, first, count))
        most = max(most, float(largest))
        for leaf, part in ((codes, packed.data), (scale, packed.scale)):
            axis = 1 if leaf is codes else 2
            start, shape = list(leaf.start), list(leaf.shape)
            if shape[axis] == total:
                start[axis], shape[axis] = first, count
            values[leaf.path] = leaf._replace(start=tuple(start), shape=tuple(shape)).into(
                values[leaf.path], part
            )
    if most == 0:
        odd.append(f"{model.where(name)} is all zero")
    return sum(values[leaf.path].nbytes for leaf in fields.values())


@functools.partial(jax.jit, static_argnums=1)
def _pack_rows(stored, dtype):
    """(Packed of some rows of a table, the largest magnitude in them, NaN if one is there)."""
    rows = bits_to_float(stored)
    return pack_rows(rows, dtype), jnp.max(jnp.abs(rows))


def _finite(model, name, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise BadModelFile(
            model.path, model.where(name), f"{bad} of {array.size} values are not finite"
        )
    return array
