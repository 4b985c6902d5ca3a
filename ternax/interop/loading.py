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
from ternax.checkpoint.split_stacks import SplitStacks
from ternax.checkpoint.stacks import Stacks
from ternax.config import first_layers, with_scheme
from ternax.convert import TensorError, error_of, losses
from ternax.edit import check_table_dtypes, pack_rows
from ternax.errors import BadModelFile, UsageError
from ternax.interop import lint
from ternax.interop.foreign import MATRICES, Foreign, ModelFileWarning, check
from ternax.kernels.packing import bits_to_float
from ternax.kernels.rows import int8_rows
from ternax.models import Decoder
from ternax.quant import make_scheme
from ternax.random_weights import abstract_model
from ternax.sharding import AnyMesh, layout_for

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
    mesh: str | AnyMesh | None = None,
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
      mesh: as for `engine.load`, of a model that is packed.
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
    layout = layout_for(mesh, config)
    if layout is not None and not packed:
        raise UsageError(f"mesh {layout}: it is for packed models, found packed=False")
    stacks = Stacks(skeleton) if layout is None else SplitStacks(skeleton, layout, **packing)
    odd: list[str] = []
    formats = {"embedding": packing.get("embed_dtype"), "head": packing.get("head_dtype")}
    for name, group in itertools.groupby(
        leaves(skeleton), lambda leaf: leaf.name.rpartition(".")[0]
    ):
        fields = {leaf.name.rpartition(".")[2]: leaf for leaf in group}
        if name in formats and packed:
            nbytes = _fill_table(model, name, formats[name], fields, stacks, odd)
        else:
            nbytes = _fill(model, config.scheme, name, fields, stacks, odd, watch)
        progress(name, nbytes)
    if odd:
        more = f"; and {len(odd) - 8} more" if len(odd) > 8 else ""
        warnings.warn(f"{model.path}: {'; '.join(odd[:8])}{more}", ModelFileWarning, stacklevel=2)
    return stacks.model()


def _fill(model, scheme, name, fields: dict[str, Leaf], stacks: Stacks, odd, watch) -> int:
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
        with stacks.open(fields.pop("codes")) as codes:
            scale = model.trits(name, codes[0])
            if not np.isfinite(scale).all():
                raise BadModelFile(model.path, model.where(name), "its scale is not finite")
            odd += lint.trits(model.where(name), codes[0], scale)
            nbytes = codes.nbytes
        arrays = {"scale": scale[None]}
        return nbytes + _put(model, scheme, fields, arrays, stacks)
    else:
        found = _finite(model, name, model.floats(name))
        odd += lint.floats(model.where(name), found)
        arrays = _quantized(scheme, name, found, watch)
    return _put(model, scheme, fields, arrays, stacks)


def _put(model, scheme, fields: dict[str, Leaf], arrays: dict, stacks: Stacks) -> int:
    """Each array, spread over its leaf, in its place; returns their bytes."""
    for field, leaf in fields.items():
        if field not in arrays:
            raise UsageError(
                f"scheme {scheme} owns {field}, which {model.path} does not hold: load it with "
                "scheme=none and convert it"
            )
        array = np.asarray(arrays[field])
        # A norm comes as a row; all else has its leaf's axes.
        same = array.size == np.prod(leaf.shape)
        with stacks.open(leaf) as place:
            place[...] = array.reshape(leaf.shape) if same else array
    return sum(np.asarray(array).nbytes for array in arrays.values())


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


def _fill_table(model, name, dtype, fields: dict[str, Leaf], stacks: Stacks, odd) -> int:
    """Packs a table a few rows at a time; returns its bytes."""
    codes, scale = fields["codes"], fields["scale"]
    total, most = codes.shape[1], 0.0
    for first in range(0, total, _ROWS):
        count = min(_ROWS, total - first)
        rows = model.stored(name, first, count)
        with (
            stacks.open(codes.stretch(1, first, count)) as place,
            stacks.open(scale.stretch(2, first, count)) as of_rows,
        ):
            largest = _pack_table_rows(rows, dtype, place, of_rows)
        if not np.isfinite(largest):
            _finite(model, name, model.floats(name, first, count))
        most = max(most, largest)
    if most == 0:
        odd.append(f"{model.where(name)} is all zero")
    return codes.nbytes + scale.nbytes


def _pack_table_rows(rows, dtype: str, codes, scale) -> float:
    """Packs rows of a table into the places of their codes [1, n, bytes] and scales [1, G, n or
    1]; returns the largest magnitude, which is not finite where one of them is not."""
    if dtype == "int8":
        return int8_rows(rows, codes[0], scale[0, 0])
    packed, largest = jax.block_until_ready(_pack_rows(rows, dtype))
    codes[...], scale[...] = packed.data, packed.scale
    return float(largest)


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
