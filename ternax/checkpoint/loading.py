"""`load`: the model that `save` wrote.

It trusts nothing: names, shapes and dtypes are compared before bytes are read, since orbax
casts silently, and each leaf is checked as it comes.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from flax import nnx

from ternax.checkpoint import manifest
from ternax.checkpoint.files import WEIGHTS, open_files, sha256, unreadable, why_not
from ternax.checkpoint.leaves import Leaf, leaves
from ternax.checkpoint.manifest import Manifest
from ternax.checkpoint.packing import pack_into
from ternax.checkpoint.split_stacks import SplitStacks
from ternax.checkpoint.stacks import Stacks
from ternax.config import ModelConfig, first_layers, with_scheme
from ternax.errors import BadModelFile, UsageError
from ternax.kernels.packing import LAYOUT_VERSION
from ternax.models import MODELS, Decoder
from ternax.random_weights import abstract_model
from ternax.sharding import AnyMesh, Layout, layout_for


def load(
    path,
    *,
    scheme: str | None = None,
    packed: bool = True,
    layers: int | None = None,
    embed_dtype: str | None = None,
    head_dtype: str | None = None,
    backend: str | None = None,
    mesh: str | AnyMesh | None = None,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Decoder:
    """The model that `save` wrote at `path`.

    Packed leaves go one layer at a time into the stacks they run from, and floats are packed
    tensor by tensor, so that memory peaks at the packed model and one of those.

    Args:
      scheme: of a float model, another one than its config's.
      packed: False gives a float model's latent weights; True packs them.
      layers: the first n layers alone.
      embed_dtype, head_dtype: how tables are packed; None: as stored, int8 for a float
        model's.
      backend: as for `pack_model`.
      mesh: as for `engine.load`, of a model that is packed.
      progress: called as (name, bytes) when a layer, or what is outside them, is there; of floats
        that are packed, a tensor.

    Raises:
      BadModelFile: `path` holds no saved model, or one that is not whole.
      UsageError: asked of packed weights what only floats can become.
    """
    path = pathlib.Path(path)
    stored = manifest.read(path)
    stored.check(path, scheme=scheme, embed_dtype=embed_dtype, head_dtype=head_dtype)
    config = stored.config
    if stored.packed:
        if stored.layout != LAYOUT_VERSION:
            raise BadModelFile(
                path,
                manifest.NAME,
                f"expected packing layout {LAYOUT_VERSION}, found {stored.layout!r}: written by "
                "another version of ternax",
            )
        if not packed:
            raise UsageError(
                f"{path} holds packed weights, whose latent floats are gone: expected packed=True"
            )

    def abstract(config: ModelConfig) -> Decoder:
        if not stored.packed:
            return abstract_model(config, packed=False)
        return abstract_model(
            config, backend=backend, embed_dtype=stored.embed_dtype, head_dtype=stored.head_dtype
        )

    try:
        whole = abstract(config)
    except UsageError as error:
        raise BadModelFile(path, manifest.NAME, str(error)) from error
    _check_names(path, {leaf.name: (leaf.shape, leaf.dtype) for leaf in leaves(whole)}, stored)
    model = whole if layers is None else abstract(first_layers(config, layers))
    layout = layout_for(mesh, model.config)
    if layout is not None and not packed:
        raise UsageError(f"mesh {layout}: it is for packed models, found packed=False")
    if packed and not stored.packed:
        embed_dtype, head_dtype = embed_dtype or "int8", head_dtype or "int8"
        packing = dict(embed_dtype=embed_dtype, head_dtype=head_dtype, backend=backend)
        config = with_scheme(model.config, scheme) if scheme else model.config
        skeleton = abstract_model(config, packed=True, **packing)
        return pack_into(
            _stacks(skeleton, layout, **packing),
            skeleton,
            _tensors(path, stored, model),
            embed_dtype=embed_dtype,
            head_dtype=head_dtype,
            scheme_is_stored=scheme is None,
            progress=progress,
        )
    packing = dict(embed_dtype=stored.embed_dtype, head_dtype=stored.head_dtype, backend=backend)
    stacks = _stacks(model, layout, **packing)
    model = _filled(path, stored, model, stacks, progress)
    return model if stored.packed or scheme is None else _under_scheme(model, scheme)


def _stacks(skeleton: Decoder, layout: Layout | None, **packing) -> Stacks:
    """Where the leaves of an abstract model go. packing: as for `pack_model`."""
    return Stacks(skeleton) if layout is None else SplitStacks(skeleton, layout, **packing)


def _check_names(path, expected: dict[str, tuple], stored: Manifest) -> None:
    """Raises BadModelFile unless the manifest has the leaves expected, and orbax the manifest's."""
    listed = {name: (leaf.shape, leaf.dtype) for name, leaf in stored.leaves.items()}
    _check_same(path, expected, listed, "its config", "the manifest")
    try:
        with open_files() as (_, files):
            tree = files.metadata((path / WEIGHTS).absolute()).item_metadata.tree
        found = {name: (tuple(m.shape), np.dtype(m.dtype).name) for name, m in tree.items()}
    except Exception as error:
        raise unreadable(path, WEIGHTS, error) from error
    _check_same(path, listed, found, "the manifest", WEIGHTS)


