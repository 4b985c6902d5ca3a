"""`save`: a finished model as a directory, bit for bit.

    manifest.json   what it is, and the shape, dtype and sha256 of every leaf
    weights/        the leaves, by orbax: per layer and per matrix, see `leaves`

Nothing in it names the machine, the user or a path.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable

import numpy as np
from flax import nnx

from ternax.checkpoint import manifest
from ternax.checkpoint.files import WEIGHTS, first_line, open_files, sha256, why_not
from ternax.checkpoint.leaves import leaves
from ternax.checkpoint.manifest import Manifest, Stored
from ternax.checkpoint.whole import whole_directory
from ternax.edit import is_packed, stored_order
from ternax.errors import OutputError, UsageError
from ternax.kernels.packing import LAYOUT_VERSION
from ternax.models import Decoder
from ternax.nn.table import PackedTable, Table
from ternax.random_weights import abstract_model


def save(
    model: Decoder,
    path,
    *,
    trained_tokens: int | None = None,
    beside: Callable[[pathlib.Path], None] = lambda directory: None,
) -> None:
    """Writes a model, packed or of latent floats, as directory `path`.

    The directory appears when everything in it is on disk; a saved model that was there
    stays whole until then, and is replaced. trained_tokens: for the manifest. beside: adds files
    of its own to it, such as a tokenizer, while it is a draft.

    Raises:
      UsageError: the model is not what its config makes, or holds what no load takes: code
        3, or a number that is not finite.
      OutputError: `path` is something else than a saved model, or cannot be written.
    """
    path = pathlib.Path(os.path.abspath(path))
    if path.exists() and not manifest.is_saved_model(path):
        if not path.is_dir() or any(path.iterdir()):
            raise OutputError(f"{path} is there and no saved model: choose another path")
    described, arrays = _described(model)
    with whole_directory(path, "the model") as draft:
        _write(draft, dataclasses.replace(described, trained_tokens=trained_tokens), arrays)
        beside(draft)


def _described(model: Decoder) -> tuple[Manifest, dict[str, np.ndarray]]:
    """What `save` writes: the manifest, and each leaf as a view. UsageError as `save` says."""
    config, packed = model.config, is_packed(model)
    embed = _table_format(model.embedding)
    head = embed if config.tie_embeddings else _table_format(model.head)
    tables = dict(embed_dtype=embed, head_dtype=head) if packed else {}
    wanted = leaves(abstract_model(config, packed=packed, **tables))
    found = leaves(stored_order(model))
    for leaf, other in itertools.zip_longest(found, wanted):
        if leaf != other:
            raise UsageError(
                f"save: the model is not what its config {config.name} makes: expected {other}, "
                f"found {leaf}"
            )
    values = {
        path: np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    arrays, stored = {}, {}
    for leaf in found:
        arrays[leaf.name] = leaf.of(values[leaf.path])
        why = why_not(leaf, arrays[leaf.name])
        if why:
            raise UsageError(f"save: {leaf.name} {why}")
        stored[leaf.name] = Stored(leaf.shape, leaf.dtype, sha256(arrays[leaf.name]))
    return Manifest(config, packed, LAYOUT_VERSION, embed, head, stored), arrays


def _table_format(table: Table | PackedTable) -> str:
    return table.format if isinstance(table, PackedTable) else "f32"


def _write(draft: pathlib.Path, described: Manifest, arrays: dict[str, np.ndarray]) -> None:
    """Fills `draft`."""
    with open_files() as (orbax, files):
        try:
            files.save(draft / WEIGHTS, args=orbax.args.PyTreeSave(arrays))
        except OSError:
            raise
        except Exception as error:  # a full disk is a ValueError of orbax's
            raise OSError(first_line(error)) from error
    # It says where the draft was, and no reader asks for it.
    (draft / WEIGHTS / "commit_success.txt").unlink(missing_ok=True)
    (draft / manifest.NAME).write_text(described.text())