def _check_same(path, expected: dict, found: dict, wanted_by: str, holder: str) -> None:
    """Raises BadModelFile for the first name, shape or dtype of `found` that differs."""
    for name, (shape, dtype) in expected.items():
        if name not in found:
            raise BadModelFile(path, name, f"missing in {holder}, expected by {wanted_by}")
        if found[name] != (shape, dtype):
            raise BadModelFile(
                path,
                name,
                f"expected {dtype} {shape} by {wanted_by}, found {found[name][1]} "
                f"{found[name][0]} in {holder}",
            )
    extra = [name for name in found if name not in expected]
    if extra:
        raise BadModelFile(path, extra[0], f"in {holder}, but unknown to {wanted_by}")


def _filled(path, stored: Manifest, model: Decoder, stacks: Stacks, progress) -> Decoder:
    """The abstract model with its values, read and checked one layer at a time."""
    with open_files() as (orbax, files):
        for layer, group in itertools.groupby(leaves(model), lambda leaf: leaf.layer):
            nbytes = _fill(path, stored, orbax, files, list(group), stacks)
            progress("tables and norm" if layer is None else f"layers.{layer}", nbytes)
    return stacks.model()


def _fill(path, stored: Manifest, orbax, files, group: list[Leaf], stacks: Stacks) -> int:
    """Reads some leaves and puts them in their places, one by one where a process keeps a share
    of each; returns their bytes.

    A function of its own: what it has read is gone before the next layer is.
    """
    for some in [[leaf] for leaf in group] if isinstance(stacks, SplitStacks) else [group]:
        arrays = _read(path, stored, orbax, files, some)
        for leaf in some:
            with stacks.open(leaf) as place:
                place[...] = arrays[leaf.name]
    return sum(leaf.nbytes for leaf in group)


def _tensors(path, stored: Manifest, model: Decoder) -> Iterator[tuple[str, dict]]:
    """(module, field -> array) of a float model's leaves, as for `pack_into`."""
    with open_files() as (orbax, files):
        for name, group in itertools.groupby(leaves(model), _module):
            arrays = _read(path, stored, orbax, files, list(group))
            yield name, {field.removeprefix(f"{name}."): a for field, a in arrays.items()}


def _module(leaf: Leaf) -> str:
    """ "layers.3.mlp.up" of its kernel, and of what its scheme owns."""
    module = leaf.name.rpartition(".")[0]
    return module.partition(".scheme")[0]


def _read(path, stored: Manifest, orbax, files, group: list[Leaf]) -> dict[str, np.ndarray]:
    """Some leaves by name, checked."""
    names = [leaf.name for leaf in group]
    args = orbax.args.PyTreeRestore(
        item=dict.fromkeys(names, 0),
        restore_args=dict.fromkeys(names, orbax.RestoreArgs(restore_type=np.ndarray)),
        partial_restore=True,
    )
    try:
        arrays = files.restore((path / WEIGHTS).absolute(), args=args)
    except Exception as error:
        raise unreadable(path, WEIGHTS, error) from error
    for leaf in group:
        array = arrays[leaf.name]
        if sha256(array) != stored.leaves[leaf.name].sha256:
            raise BadModelFile(path, leaf.name, "damaged: its sha256 is not the manifest's")
        why = why_not(leaf, array)
        if why:
            raise BadModelFile(path, leaf.name, why)
    return {name: arrays[name] for name in names}


def _under_scheme(model: Decoder, scheme: str) -> Decoder:
    """A float model under another scheme; what that scheme owns itself starts anew."""
    config = with_scheme(model.config, scheme)
    other = MODELS[config.family](config, rngs=nnx.Rngs(0))
    shared = {
        path: variable
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if "scheme" not in path
    }
    nnx.update(other, nnx.from_flat_state(shared))
    return other
